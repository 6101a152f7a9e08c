"""Cross-entropy over the vocabulary, with and without a sample a row."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.common import Contender, OpCase, compiled, needs, random, seeded
from bench.peers.sampling import SAMPLING
from bench.timing import Work
from metro_ext.ops import vocab_head_loss

SHAPES = {"cpu": ((614, 768, 65536),), "cuda": ((614, 768, 65536), (10240, 768, 65536))}
SMALL_SHAPES = ((16, 32, 128),)
NO_SAMPLE, NO_HITS = "the sample", "argmax hits"


def cases(device: str, small: bool) -> list[OpCase]:
    shapes = SMALL_SHAPES if small else SHAPES[device]
    return [_case(device, *shape, sampled) for shape in shapes for sampled in (True, False)]


def _case(device: str, rows: int, hidden: int, vocab: int, sampled: bool) -> OpCase:
    matrix = 2.0 * rows * hidden * vocab
    weight = vocab * hidden

    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        generator = seeded()
        tensors = {
            "hidden": random(generator, rows, hidden, device=device, dtype=dtype),
            "weight": random(generator, vocab, hidden, device=device, dtype=dtype, scale=0.02),
            "bias": random(generator, vocab, device=device, scale=0.02),
            "target": torch.randint(vocab, (rows,), generator=generator).to(device),
        }
        return tensors | ({"seed": torch.tensor(1, device=device)} if sampled else {})

    return OpCase(
        family="vocab_head",
        name=f"vocab_head {rows}x{hidden}x{vocab}{' sampled' if sampled else ''}",
        inputs=inputs,
        activations="hidden",
        gradients=("hidden", "weight", "bias"),
        contenders=_sampled(device) if sampled else _unsampled(device),
        # The logits once: nothing is recomputed.
        forward=lambda itemsize: Work((weight + rows * hidden) * itemsize, matrix),
        backward=lambda itemsize: Work(2 * (weight + rows * hidden) * itemsize, 2 * matrix),
        gradients_ahead=True,
    )


def _sampled(device: str) -> dict[str, Contender]:
    # What the sample costs; on the CPU it is the difference between two cases.
    unsampled = Contender(lambda: _ours_unsampled, lesser=NO_SAMPLE)
    return {
        "ours": Contender(lambda: _ours),
        **({"ours no sample": unsampled} if device == "cuda" else {}),
        "eager multinomial": Contender(lambda: _torch("multinomial"), as_activations=True),
        "eager cdf": Contender(lambda: _torch("cdf"), as_activations=True),
        "compiled gumbel": Contender(compiled(_torch("gumbel")), as_activations=True),
        "compiled cdf": Contender(compiled(_torch("cdf")), as_activations=True),
        "compiled no sample": Contender(
            compiled(_torch("")), lesser=NO_SAMPLE, as_activations=True
        ),
        **_libraries(device, f"{NO_SAMPLE}, {NO_HITS}"),
    }


def _unsampled(device: str) -> dict[str, Contender]:
    return {
        "ours": Contender(lambda: _ours),
        "eager": Contender(lambda: _torch(""), as_activations=True),
        "compiled": Contender(compiled(_torch("")), as_activations=True),
        **_libraries(device, NO_HITS),
    }


def _libraries(device: str, lesser: str) -> dict[str, Contender]:
    """Losses that never hold all logits; none of them samples or counts hits."""
    fused = "" if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has none"
    liger, cut = needs(device, "liger_kernel"), needs(device, "cut_cross_entropy")
    build = {
        "linear_cross_entropy": (_linear_cross_entropy, fused),
        "liger": (_liger, liger),
        "cut cross entropy": (_cut_cross_entropy, cut),
    }
    return {
        name: Contender(make, lesser=lesser, absent=absent, as_activations=True)
        for name, (make, absent) in build.items()
    }


def _ours(**inputs: Tensor) -> tuple:
    """The summed loss, nll [N], log-sum-exp [N], hits [N] and samples [N]."""
    loss, head = vocab_head_loss(**inputs)
    return loss, *head


def _ours_unsampled(seed: Tensor, **inputs: Tensor) -> tuple:
    return _ours(**inputs)


def _torch(sampling: str):
    """The summed loss, hits [N] and, with a key of `SAMPLING`, samples [N]."""

    def function(
        hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, **_: Tensor
    ) -> tuple:
        logits = F.linear(hidden, weight, bias).float()
        loss = F.cross_entropy(logits, target, reduction="sum")
        fixed = logits.detach()
        hit = fixed.argmax(-1) == target
        return (loss, hit, SAMPLING[sampling](fixed)) if sampling else (loss, hit)

    return function


def _linear_cross_entropy():
    options = torch.nn.LinearCrossEntropyOptions()

    def function(
        hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, **_: Tensor
    ) -> Tensor:
        return F.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, reduction="sum", options=options
        )

    return function


def _liger():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def function(
        hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, **_: Tensor
    ) -> Tensor:
        return loss(weight, hidden, target, bias)

    return function


def _cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    def function(
        hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, **_: Tensor
    ) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, bias=bias, reduction="sum")

    return function
