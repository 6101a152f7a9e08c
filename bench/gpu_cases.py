"""Small cases of every operator for `bench/gpu_check.py`, and what is asked of them.

    python -m bench.gpu_cases repeats | equality | values | once [--device cuda] [--family NAME ...]

``repeats``: the same call gives the same bits. ``equality``: the CPU and the device draw the same
masks, samples and dropout. ``values``: at the sizes of training a vocabulary head agrees with
float64 and attention with the CPU (`bench.gpu_values`). ``once``: every case runs, for a sanitizer
to watch. The last line is JSON, ``{"checks": {name: "ok" or what is wrong}}``; the exit code is 1
if anything is wrong.
"""

import argparse
import json
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.gpu_stages import FAMILIES
from bench.gpu_values import OK, value_checks
from metro_ext.command_line import run
from metro_ext.objective import IGNORED
from metro_ext.ops import (
    HeadGradients,
    TokenTable,
    attention,
    bias_gelu,
    bias_gelu_linear,
    layer_norm,
    mask_tokens,
    pretrain_loss,
    replace_tokens,
    rtd_head,
    vocab_head,
    vocab_head_loss,
)

REPEATS = 3
HEAD_SIZES = (32, 64, 96, 128)
LENGTHS = (1, 0, 67, 130)  # of packed sequences: no tile is full, one is empty
# Of the kernels' paths: element by element, and by vectors of 16 bytes.
WIDTHS = (97, 768)
VOCAB, MASK_ID = 1031, 4
LOOKUPS = 4099  # beyond 3072 torch's backward pass of an embedding takes another kernel
# Tokens to corrupt: less and more than the block that selects reads in a trip of its loop, 8192.
LENGTHS_TO_CORRUPT = (4099, 9003)
# Vectors, and more than one group of sample tiles (csrc/vocab_head/vocab_head_rows_cuda.cu).
WIDE_VOCAB = 17408
Results = tuple[Tensor, ...]
Case = Callable[[str, torch.dtype], Results]  # of a device and a dtype


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _key(device: str) -> Tensor:
    return torch.tensor(7, device=device)


def _with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Results:
    """What the function returns and the gradients of its first result by every input."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    results = out if isinstance(out, tuple) else (out,)
    grad = _normal(*results[0].shape, seed=1).to(results[0])
    return *results, *torch.autograd.grad(results[0], leaves, grad)


def _attention(device: str, dtype: torch.dtype, size: int, p: float) -> Results:
    tokens, longest = sum(LENGTHS), max(LENGTHS)
    first = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    seed = _key(device) if p else None
    return _with_gradients(
        lambda qkv, bias: attention(qkv, first, bias, longest, seed=seed, p=p),
        _normal(tokens, 3, 3, size).to(device, dtype),
        _normal(3, 2 * longest - 1).to(device),
    )


def _layer_norm(device: str, dtype: torch.dtype, width: int) -> Results:
    return _with_gradients(
        lambda x, residual, weight, shift, bias: layer_norm(
            x, weight, shift, bias=bias, residual=residual, seed=_key(device), p=0.1
        ),
        *(_normal(67, width, seed=seed).to(device, dtype) for seed in (0, 2)),
        *(_normal(width, seed=seed).to(device) for seed in (3, 4, 5)),
    )


def _bias_gelu(device: str, dtype: torch.dtype, width: int) -> Results:
    return _with_gradients(
        bias_gelu, _normal(67, width).to(device, dtype), _normal(width, seed=2).to(device)
    )


def _bias_gelu_linear(device: str, dtype: torch.dtype, width: int) -> Results:
    """Its backward pass overwrites the gradient that the GELU's kernel reads."""
    return _with_gradients(
        bias_gelu_linear,
        _normal(67, width).to(device, dtype),
        _normal(width, seed=2).to(device),
        _normal(96, width, seed=3).to(device),
    )


def _vocab_head(device: str, dtype: torch.dtype, vocab: int) -> Results:
    target = (torch.arange(67) * 15).to(device)

    def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> Results:
        loss, head = vocab_head_loss(hidden, weight, bias, target, seed=_key(device))
        return loss, *head

    return _with_gradients(
        head,
        _normal(67, 96).to(device, dtype),
        (0.2 * _normal(vocab, 96, seed=2)).to(device, dtype),
        _normal(vocab, seed=3).to(device),
    )


