"""Arguments for the operators: right ones, and ways to make them wrong."""

import random
from pathlib import Path

import fuzz
import numpy as np
import torch

from metro_ext import ops  # noqa: F401  (registers torch.ops.metro)

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8,
          torch.bool, torch.float16]  # fmt: skip
SCALARS = [0, 1, -1, 2, 5, 2**31, 2**62, -(2**62), 1 << 24]
FRACTIONS = [0.0, 0.1, 0.5, 1.0, -0.1, 2.0, float("nan"), float("inf"), 1e-30]


def operators(_folder: Path) -> fuzz.Target:
    """Every metro operator: right arguments with one or two made wrong, or all of them random.

    An error must be a RuntimeError; a result must have the shapes and types of the fake kernel and
    the same bits when the call is repeated.
    """
    schemas = {name: getattr(torch.ops.metro, name).default._schema for name in _RIGHT}

    def target(chance: random.Random) -> None:
        name = chance.choice(list(schemas))
        arguments = _RIGHT[name](chance)
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3, len(arguments)))):
            place = chance.randrange(len(arguments))
            kind = str(schemas[name].arguments[place].type)
            arguments[place] = _wrong(chance, kind, arguments[place])
        fuzz.record(f"{name} {[_spelt(a) for a in arguments]}".encode())
        call = getattr(torch.ops.metro, name)
        try:
            first = call(*arguments)
        except NotImplementedError as error:  # a subclass of RuntimeError, from the dispatcher
            raise RuntimeError(str(error)) from None
        first = first if isinstance(first, tuple | list) else (first,)
        second = call(*arguments)
        second = second if isinstance(second, tuple | list) else (second,)
        for a, b in zip(first, second, strict=True):
            same = (
                a.contiguous().view(-1).view(torch.uint8),
                b.contiguous().view(-1).view(torch.uint8),
            )
            assert a.dtype == b.dtype and torch.equal(*same), f"{name}: not the same bits"

    return target


def _spelt(argument: object) -> object:
    if not isinstance(argument, torch.Tensor):
        return argument
    return f"{argument.dtype} {list(argument.shape)} {argument.stride()}"


