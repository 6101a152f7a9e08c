"""One contender of one operator's case, in the process that ``bench/ops.py`` drives."""

import itertools
from argparse import Namespace
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import all_cases
from bench.cases.common import BACKWARD, BOTH, FORWARD, Contender, Inputs, OpCase
from bench.timing import Stopwatch, peak_of_call
from bench.workers import serve
from metro_ext.hardware import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int64": torch.int64}
COLD_BYTES = 128 << 20  # several times a last-level cache
MOST_COPIES = 64
SHORT_SECONDS = 0.05  # longer calls do not notice how they begin
PARKED_BYTES = 4 << 30  # a GPU's memory is for all contenders of the case: more is given back

Results = tuple[Any, ...]
Graph = tuple[Inputs, Results]


class Bench:
    """One contender of one case."""

    def __init__(
        self,
        case: OpCase,
        contender: Contender,
        dtype: str,
        device: torch.device,
        fresh_memory: bool = False,
    ):
        self.case, self.device, self.fresh_memory = case, device, fresh_memory
        inputs = case.inputs(DTYPES[dtype], device)
        if contender.as_activations:
            inputs = _as_activations(inputs, case.activations)
        self.inputs = itertools.cycle(
            [
                {
                    name: tensor.clone().requires_grad_(name in case.gradients)
                    for name, tensor in inputs.items()
                }
                for _ in range(_copies(inputs, device))
            ]
        )
        self.function = contender.build()
        self.leaves_out_work = bool(contender.lesser)
        self.watch = Stopwatch(device, evict=device.type == "cuda")
        self.grad_out: Tensor | None = None
        self.graphs: deque[Graph] = deque()  # whose backward pass is to come
        self.depth = 1  # of those, how many at a time
        self.seconds = 0.0  # of the last call

    def forward(self) -> Results:
        with torch.no_grad():
            return _as_tuple(self.function(**next(self.inputs)))

    def both(self) -> Results:
        graph = self._graph()
        return *graph[1], *self._gradients(graph)

    def backward(self) -> Results:
        """Of the oldest forward pass that has none yet."""
        return self._gradients(self.graphs.popleft())

    def _graph(self) -> Graph:
        inputs = next(self.inputs)
        return inputs, _as_tuple(self.function(**inputs))

    def _gradients(self, graph: Graph) -> tuple[Tensor | None, ...]:
        inputs, out = graph
        leaves = [inputs[name] for name in self.case.gradients]
        return torch.autograd.grad(out[0], leaves, self.grad_out, allow_unused=self.leaves_out_work)

    def prepare(self, mode: str) -> tuple[float, float | None]:
        """Compiles; returns MB of what a call gives back, and of its peak beyond what was held."""
        if mode != FORWARD and self.grad_out is None:
            self.grad_out = torch.ones_like(self.forward()[0])
        self.graphs.clear()
        if mode == BACKWARD:
            self.both()  # compiles: what is kept is counted of a call like those to come
            self.depth = self._depth()
        self._ready(mode)()  # compiles, and fills whatever is kept between calls
        given_back = self._ready(mode)()
        results = sum(t.numel() * t.element_size() for t in given_back if isinstance(t, Tensor))
        del given_back
        peak = peak_of_call(self.device, self._ready(mode))
        if not self.fresh_memory:
            keep_freed_memory()
        return results / 1e6, None if peak is None else peak / 1e6

    def run(self, mode: str) -> float:
        """Seconds of a call. On the CPU a short one follows another, as in a step: the threads of
        the pool are awake, and on cores of their own. On CUDA every one does: its memory is then at
        hand, though it was given back in between."""
        if self.device.type == "cuda" or self.seconds < SHORT_SECONDS:
            self._ready(mode)()
        self.seconds = self.watch.time(self._ready(mode))
        if self.device.type == "cuda" and torch.cuda.memory_reserved(self.device) > PARKED_BYTES:
            torch.cuda.empty_cache()
        return self.seconds

    def _ready(self, mode: str) -> Callable[[], Results]:
        """The call to time, once what it takes for granted is there: backward a forward pass."""
        if mode != BACKWARD:
            return self.both if mode == BOTH else self.forward
        while len(self.graphs) < self.depth:
            self.graphs.append(self._graph())
        return self.backward

    def _depth(self) -> int:
        """How many forward passes wait, so that what a backward pass reads has left the caches."""
        if self.device.type == "cuda":
            return 1  # the cache is overwritten before the call
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            graph = self._graph()
        for tensor in graph[0].values():
            count(tensor)
        return min(MOST_COPIES, 1 + -(-COLD_BYTES // max(sum(kept.values()), 1)))


def _copies(inputs: Inputs, device: torch.device) -> int:
    """How many copies of the inputs outgrow a CPU's caches; small ones may stay in them."""
    if device.type == "cuda":
        return 1
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs.values())
    return min(MOST_COPIES, -(-COLD_BYTES // size))


def _as_tuple(value: Any) -> Results:
    return value if isinstance(value, tuple) else (value,)


def _as_activations(inputs: Inputs, activations: str) -> Inputs:
    dtype = inputs[activations].dtype
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }


def serve_contender(options: Namespace) -> None:
    """A worker's life: one contender of a family, a case after the other."""
    device = torch.device(options.device)
    cases = {case.name: case for case in all_cases(options.device, options.small)}
    bench: Bench | None = None

    def build(case: str, dtype: str) -> None:
        nonlocal bench
        bench = None  # its memory is free before the next takes some
        if device.type == "cuda":
            torch.cuda.empty_cache()
        # Graphs are kept by code object, a few for each: those of earlier cases would count.
        torch.compiler.reset()
        contender = cases[case].contenders[options.worker]
        bench = Bench(cases[case], contender, dtype, device, options.fresh_memory)

    serve(
        {
            "build": build,
            "prepare": lambda mode: bench.prepare(mode),
            "run": lambda mode: bench.run(mode),
        }
    )
