"""A vocabulary head so large that its rows take more than one chunk, against float64.

Logits are held a chunk of rows at a time, on a GPU 2^28 logits (csrc/vocab_head/vocab_head_op.cpp):
no test of a size for every machine meets the second chunk there, where gradients are added to those
of the first and draws go on from its rows. The reference takes the rows in pieces of its own.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from metro_ext.ops import vocab_head, vocab_head_loss

OK = "ok"
WIDTH, VOCAB = 64, 17408
ROWS = {"cpu": 500, "cuda": 16421}  # more than one chunk, none of them full; on CUDA 2.9e8 logits
REFERENCE_ROWS = 1024
IGNORED = -100
# ‖out − ref‖ / ‖ref‖, as in python_tests/op_checks.py
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
Values = dict[str, Tensor]


def chunked_heads(device: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Checks by name; each returns `OK` or what is wrong."""
    for dtype in TOLERANCES:
        name = str(dtype).removeprefix("torch.")
        yield f"values {name}", lambda d=dtype: _compare(d, device)
        yield f"samples {name}", lambda d=dtype: _compare_samples(d, device)


def _inputs(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], bias [V], target [N]."""
    generator = torch.Generator().manual_seed(0)
    rows = ROWS[device]
    hidden = torch.randn(rows, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator) / WIDTH**0.5
    bias = torch.randn(VOCAB, generator=generator)
    target = torch.randint(VOCAB, (rows,), generator=generator)
    target[::101] = IGNORED
    return (
        hidden.to(device, dtype), weight.to(device, dtype), bias.to(device), target.to(device)
    )  # fmt: skip


def ours(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Values:
    """nll, lse [N] and the gradients of the summed loss."""
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    loss, head = vocab_head_loss(*leaves, target)
    gradients = torch.autograd.grad(loss, leaves)
    return {"nll": head.nll, "lse": head.lse, **_named(gradients)}


def reference(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Values:
    """The same in float64, by formulas of its own."""
    weight, bias = weight.double(), bias.double()
    nll, lse, grad_hidden = [], [], []
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for part, ids in zip(
        hidden.double().split(REFERENCE_ROWS), target.split(REFERENCE_ROWS), strict=True
    ):
        logits = part @ weight.T + bias
        counted = (ids != IGNORED).double()
        place = ids.clamp_min(0)[:, None]
        lse.append(logits.logsumexp(1))
        nll.append((lse[-1] - logits.gather(1, place)[:, 0]) * counted)
        grad = (logits - lse[-1][:, None]).exp()
        grad.scatter_add_(1, place, torch.full_like(place, -1, dtype=grad.dtype))
        grad *= counted[:, None]
        grad_hidden.append(grad @ weight)
        grad_weight += grad.T @ part
        grad_bias += grad.sum(0)
    gradients = torch.cat(grad_hidden), grad_weight, grad_bias
    return {"nll": torch.cat(nll), "lse": torch.cat(lse), **_named(gradients)}


def _named(gradients: tuple[Tensor, ...]) -> Values:
    return {
        f"gradient of {n}": g for n, g in zip(("hidden", "weight", "bias"), gradients, strict=True)
    }


def _compare(dtype: torch.dtype, device: str) -> str:
    inputs = _inputs(dtype, device)
    return difference(ours(*inputs), reference(*inputs), TOLERANCES[dtype])


def difference(values: Values, expected: Values, tolerance: float) -> str:
    """`OK`, or the first of the values that is too far from what is expected."""
    for name, wanted in expected.items():
        error = float((values[name].double() - wanted).norm() / wanted.norm())
        if not error <= tolerance:  # NaN too
            return f"{name}: relative error {error:.2e}, at most {tolerance:g} wanted"
    return OK


def _compare_samples(dtype: torch.dtype, device: str) -> str:
    """One-hot rows make the products exact, so that both devices see the same logits."""
    _, weight, bias, target = _inputs(dtype, device)
    hidden = torch.eye(WIDTH, dtype=dtype, device=device)[torch.arange(ROWS[device]) % WIDTH]
    given = hidden, (3 * weight).contiguous(), bias, target, torch.tensor(7, device=device)
    found = vocab_head(*given).sample.cpu()
    expected = vocab_head(*(tensor.cpu() for tensor in given)).sample
    wrong = int((found != expected).sum())
    return OK if wrong == 0 else f"{wrong} of {len(found)} differ between cpu and {device}"
