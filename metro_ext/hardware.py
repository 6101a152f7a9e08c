"""The machine: its device, peak arithmetic rates for model FLOPs utilisation (MFU), allocator."""

import ctypes
import time

import torch

from metro_ext import _C
from metro_ext.errors import UserError
from metro_ext.ops import linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # names of --precision

# Dense bf16/fp16 tensor-core FLOP/s from the data sheets, by a part of the device's name.
_CUDA_PEAKS = (("A100", 312e12), ("H100", 989e12), ("H200", 989e12), ("B200", 2250e12))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is a share of.

    The data sheet's rate for a known GPU and 16-bit products; else the best rate of a matrix
    product measured here, in about a tenth of a second.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, peak in _CUDA_PEAKS:
            if part in name:
                return peak
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a size × size × size product, by the layers' own `linear`: the fastest of twenty.

    The fastest and not the median, because a peak is asked for: other work on the machine can only
    slow a product down.
    """
    size = size * 8 if device.type == "cuda" else size
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    fastest = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        with torch.no_grad():
            linear(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def status_bytes(key: str) -> int | None:
    """Bytes by a key of Linux's /proc/self/status ("VmRSS"); None where there is none."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: what torch allocated on CUDA, resident memory on the CPU.

    The kernel's VmHWM and not ``ru_maxrss``: the latter survives exec, so that a small process
    started by a large one would report its parent's peak.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = status_bytes("VmHWM")
    if peak is None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak


def choose_device(name: str, local_rank: int = 0, option: str = "--run.device") -> torch.device:
    """``auto`` takes CUDA where torch has it and this build has kernels for it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{option} is cuda, but torch finds no CUDA device; use {option}=cpu")
    if name == "auto":
        # A build without nvcc has kernels for the CPU alone.
        has_kernels = "attention" in _C.build_info()["cuda_operators"]
        name = "cuda" if torch.cuda.is_available() and has_kernels else "cpu"
    if name == "cuda":
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device(name)


def exact_reductions() -> None:
    """Has cuBLAS add up the partial sums of 16-bit products in float32, for the whole process.

    torch by default lets it add some of them in 16 bits, where it splits a deep product. It is for
    commands to call, not for a library.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def keep_freed_memory() -> bool:
    """Makes glibc keep large freed blocks for the next allocation; False where there is no glibc.

    By default it maps every block above 32 MB anew and gives it back when freed, so that each step
    faults in, zeroed page by page, the gradients and logits that the step before had just held: a
    tenth of the step's time at a vocabulary of 64K. For a process that trains and does little else.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    return bool(
        libc.mallopt(m_mmap_threshold, 1 << 30) and libc.mallopt(m_trim_threshold, 2**31 - 1)
    )
