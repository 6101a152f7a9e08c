"""The rates of the machine that floors are computed from, measured beside what they judge.

A machine that others use too has no constant bandwidth: the copy and the product that a case is
held to take their turns in the very rounds that time the case.
"""

from collections.abc import Callable, Mapping

import torch

from bench.timing import CopyCeiling, MatrixCeiling, Work, interleave, medians
from bench.workers import Worker

COPY = "copy"
# Of the matrix rate: a square product, and one as tall as a batch.
MATRIX_SHAPES = {
    "cpu": ((2048, 2048, 2048), (4096, 3072, 768)),
    "cuda": ((8192, 8192, 8192), (32768, 3072, 768)),
}


def worker_methods(
    device: torch.device, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Callable[..., object]]:
    """What the worker that measures them serves."""
    copy = CopyCeiling(device)
    products = {
        f"linear {m}x{n}x{k} {name}": MatrixCeiling(m, n, k, dtype, device)
        for m, n, k in MATRIX_SHAPES[device.type]
        for name, dtype in dtypes.items()
    }
    contenders = {COPY: copy, **products}
    return {
        "amounts": lambda: {COPY: copy.bytes} | {n: p.flops for n, p in products.items()},
        "seconds": lambda name: contenders[name](),
        "threads": torch.get_num_threads,
    }


class Ceilings:
    """Measures every rate once; later only those that a case is held to.

    Args:
        worker: serves `worker_methods`.
        pause: see `interleave`.
    """

    def __init__(self, worker: Worker, rounds: int, warmup: int, pause: float):
        self.worker = worker
        self.amounts: dict[str, float] = worker.call("amounts")
        times = interleave(self._contenders(list(self.amounts)), rounds, warmup, pause=pause)
        self.median = medians(times)

    def _contenders(self, names: list[str]) -> dict[str, Callable[[], float]]:
        return {name: (lambda n=name: self.worker.call("seconds", name=n)) for name in names}

    def _rate(self, name: str, median: Mapping[str, float]) -> float:
        return self.amounts[name] / median[name]

    @property
    def rates(self) -> dict[str, float]:
        """GB/s and GFLOP/s, by a name that ends in the unit."""
        return {
            f"{name} {'GB/s' if name == COPY else 'GFLOP/s'}": self._rate(name, self.median) / 1e9
            for name in self.amounts
        }

    def _fastest(self, dtype: str) -> str:
        names = [name for name in self.amounts if name.endswith(f" {dtype}")]
        return max(names, key=lambda name: self._rate(name, self.median))

    def beside(self, work: Work, dtype: str) -> dict[str, Callable[[], float]]:
        """What takes its turn among the contenders of a case."""
        return self._contenders([COPY, self._fastest(dtype)] if work.flops else [COPY])

    def floor(self, work: Work, dtype: str, median: Mapping[str, float]) -> tuple[float, dict]:
        """Seconds, and the rates behind them; ``median``: of the case's rounds."""
        copy = self._rate(COPY, median)
        # Without products there is no rate to be limited by.
        product = self._rate(self._fastest(dtype), median) if work.flops else float("inf")
        rates = {"copy_gb_per_s": copy / 1e9}
        if work.flops:
            rates["linear_gflop_per_s"] = product / 1e9
        return work.floor(copy, product), rates
