"""The weighted objective and its figures."""

import torch
from torch import Tensor

from bench.cases.common import Contender, OpCase, random, seeded, torch_peers
from bench.timing import Work
from metro_ext.objective import IGNORED, mask_count
from metro_ext.ops import pretrain_loss

TOKENS, SMALL_TOKENS = {"cpu": 4096, "cuda": 32768}, 64
WEIGHTS = (1.0, 50.0, 1.0)  # MLM, RTD, CLM
# float32 values, uint8 hits and labels, int64 targets
NLL, HIT, TARGET = 4, 1, 8


def cases(device: str, small: bool) -> list[OpCase]:
    tokens = SMALL_TOKENS if small else TOKENS[device]
    masked = mask_count(tokens, 0.15)

    def inputs(_: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        generator = seeded()

        def hits() -> Tensor:
            return (torch.rand(masked, generator=generator) < 0.5).to(device, torch.uint8)

        return {
            "mlm_nll": random(generator, masked, device=device).abs(),
            "mlm_hit": hits(),
            "rtd_loss": random(generator, tokens, device=device).abs(),
            "rtd_logit": random(generator, tokens, device=device),
            "label": (torch.rand(tokens, generator=generator) < 0.12).to(device, torch.uint8),
            "clm_nll": random(generator, masked, device=device).abs(),
            "clm_hit": hits(),
            "target": torch.randint(5, 1000, (masked,), generator=generator).to(device),
        }

    masked_bytes = 2 * masked * (NLL + HIT + TARGET)
    token_bytes = tokens * (2 * NLL + HIT)
    gradient_bytes = NLL * (2 * masked + tokens)
    return [
        OpCase(
            family="loss",
            name=f"pretrain_loss {tokens} tokens {masked} masked",
            inputs=inputs,
            activations="rtd_loss",
            gradients=("mlm_nll", "rtd_loss", "clm_nll"),
            contenders={"ours": Contender(lambda: _ours), **torch_peers(_eager)},
            forward=lambda _: Work(masked_bytes + token_bytes),
            backward=lambda _: Work(gradient_bytes),
            dtypes=("fp32",),
        )
    ]


def _ours(mlm_nll, mlm_hit, rtd_loss, rtd_logit, label, clm_nll, clm_hit, target) -> tuple:
    mlm_weight, rtd_weight, clm_weight = WEIGHTS
    return pretrain_loss(
        mlm=(mlm_nll, mlm_hit, target),
        rtd=(rtd_loss, rtd_logit, label),
        clm=(clm_nll, clm_hit, target),
        denominators=None,
        mlm_weight=mlm_weight,
        rtd_weight=rtd_weight,
        clm_weight=clm_weight,
    )


def _eager(mlm_nll, mlm_hit, rtd_loss, rtd_logit, label, clm_nll, clm_hit, target) -> tuple:
    """The loss, and sums and counts like ours."""
    kept, replaced, counted = label <= 1, label == 1, target != IGNORED
    predicted = (rtd_logit > 0) & kept
    sums = (mlm_nll.sum(), rtd_loss.sum(), clm_nll.sum())
    counts = (counted.sum(), kept.sum(), counted.sum())
    terms = zip(WEIGHTS, sums, counts, strict=True)
    loss = sum(weight * value / count.clamp_min(1) for weight, value, count in terms)
    figures = (
        *(value.detach() for value in sums),
        *counts,
        (mlm_hit * counted).sum(),
        (clm_hit * counted).sum(),
        # As integers: torch 2.13 cannot compile the comparison of these two masks on a CPU.
        ((predicted.int() == replaced.int()) & kept).sum(),
        replaced.sum(),
        predicted.sum(),
        (predicted & replaced).sum(),
    )
    return loss, torch.stack([figure.float() for figure in figures])