def _token_table(device: str, dtype: torch.dtype, vocab: int) -> Results:
    """A step's use of a token table: lookups, half of them of one token, and a tied head."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, vocab, (LOOKUPS,), generator=generator)
    tokens[torch.randperm(LOOKUPS, generator=generator)[: LOOKUPS // 2]] = MASK_ID
    tokens = tokens.to(device)
    target = (torch.arange(67) * 15).to(device)
    weight = (0.2 * _normal(vocab, 96)).to(device).requires_grad_()
    bias = _normal(vocab, seed=2).to(device).requires_grad_()
    table = TokenTable(weight, dtype)
    rows = table.rows(tokens)
    tied = HeadGradients(table.matrix, table.gradient)
    scale = torch.ones((), device=device)
    head = tied.vocab_head(rows[:67], bias, target, scale, _key(device))
    others = (rows.float() * _normal(LOOKUPS, 96, seed=3).to(device)).sum()
    loss = tied.attach(scale * head.nll.sum() + others)
    return loss, *head, *torch.autograd.grad(loss, (weight, bias))


def _rtd_head(device: str, dtype: torch.dtype, width: int) -> Results:
    label = (torch.arange(301) % 7 == 0).to(device, torch.uint8)
    return _with_gradients(
        lambda hidden, weight, bias: rtd_head(hidden, weight, bias, label),
        _normal(301, width).to(device, dtype),
        _normal(width, seed=2).to(device),
        _normal(1, seed=3).to(device),
    )


def _corruption(device: str, length: int) -> Results:
    """Masked tokens, positions, targets; corrupted tokens, labels."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, VOCAB, (length,), generator=generator)
    tokens[::97] = 0  # special: never masked
    tokens = tokens.to(device)
    special = torch.arange(5, device=device)
    masked, position, target = mask_tokens(
        tokens, special, _key(device), count=length * 15 // 100, mask_id=MASK_ID, vocab_size=VOCAB
    )
    sample = (target * 3 + position) % VOCAB
    sample = torch.where(target == IGNORED, 0, sample)
    return masked, position, target, *replace_tokens(tokens, position, target, sample, pad_id=1)


def _loss(device: str) -> Results:
    def count(size: int, modulus: int) -> Tensor:
        return (torch.arange(size) % modulus == 0).to(device, torch.uint8)

    target = (torch.arange(97) + 5).to(device)
    return _with_gradients(
        lambda mlm, rtd, clm: pretrain_loss(
            mlm=(mlm, count(97, 3), target),
            rtd=(rtd, _normal(643, seed=6).to(device), count(643, 7)),
            clm=(clm, count(97, 2), target),
        ),
        *(_normal(size, seed=size).abs().to(device) for size in (97, 643, 97)),
    )


def _sized(
    label: str, case: Callable[[str, torch.dtype, int], Results], sizes: Sequence[int]
) -> dict[str, Case]:
    return {f"{label} {s}": lambda device, dtype, s=s: case(device, dtype, s) for s in sizes}


# By family and name: odd shapes, and such as vectors fit.
CASES: dict[str, dict[str, Case]] = {
    "attention": {
        f"attention {size} dropout {p}": lambda device, dtype, s=size, p=p: _attention(
            device, dtype, s, p
        )
        for size in HEAD_SIZES
        for p in (0.0, 0.1)
    },
    "vocab_head": {
        **_sized("vocab_head", _vocab_head, (VOCAB, WIDE_VOCAB)),
        **_sized("token_table", _token_table, (VOCAB, WIDE_VOCAB)),
    },
    "layer_norm": _sized("layer_norm", _layer_norm, (*WIDTHS, 3000)),
    "gelu": {
        **_sized("bias_gelu", _bias_gelu, WIDTHS),
        **_sized("bias_gelu_linear", _bias_gelu_linear, WIDTHS),
    },
    "rtd_head": _sized("rtd_head", _rtd_head, WIDTHS),
}
# Those that are of no dtype.
OF_ONE_TYPE: dict[str, dict[str, Callable[[str], Results]]] = {
    "corruption": {
        f"corruption {length}": lambda device, n=length: _corruption(device, n)
        for length in LENGTHS_TO_CORRUPT
    },
    "loss": {"pretrain_loss": lambda device: _loss(device)},
}


