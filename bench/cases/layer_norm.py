"""LayerNorm(residual + dropout(x + bias))."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.common import Contender, OpCase, random, seeded, torch_peers
from bench.timing import Work
from metro_ext.ops import layer_norm

SHAPES = {"cpu": ((4096, 768),), "cuda": ((4096, 768), (32768, 768))}
# Of the whole steps that bench/step.py measures, in the variant that their layers use.
STEP_SHAPES = {"cpu": ((4096, 256), (2048, 768)), "cuda": ()}
SMALL_SHAPES = ((64, 32),)
DROPOUT, EPS = 0.1, 1e-5
FLOAT32 = 4  # bytes


def cases(device: str, small: bool) -> list[OpCase]:
    shapes = SMALL_SHAPES if small else SHAPES[device]
    variants = ((True, DROPOUT), (False, DROPOUT), (False, 0.0))
    of_steps = () if small else STEP_SHAPES[device]
    return [
        *(_case(*shape, bias, p) for shape in shapes for bias, p in variants),
        *(_case(*shape, *variants[0]) for shape in of_steps),
    ]


def _case(rows: int, hidden: int, with_bias: bool, p: float) -> OpCase:
    elements = rows * hidden
    variant = ("bias + " if with_bias else "") + ("dropout + " if p else "") + "residual"

    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        generator = seeded()
        tensors = {
            "x": random(generator, rows, hidden, device=device, dtype=dtype),
            "residual": random(generator, rows, hidden, device=device, dtype=dtype),
            "weight": 1 + random(generator, hidden, device=device, scale=0.1),
            "shift": random(generator, hidden, device=device, scale=0.1),
        }
        if with_bias:
            tensors["bias"] = random(generator, hidden, device=device, scale=0.1)
        if p:
            tensors["seed"] = torch.tensor(1, device=device)
        return tensors

    def eager(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        shift: Tensor,
        bias: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        x = x if bias is None else x + bias
        x = F.dropout(x, p) if p else x
        return F.layer_norm(residual + x, (hidden,), weight, shift, EPS)

    # Forward: x and residual in, out and the sum of the two out. Backward needs the sum, or what it
    # can be computed from: not `out`, from which a weight of zero brings nothing back.
    # Backward: the sum and the gradient of out in, the gradient of the sum out, and under dropout
    # that of x, which is another.
    forward, backward = 4, 4 if p else 3
    statistics = 2 * rows * FLOAT32  # mean and reciprocal deviation, written and read again
    vectors = (3 if with_bias else 2) * hidden * FLOAT32  # weight, shift, bias; their gradients
    return OpCase(
        family="layer_norm",
        name=f"layer_norm {rows}x{hidden} {variant}",
        inputs=inputs,
        activations="x",
        gradients=("x", "residual", "weight", "shift") + (("bias",) if with_bias else ()),
        contenders={
            "ours": Contender(lambda: partial(layer_norm, p=p, eps=EPS)),
            **torch_peers(eager),
        },
        forward=lambda itemsize: Work(forward * elements * itemsize + statistics + vectors),
        backward=lambda itemsize: Work(
            backward * elements * itemsize + statistics + vectors + hidden * FLOAT32
        ),
    )
