"""GELU(x + bias)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.common import Contender, OpCase, random, seeded, torch_peers
from bench.timing import Work
from metro_ext.ops import bias_gelu

# The last two of the CPU are those of the whole steps that bench/step.py measures.
SHAPES = {"cpu": ((4096, 3072), (4096, 1024), (2048, 3072)), "cuda": ((32768, 3072),)}
SMALL_SHAPES = ((64, 48),)


def cases(device: str, small: bool) -> list[OpCase]:
    return [_case(*shape) for shape in (SMALL_SHAPES if small else SHAPES[device])]


def _case(rows: int, width: int) -> OpCase:
    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        generator = seeded()
        return {
            "x": random(generator, rows, width, device=device, dtype=dtype),
            "bias": random(generator, width, device=device, scale=0.1),
        }

    def eager(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    return OpCase(
        family="gelu",
        name=f"bias_gelu {rows}x{width}",
        inputs=inputs,
        activations="x",
        gradients=("x", "bias"),
        contenders={"ours": Contender(lambda: bias_gelu), **torch_peers(eager)},
        # x in, out; then x and the gradient of out in, that of x out.
        forward=lambda itemsize: Work(2 * rows * width * itemsize),
        backward=lambda itemsize: Work(3 * rows * width * itemsize),
    )