def cases(
    device: str, families: Sequence[str] = FAMILIES
) -> Iterator[tuple[str, Callable[[], Results]]]:
    """Every operator of the families, forward and backward, in every dtype of the device."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device == "cuda":
        dtypes["fp16"] = torch.float16
    for family in families:
        for label, case in CASES.get(family, {}).items():
            for name, dtype in dtypes.items():
                yield f"{label} {name}", lambda c=case, d=dtype: c(device, d)
        for label, case in OF_ONE_TYPE.get(family, {}).items():
            yield label, lambda c=case: c(device)


def _bytes(tensor: Tensor) -> Tensor:
    """As bytes NaN equals NaN, and -0 differs from 0."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _repeats(case: Callable[[], Results]) -> str:
    first = [_bytes(tensor) for tensor in case()]
    for _ in range(REPEATS):
        for index, (before, after) in enumerate(zip(first, case(), strict=True)):
            if not torch.equal(before, _bytes(after)):
                return f"result {index} differs between two calls"
    return OK


def _once(case: Callable[[], Results]) -> str:
    for index, tensor in enumerate(case()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"result {index} is not finite"
    return OK


def _dropped_by_layer_norm(device: str) -> Results:
    """What was kept of a row of ones lies above the mean, what was dropped below."""
    width = 768
    one, zero = torch.ones(width, device=device), torch.zeros(width, device=device)
    x = torch.ones(67, width, device=device)
    return (layer_norm(x, one, zero, seed=_key(device), p=0.3) > 0,)


def _dropped_by_attention(device: str) -> Results:
    """With the identity as values the output is the matrix of probabilities."""
    size = 128
    qkv = _normal(size, 3, 2, size).to(device)
    qkv[:, 2] = torch.eye(size, device=device)[:, None]
    first = torch.tensor([0, size], dtype=torch.int32, device=device)
    return (attention(qkv, first, None, size, seed=_key(device), p=0.3) != 0,)


def _samples(device: str, dtype: torch.dtype) -> Results:
    """One-hot rows make the products exact, so that both devices see the same logits."""
    rows, vocab = 96, 5000
    head = vocab_head(
        torch.eye(rows, dtype=dtype, device=device),
        (3 * _normal(vocab, rows)).to(device, dtype),
        _normal(vocab, seed=1).to(device),
        torch.zeros(rows, dtype=torch.int64, device=device),
        _key(device),
    )
    return (head.sample,)


DRAWS: dict[str, Callable[[str], Results]] = {
    **{
        f"masks and corrupted tokens {length}": lambda device, n=length: _corruption(device, n)
        for length in LENGTHS_TO_CORRUPT
    },
    "samples fp32": lambda device: _samples(device, torch.float32),
    "samples bf16": lambda device: _samples(device, torch.bfloat16),
    "dropout of layer_norm": _dropped_by_layer_norm,
    "dropout of attention": _dropped_by_attention,
}


def _equality(draw: Callable[[str], Results], device: str) -> str:
    for index, (cpu, other) in enumerate(zip(draw("cpu"), draw(device), strict=True)):
        if different := int((cpu != other.cpu()).sum()):
            return f"result {index}: {different} of {cpu.numel()} differ between cpu and {device}"
    return OK


def checks_of(
    what: str, device: str, families: Sequence[str] = FAMILIES
) -> dict[str, Callable[[], str]]:
    """Each returns `OK` or what is wrong."""
    if what == "values":
        return dict(value_checks(device))
    if what == "equality":
        return {name: lambda d=draw: _equality(d, device) for name, draw in DRAWS.items()}
    ask = {"repeats": _repeats, "once": _once}[what]
    return {name: lambda c=case: ask(c) for name, case in cases(device, families)}


def check(what: str, device: str, families: Sequence[str] = FAMILIES) -> Iterator[dict[str, str]]:
    """`OK` or what is wrong, by the name of the check: of all so far, after each."""
    results = {}
    for name, function in checks_of(what, device, families).items():
        try:
            results[name] = function()
            if device == "cuda":
                torch.cuda.synchronize()  # a kernel's error belongs to this case
        except Exception as error:  # one broken operator must not hide the others
            traceback.print_exc()
            first_line = (str(error).strip().splitlines() or [""])[0]
            results[name] = f"{type(error).__name__}: {first_line}"
        yield results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_cases")
    parser.add_argument("what", choices=("repeats", "equality", "values", "once"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--family", nargs="+", choices=FAMILIES, help="of repeats and once: these (default: all)"
    )
    parser.add_argument(
        "--running-record", action="store_true",
        help="print the line after every check: what is left of a run that is cut off",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if options.family and options.what not in ("repeats", "once"):
        parser.error(f"--family is of repeats and once, not of {options.what}")
    results = {}
    for results in check(options.what, options.device, options.family or FAMILIES):
        if options.running_record:
            print(json.dumps({"checks": results}), flush=True)
    print(json.dumps({"checks": results}))
    return int(any(result != OK for result in results.values()))


if __name__ == "__main__":
    run(main)
