"""Drawing and masking positions; putting the samples in. Integers throughout, no gradient."""

import torch
from torch import Tensor

from bench.cases.common import Contender, OpCase, seeded, torch_peers
from bench.timing import Work
from metro_ext.model import PAD_ID
from metro_ext.objective import IGNORED, mask_count
from metro_ext.ops import mask_tokens, replace_tokens

SIZES, SMALL_SIZES = (4096, 65536), (64,)
VOCAB, SPECIAL_IDS, MASK_ID = 65536, range(5), 4
FRACTION, MASK_FRACTION, RANDOM_FRACTION = 0.15, 0.8, 0.1
# tokens in; masked or corrupted tokens and one label byte out; int64 except the labels.
WORD = 8


def cases(device: str, small: bool) -> list[OpCase]:
    sizes = SMALL_SIZES if small else SIZES
    return [make(tokens) for make in (_mask, _replace) for tokens in sizes]


def _tokens(generator: torch.Generator, count: int) -> Tensor:
    return torch.randint(len(SPECIAL_IDS), VOCAB, (count,), generator=generator)


def _mask(tokens: int) -> OpCase:
    count = mask_count(tokens, FRACTION)

    def inputs(_: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {
            "tokens": _tokens(seeded(), tokens).to(device),
            "special": torch.tensor(SPECIAL_IDS, device=device),
            "seed": torch.tensor(1, device=device),
        }

    def ours(tokens: Tensor, special: Tensor, seed: Tensor) -> tuple:
        return mask_tokens(
            tokens,
            special,
            seed,
            count=count,
            vocab_size=VOCAB,
            mask_id=MASK_ID,
            mask_fraction=MASK_FRACTION,
            random_fraction=RANDOM_FRACTION,
        )

    def eager(tokens: Tensor, special: Tensor, seed: Tensor) -> tuple:
        score = torch.rand(tokens.shape, device=tokens.device)
        score = score.masked_fill(torch.isin(tokens, special), -1.0)
        position = score.topk(count).indices.sort().values
        target = tokens[position]
        kind = torch.rand(count, device=tokens.device)
        ordinary = torch.randint(len(SPECIAL_IDS), VOCAB, (count,), device=tokens.device)
        kept = torch.where(kind < MASK_FRACTION + RANDOM_FRACTION, ordinary, target)
        shown = torch.where(kind < MASK_FRACTION, MASK_ID, kept)
        return tokens.scatter(0, position, shown), position, target

    return OpCase(
        family="corruption",
        name=f"mask_tokens {tokens}",
        inputs=inputs,
        activations="tokens",
        contenders={"ours": Contender(lambda: ours), **torch_peers(eager)},
        forward=lambda _: Work(2 * WORD * (tokens + count)),
        dtypes=("int64",),
    )


def _replace(tokens: int) -> OpCase:
    count = mask_count(tokens, FRACTION)

    def inputs(_: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        generator = seeded()
        ids = _tokens(generator, tokens)
        position = torch.randperm(tokens, generator=generator)[:count].sort().values
        tensors = {
            "tokens": ids,
            "position": position,
            "target": ids[position],
            "sample": _tokens(generator, count),
        }
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def ours(tokens: Tensor, position: Tensor, target: Tensor, sample: Tensor) -> tuple:
        return replace_tokens(tokens, position, target, sample, pad_id=PAD_ID)

    def eager(tokens: Tensor, position: Tensor, target: Tensor, sample: Tensor) -> tuple:
        put = torch.where(target == IGNORED, tokens[position], sample)
        corrupted = tokens.scatter(0, position, put)
        label = (corrupted != tokens).to(torch.uint8)
        return corrupted, label.masked_fill(tokens == PAD_ID, 255)

    return OpCase(
        family="corruption",
        name=f"replace_tokens {tokens}",
        inputs=inputs,
        activations="tokens",
        contenders={"ours": Contender(lambda: ours), **torch_peers(eager)},
        forward=lambda _: Work((2 * WORD + 1) * tokens + 3 * WORD * count),
        dtypes=("int64",),
    )
