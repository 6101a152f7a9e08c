"""One logit a token and its binary cross-entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.common import Contender, OpCase, random, seeded, torch_peers
from bench.timing import Work
from metro_ext.ops import rtd_head

# The last two of the CPU are those of the whole steps that bench/step.py measures.
SHAPES = {"cpu": ((4096, 768), (4096, 256), (2048, 768)), "cuda": ((32768, 768),)}
SMALL_SHAPES = ((64, 32),)


def cases(device: str, small: bool) -> list[OpCase]:
    return [_case(*shape) for shape in (SMALL_SHAPES if small else SHAPES[device])]


def _case(tokens: int, hidden: int) -> OpCase:
    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        generator = seeded()
        label = torch.rand(tokens, generator=generator) < 0.12
        return {
            "hidden": random(generator, tokens, hidden, device=device, dtype=dtype),
            "weight": random(generator, hidden, device=device, scale=0.1),
            "bias": random(generator, 1, device=device),
            "label": label.to(device, torch.uint8),
        }

    def eager(hidden: Tensor, weight: Tensor, bias: Tensor, label: Tensor) -> tuple:
        logit = F.linear(hidden, weight[None], bias).squeeze(-1).float()
        kept = label <= 1
        loss = F.binary_cross_entropy_with_logits(logit, label.float(), reduction="none")
        # As integers: torch 2.13 cannot compile the comparison of these two masks on a CPU.
        hits = (((logit > 0).int() == label.int()) & kept).sum()
        return loss * kept, logit, hits

    return OpCase(
        family="rtd_head",
        name=f"rtd_head {tokens}x{hidden}",
        inputs=inputs,
        activations="hidden",
        gradients=("hidden", "weight", "bias"),
        contenders={"ours": Contender(lambda: rtd_head), **torch_peers(eager)},
        # hidden in; then hidden in again and its gradient out.
        forward=lambda itemsize: Work(tokens * hidden * itemsize),
        backward=lambda itemsize: Work(2 * tokens * hidden * itemsize),
    )
