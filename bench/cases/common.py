"""What a case of ``bench/ops.py`` is made of."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.timing import Work

Inputs = dict[str, Tensor]
Function = Callable[..., Tensor | tuple]
ALL_DTYPES = ("bf16", "fp32")
FORWARD, BACKWARD, BOTH = MODES = ("forward", "backward", "forward + backward")


@dataclass(frozen=True)
class Contender:
    """One implementation of a case.

    build: makes the function, in the contender's own process; it is called with the inputs as
        keywords and returns a tensor, or a tuple whose first is the one that has a gradient.
    lesser: what it leaves out of the case's work, if anything.
    absent: why it cannot take part here; empty if it can.
    as_activations: cast every floating input to the dtype of the activations first. Ours takes
        float32 vectors of parameters; torch's own kernels are fastest on one dtype throughout.
    """

    build: Callable[[], Function]
    lesser: str = ""
    absent: str = ""
    as_activations: bool = False


@dataclass(frozen=True)
class OpCase:
    """An operator at a shape.

    family, name: file of the case; operator, shape and variant.
    inputs: (dtype, device) -> tensors by keyword, from a fixed seed.
    activations: the input whose dtype is the case's.
    gradients: inputs that get a gradient; none: there is no backward pass to time.
    contenders: by name; "ours" is one of them.
    forward, backward: bytes an element -> the least work of each pass. The forward pass is that of
        a training step: it writes what its backward pass cannot do without.
    recomputed: FLOPs of products that a backward pass in O(T) memory has to do again. They are no
        part of ``backward``, but of the rates that are published for flash attention.
    gradients_ahead: the gradients come from the forward pass; there is no backward pass to time.
    """

    family: str
    name: str
    inputs: Callable[[torch.dtype, torch.device], Inputs]
    activations: str
    contenders: Mapping[str, Contender]
    forward: Callable[[int], Work]
    backward: Callable[[int], Work] | None = None
    gradients: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = field(default=ALL_DTYPES)
    recomputed: float = 0.0
    gradients_ahead: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        """Those that can be timed."""
        if self.backward is None:
            return (FORWARD,)
        return (FORWARD, BOTH) if self.gradients_ahead else MODES

    def work(self, mode: str, itemsize: int) -> Work:
        """The least work of a mode."""
        if mode == FORWARD:
            return self.forward(itemsize)
        backward = self.backward(itemsize)
        return backward if mode == BACKWARD else self.forward(itemsize) + backward


def compiled(function: Function) -> Callable[[], Function]:
    """The function through torch.compile with fixed shapes."""
    return lambda: torch.compile(function, dynamic=False)


def torch_peers(eager: Function) -> dict[str, Contender]:
    """Plain torch, eager and compiled."""
    return {
        "eager": Contender(lambda: eager, as_activations=True),
        "compiled": Contender(compiled(eager), as_activations=True),
    }


def needs(device: str, package: str) -> str:
    """Why a CUDA-only package cannot take part, or ""."""
    if device != "cuda":
        return "runs on CUDA only"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return ""


def random(
    generator: torch.Generator,
    *shape: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Tensor:
    """Normal numbers: the same on every device and, up to rounding, in every dtype."""
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
