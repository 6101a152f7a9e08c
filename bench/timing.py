"""Interleaved timing, peak memory, and the ceilings that floors are computed from."""

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from metro_ext.hardware import peak_memory, status_bytes
from metro_ext.ops import linear

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
LEAST_ROUNDS = 5
EVICTION_BYTES = 1 << 30  # many times a GPU's last-level cache


def interleave(
    contenders: Mapping[str, Callable[[], float]],
    rounds: int,
    warmup: int,
    *,
    pause: float = 0.0,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    drop: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Runs the contenders in turns, so that a slow moment of the machine meets all of them.

    Args:
        contenders: each runs its work once and returns the seconds that it took.
        rounds: timed turns.
        warmup: turns before, whose times are dropped.
        pause: seconds of rest before each call: the threads of the one before spin for a while
            after their work, on the cores that the next one needs.
        seconds: after which no further turn begins, once `LEAST_ROUNDS` are timed.
        clock: of ``seconds``.
        drop: is told of a contender whose call failed, and why: it leaves the turns, with the times
            that it has. The run ends with what ``drop`` raises, or with the failure if it is None.

    Returns:
        ``rounds`` times (or fewer, see ``seconds``) by contender that stayed, in order.
    """
    end = clock() + seconds
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        if turn >= warmup + LEAST_ROUNDS and clock() > end:
            break
        for name in list(times):
            if pause:
                time.sleep(pause)
            try:
                taken = contenders[name]()
            except Exception as error:
                if drop is None:
                    raise
                drop(name, error)
                del times[name]
                continue
            if turn >= warmup:
                times[name].append(taken)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


class Stopwatch:
    """Times one call of a function at a time.

    Args:
        device: on CUDA the time is between two events on the current stream.
        evict: overwrite the cache before each call, so that a kernel is measured against the
            memory. Meant for CUDA: on the CPU it would evict the code too.
        clock: of the CPU; seconds.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        evict: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.device, self.clock = device, clock
        self.eviction = None
        if evict:
            self.eviction = torch.zeros(EVICTION_BYTES, dtype=torch.uint8, device=device)

    def time(self, function: Callable[[], object]) -> float:
        """Seconds of one call; what it returns is freed after the clock has stopped."""
        if self.eviction is not None:
            self.eviction.add_(1)
        if self.device.type == "cpu":
            start = self.clock()
            result = function()
            seconds = self.clock() - start
            del result
            return seconds
        # The eviction keeps the device busy for about half a millisecond: the host gets ahead, and
        # what is timed is the kernels and not their launches.
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        if self.eviction is None:
            torch.cuda.synchronize(self.device)
        start.record()
        result = function()
        end.record()
        torch.cuda.synchronize(self.device)
        del result
        return start.elapsed_time(end) / 1e3


def start_peak(device: torch.device) -> int | None:
    """Begins a new peak and returns the bytes now held; None where the system cannot."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        # Freed memory that the allocator keeps would hide what the next call needs.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):
        return None
    return status_bytes("VmRSS")


def peak_of_call(device: torch.device, function: Callable[[], object]) -> int | None:
    """Bytes of the highest moment of a call beyond what was held; None where the system cannot say.

    On the CPU every large block is mapped anew meanwhile and afterwards: what the allocator keeps
    of earlier calls, and how it is broken up, would count otherwise.
    """
    if device.type == "cpu":
        map_large_blocks()
    held = start_peak(device)
    if held is None:
        return None
    function()
    return peak_memory(device) - held


def map_large_blocks() -> None:
    """Undoes `keep_freed_memory`: blocks of 128 KB and more go back to the system when freed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD of malloc.h


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without.

    bytes: moved between memory and the processor.
    flops: of matrix products, a multiply-add being two.
    """

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def floor(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Seconds: the slower of the two, as they can overlap."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


class CopyCeiling:
    """A large copy; its bytes are those read and those written."""

    def __init__(self, device: torch.device):
        self.watch = Stopwatch(device)
        size = COPY_BYTES[device.type]
        self.source = torch.ones(size // 4, device=device)
        self.target = torch.zeros_like(self.source)
        self.bytes = 2 * size

    def __call__(self) -> float:
        return self.watch.time(lambda: self.target.copy_(self.source))


class MatrixCeiling:
    """A product of random [m, k] and [n, k]ᵀ in the fastest of torch's kernels.

    That is what `metro_ext.ops.linear` calls: oneDNN's in float32 too, where torch's own linear
    goes to MKL, which is slower on CPUs that are not Intel's.
    """

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.watch = Stopwatch(device)
        self.x = torch.randn(m, k, generator=generator).to(device, dtype)
        self.weight = torch.randn(n, k, generator=generator).to(device, dtype)
        self.flops = 2.0 * m * n * k

    @torch.no_grad()
    def __call__(self) -> float:
        return self.watch.time(lambda: linear(self.x, self.weight))
