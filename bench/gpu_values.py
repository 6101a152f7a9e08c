"""Values at sizes that no test of every machine has: a vocabulary head and attention.

Of the head so many rows that they take more than one chunk, against float64. Logits are held a
chunk of rows at a time, on a GPU 2^28 logits (csrc/vocab_head/vocab_head_op.cpp): no test of a size
for every machine meets the second chunk there, where gradients are added to those of the first and
draws go on from its rows. The reference takes the rows in pieces of its own.

Of attention so many ragged sequences, empty ones among them and at their end, that a block works on
several tiles and adds several to its row of the bias gradient (csrc/attention/attention_cuda.cuh).
The reference is the CPU's kernel in float32, which drops the same probabilities, and whose own
reference is in python_tests/test_attention.py.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from metro_ext.ops import attention, vocab_head, vocab_head_loss

OK = "ok"
WIDTH, VOCAB = 64, 17408
ROWS = {"cpu": 500, "cuda": 16421}  # more than one chunk, none of them full; on CUDA 2.9e8 logits
REFERENCE_ROWS = 1024
# Of attention.
SEQUENCES, EMPTY, LONGEST, HEADS, HEAD_SIZE, DROPOUT = 128, 40, 512, 3, 64, 0.1
# A token's ‖out − ref‖ over its ‖ref‖, or over the tokens' root mean square where that is more;
# 0.008 on the CPU. Over all tokens together one wrong among thousands would not be seen.
TOKEN_TOLERANCE = 0.05
BIAS_TOLERANCE = 2e-3  # float32 sums, 0.0006 on the CPU; one lost tile of scores would be 0.01
IGNORED = -100
# ‖out − ref‖ / ‖ref‖, as in python_tests/op_checks.py
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
Values = dict[str, Tensor]


def value_checks(device: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """By name; each returns `OK` or what is wrong."""
    yield "attention bfloat16", lambda: _compare_attention(device)
    yield "attention bfloat16 repeated", lambda: _compare_repeated_attention(device)
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


def attention_lengths() -> Tensor:
    """Of the sequences, int64."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, LONGEST + 1, (SEQUENCES,), generator=generator)
    lengths[0], lengths[3], lengths[-1] = LONGEST, 0, 1
    return torch.cat((lengths, torch.zeros(EMPTY, dtype=torch.int64)))


def attention_inputs(device: str) -> tuple[Tensor, ...]:
    """qkv [T, 3, heads, d] and grad_out [T, heads, d] in bfloat16, cu_seqlens, bias, seed."""
    generator = torch.Generator().manual_seed(1)
    ends = torch.cat((torch.tensor([0]), attention_lengths())).cumsum(0)
    tokens = int(ends[-1])
    qkv = torch.randn(tokens, 3, HEADS, HEAD_SIZE, generator=generator)
    grad_out = torch.randn(tokens, HEADS, HEAD_SIZE, generator=generator)
    bias = torch.randn(HEADS, 2 * LONGEST - 1, generator=generator)
    given = qkv.bfloat16(), grad_out.bfloat16(), ends.int(), bias, torch.tensor(7)
    return tuple(tensor.to(device) for tensor in given)


def attention_values(
    qkv: Tensor, grad_out: Tensor, cu_seqlens: Tensor, bias: Tensor, seed: Tensor
) -> Values:
    """out and the gradients, on the CPU."""
    leaves = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
    out = attention(leaves[0], cu_seqlens, leaves[1], LONGEST, seed=seed, p=DROPOUT)
    grad_qkv, grad_bias = torch.autograd.grad(out, leaves, grad_out)
    parts = zip(("queries", "keys", "values"), grad_qkv.unbind(1), strict=True)
    values = {
        "out": out,
        **{f"gradient of {n}": g for n, g in parts},
        "gradient of bias": grad_bias,
    }
    return {name: value.detach().cpu() for name, value in values.items()}


def _compare_attention(device: str) -> str:
    given = attention_inputs(device)
    values = attention_values(*given)
    qkv, grad_out, *others = (tensor.cpu() for tensor in given)
    return attention_difference(values, attention_values(qkv.float(), grad_out.float(), *others))


def attention_difference(values: Values, expected: Values) -> str:
    """As `difference`, and the same of every single token."""
    for name, wanted in expected.items():
        if name == "gradient of bias":
            found = difference(values, {name: wanted}, BIAS_TOLERANCE)
        else:
            found = difference(values, {name: wanted}, TOLERANCES[torch.bfloat16])
            found = _token_difference(name, values[name], wanted) if found == OK else found
        if found != OK:
            return found
    return OK


def _token_difference(name: str, value: Tensor, wanted: Tensor) -> str:
    """Of [T, heads, d]."""
    size = wanted.flatten(1).norm(dim=1)
    error = (value.float() - wanted).flatten(1).norm(dim=1)
    error = error / size.maximum(size.square().mean().sqrt())
    worst = int(error.argmax())
    if error[worst] <= TOKEN_TOLERANCE:
        return OK
    return (
        f"{name}: relative error {error[worst]:.2e} of token {worst}, at most {TOKEN_TOLERANCE:g} "
        "wanted"
    )


def _compare_repeated_attention(device: str) -> str:
    given = attention_inputs(device)
    first, second = attention_values(*given), attention_values(*given)
    for name, value in first.items():
        # As bytes: NaN then equals NaN, and -0 differs from 0.
        if not torch.equal(*(v.contiguous().view(torch.uint8) for v in (value, second[name]))):
            return f"{name} differs between two calls"
    return OK
