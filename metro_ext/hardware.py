"""Peak arithmetic rates, for model FLOPs utilisation (MFU)."""

import time

import torch

# Dense bf16/fp16 tensor-core FLOP/s from the data sheets, by a part of the device's name.
_CUDA_PEAKS = (("A100", 312e12), ("H100", 989e12), ("H200", 989e12), ("B200", 2250e12))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is a share of.

    The data sheet's rate for a known GPU and 16-bit products; else the rate of a matrix product
    measured here (the median of seven, about a tenth of a second).
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, peak in _CUDA_PEAKS:
            if part in name:
                return peak
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a size × size × size product on random data; the median of seven."""
    size = size * 8 if device.type == "cuda" else size
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(seconds[2:])[3]
