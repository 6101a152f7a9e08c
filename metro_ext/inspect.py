"""What a trained model thinks of a sentence: ``python -m metro_ext.inspect RUN "some sentence"``.

For each ``[MASK]``, the language model's best guesses; for every token, the main model's
probability that it was replaced. In training the main model reads no masks but what the auxiliary
one fills in: so it reads the best guess here.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from metro_ext.command_line import at_least, run
from metro_ext.errors import UserError
from metro_ext.ops import rtd_head
from metro_ext.pretrained import Pretrained, load

BAR_WIDTH = 20


@dataclass(frozen=True)
class Inspection:
    """pieces: the sentence's tokens; replaced: probability of each to be a replacement (None
    without an RTD head), for a [MASK] that of its best guess; guesses: for each [MASK], by its
    index, (piece, probability) pairs; left_out: tokens beyond the model's longest sequence."""

    pieces: list[str]
    replaced: list[float] | None
    guesses: dict[int, list[tuple[str, float]]]
    left_out: int = 0


@torch.no_grad()
def inspect(pretrained: Pretrained, sentence: str, count: int = 5) -> Inspection:
    """Runs both networks on one sentence, in which "[MASK]" stands for a hidden token.

    Args:
        count: guesses for each [MASK].

    Raises:
        UserError: a sentence without tokens, or fewer guesses than one.
    """
    if count < 1:
        raise UserError(f"expected at least 1 guess, found {count}")
    model, tokenizer = pretrained.model, pretrained.tokenizer
    packed = pretrained.encode(sentence, allow_mask=True)
    ids = packed.tokens.tolist()
    if len(ids) == 2:
        raise UserError("expected a sentence with at least one token, found none")
    masks = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
    guesses, filled = {}, packed.tokens.clone()
    encoder = model.auxiliary or model.main
    head = model.auxiliary_head or model.main_head
    if masks:
        assert head is not None  # an objective without an auxiliary model has a main head
        table = encoder.table(torch.float32)
        hidden = head.transform(encoder(packed.tokens, packed.packing, table)[masks])
        logits = F.linear(hidden, encoder.embeddings.token, head.bias)
        logits[:, list(tokenizer.special_ids)] = -torch.inf
        best = logits.softmax(-1).topk(min(count, tokenizer.vocab_size - 5))
        filled[masks] = best.indices[:, 0]
        for row, index in enumerate(masks):
            pieces = tokenizer.pieces(best.indices[row].tolist())
            guesses[index - 1] = list(zip(pieces, best.values[row].tolist(), strict=True))
    replaced = None
    if model.rtd_head is not None:
        table = model.main.table(torch.float32)
        hidden = model.rtd_head.transform(model.main(filled, packed.packing, table))
        labels = torch.zeros(len(ids), dtype=torch.uint8)
        _, logit, _ = rtd_head(hidden, model.rtd_head.weight, model.rtd_head.bias, labels)
        replaced = logit.sigmoid().tolist()[1:-1]
    left_out = len(tokenizer.encode(sentence, allow_mask=True)) - len(ids[1:-1])
    return Inspection(tokenizer.pieces(ids[1:-1]), replaced, guesses, left_out)


def render(result: Inspection) -> str:
    """The inspection as lines of text."""
    lines = []
    width = max(len(piece) for piece in result.pieces)
    for index, piece in enumerate(result.pieces):
        line = f"{piece:<{width}}"
        if result.replaced is not None:
            p = result.replaced[index]
            line += f"  replaced {p:6.1%}  {'█' * round(p * BAR_WIDTH):<{BAR_WIDTH}}"
        if index in result.guesses:
            guessed = ", ".join(f"{word} {p:.1%}" for word, p in result.guesses[index])
            line += f"  guesses: {guessed}"
        lines.append(line.rstrip())
    if result.guesses and result.replaced is not None:
        lines.append("(In place of [MASK] the main model read the first guess.)")
    if result.left_out:
        lines.append(f"({result.left_out} tokens more than the model can read were left out.)")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.inspect",
        description="Each token's probability of being replaced, and guesses for [MASK].",
    )
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("sentence", help='text; "[MASK]" stands for a hidden token')
    parser.add_argument("--guesses", type=at_least(1), default=5, help="guesses for each [MASK]")
    arguments = parser.parse_args(argv)
    print(render(inspect(load(arguments.run), arguments.sentence, arguments.guesses)))


if __name__ == "__main__":
    run(main)