def _tensor(chance: random.Random, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    if dtype.is_floating_point:
        value = torch.randn(shape, generator=generator, dtype=torch.float32)
        if chance.random() < 0.05 and value.numel():
            value.view(-1)[0] = chance.choice([float("nan"), float("inf"), 1e38])
        return value.to(dtype)
    return torch.randint(0, 5, shape, generator=generator).to(dtype)


def _wrong(chance: random.Random, kind: str, old: object) -> object:
    if kind == "int":
        return chance.choice(SCALARS)
    if kind == "float":
        return chance.choice(FRACTIONS)
    if kind.startswith("Optional") and chance.random() < 0.3:
        return None
    if isinstance(old, torch.Tensor):
        shape = list(old.shape)
        edit = chance.randrange(6)
        if edit == 0:
            return old.to(chance.choice(DTYPES))
        if edit == 1 and shape:
            shape[chance.randrange(len(shape))] += chance.choice((-1, 1, 2))
            return _tensor(chance, tuple(max(0, n) for n in shape), old.dtype)
        if edit == 2:
            return old.unsqueeze(0) if chance.random() < 0.5 else old.reshape(-1)
        if edit == 3 and old.dim() > 1:
            return old.transpose(0, -1)
        if edit == 4 and shape:
            return old.expand(2, *shape) if chance.random() < 0.5 else old[..., :0]
        if not old.dtype.is_floating_point:
            wide = chance.choice([-(2**31), -101, -1, 255, 2**31 - 1])
            return torch.full_like(old, 0) + torch.tensor(wide).to(old.dtype)
    shape = tuple(chance.randrange(4) for _ in range(chance.randrange(5)))
    return _tensor(chance, shape, chance.choice(DTYPES))


def _activation(chance: random.Random) -> torch.dtype:
    return chance.choice((torch.float32, torch.bfloat16))


def _gelu(c: random.Random) -> list:
    rows, width = c.randrange(6), c.randrange(1, 40)
    return [_tensor(c, (rows, width), _activation(c)), _tensor(c, (width,), torch.float32)]


def _layer_norm(c: random.Random) -> list:
    rows, width, dtype = c.randrange(6), c.randrange(1, 40), _activation(c)
    x, vector = _tensor(c, (rows, width), dtype), _tensor(c, (width,), torch.float32)
    seed = torch.tensor(c.randrange(99))
    return [x, vector, x.clone(), vector, vector, seed, c.choice((0.0, 0.3)), 1, 1e-5]


def _attention(c: random.Random) -> list:
    lengths = [c.randrange(6) for _ in range(c.randrange(1, 4))]
    heads, size = c.randrange(1, 3), c.choice((8, 16, 32, 64))
    qkv = _tensor(c, (sum(lengths), 3, heads, size), _activation(c))
    cu = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    longest = max(1, *lengths) if lengths else 1
    bias = _tensor(c, (heads, 2 * longest - 1), torch.float32)
    return [qkv, cu, bias, longest, torch.tensor(3), c.choice((0.0, 0.2)), 2]


def _vocab_head(c: random.Random) -> list:
    rows, width, vocab, dtype = (
        c.randrange(5),
        c.randrange(1, 33),
        c.randrange(5, 70),
        _activation(c),
    )
    hidden, weight = _tensor(c, (rows, width), dtype), _tensor(c, (vocab, width), dtype)
    bias, target = _tensor(c, (vocab,), torch.float32), _tensor(c, (rows,), torch.int64)
    return [hidden, weight, bias, target, torch.tensor(5), 1.0, 0]


def _rtd_head(c: random.Random) -> list:
    rows, width = c.randrange(6), c.randrange(1, 40)
    label = _tensor(c, (rows,), torch.uint8).clamp_max(1)
    return [_tensor(c, (rows, width), _activation(c)), _tensor(c, (width,), torch.float32),
            torch.zeros(1), label]  # fmt: skip


def _mask_tokens(c: random.Random) -> list:
    tokens = torch.randint(0, 50, (c.randrange(60),), generator=torch.Generator().manual_seed(1))
    return [tokens, torch.arange(5), torch.tensor(9), c.randrange(8), 4, 50, 0.8, 0.1]


def _replace_tokens(c: random.Random) -> list:
    total, count = c.randrange(1, 40), c.randrange(6)
    position = torch.arange(min(count, total))
    tokens = _tensor(c, (total,), torch.int64)
    return [tokens, position, tokens[position], _tensor(c, tuple(position.shape), torch.int64), 1]


def _pretrain_loss(c: random.Random) -> list:
    rows, total = c.randrange(6), c.randrange(9)
    part = [_tensor(c, (rows,), torch.float32), _tensor(c, (rows,), torch.uint8),
            _tensor(c, (rows,), torch.int64)]  # fmt: skip
    rtd = [_tensor(c, (total,), torch.float32), _tensor(c, (total,), torch.float32),
           _tensor(c, (total,), torch.uint8).clamp_max(1)]  # fmt: skip
    return [*part, *rtd, *part, torch.ones(3), 1.0, 50.0, 1.0]


def _gradients_of_vocab_head(c: random.Random) -> list:
    head = _vocab_head(c)
    # Written, not added to: a second call gives the same bits.
    return [*head, torch.ones(1), torch.empty_like(head[1]), False]


def _backward_of_attention(c: random.Random) -> list:
    qkv, cu, bias, longest, seed, p, draw = _attention(c)
    out = qkv[:, 0].clone()
    lse = _tensor(c, (qkv.shape[2], qkv.shape[0]), torch.float32)
    return [out.clone(), qkv, out, lse, cu, bias, longest, seed, p, draw]


def _backward_of_gelu(c: random.Random) -> list:
    x, bias = _gelu(c)
    return [x.clone(), x, bias]


_RIGHT = {
    "bias_gelu": _gelu, "bias_gelu_backward": _backward_of_gelu, "layer_norm": _layer_norm,
    "attention": _attention, "attention_backward": _backward_of_attention,
    "vocab_head": _vocab_head, "vocab_head_gradients": _gradients_of_vocab_head,
    "rtd_head": _rtd_head, "mask_tokens": _mask_tokens, "replace_tokens": _replace_tokens,
    "pretrain_loss": _pretrain_loss,
}  # fmt: skip
