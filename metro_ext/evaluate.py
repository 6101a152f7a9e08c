"""Zero-shot evaluation: ``python -m metro_ext.evaluate blimp RUN --data blimp.jsonl.xz``.

BLiMP (Warstadt et al., arXiv 1912.00582): of two sentences that differ in one point, does the model
score the acceptable one higher? Scores, each a sum over the sentence's tokens (not its length's
mean: both sentences are judged whole, as in the paper):

    rtd   log-probability that the main model finds each token original
    clm   log-probability of each token by the main model's vocabulary head, which reads it
    pll   pseudo-log-likelihood (Salazar et al., arXiv 1910.14659): each token masked in turn, by
          the network that was trained to fill masks (the auxiliary one; the main one of ``mlm``)
"""

import argparse
import json
import lzma
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from metro_ext.atomic import atomic_write
from metro_ext.command_line import run
from metro_ext.errors import UserError
from metro_ext.ops import rtd_head, vocab_head
from metro_ext.pretrained import EncodedTexts, Pretrained, load

TOKENS_PER_BATCH = 8192
FIELDS = ("UID", "good", "bad")
Row = list[int]


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Pairs of a .jsonl file, plain or .xz, with BLiMP's fields or those of ``FIELDS``."""
    try:
        return _read_pairs(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 ({error})") from None
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path}: the compressed file is damaged or cut short ({error})") from None


def _read_pairs(path: Path) -> list[dict[str, str]]:
    opener = lzma.open if path.suffix == ".xz" else open
    pairs = []
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                record.setdefault("good", record.get("sentence_good"))
                record.setdefault("bad", record.get("sentence_bad"))
            except (ValueError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{path}: line {number}: expected a JSON object ({error})"
                ) from None
            for name in FIELDS:
                if not isinstance(record.get(name), str):
                    raise UserError(
                        f"{path}: line {number}: expected text in field {name!r}, "
                        f"found {record.get(name)!r}"
                    )
            pairs.append(record)
    if not pairs:
        raise UserError(f"{path}: expected pairs of sentences, found none")
    return pairs


def batches(rows: Sequence[Row], limit: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Places of rows, in order, whose tokens add up to at most ``limit`` (or one longer row)."""
    waiting: list[int] = []
    size = 0
    for place, row in enumerate(rows):
        if waiting and size + len(row) > limit:
            yield waiting
            waiting, size = [], 0
        waiting.append(place)
        size += len(row)
    if waiting:
        yield waiting


def _sums(rows: list[Row], score: Callable[[EncodedTexts], Tensor], length: int) -> list[float]:
    """For each row, the sum of its tokens' scores; ``score``: packed rows -> [T]."""
    found: list[float] = []
    for places in batches(rows):
        packed = EncodedTexts.pack([rows[place] for place in places], length)
        values = score(packed).double().split(packed.lengths)
        found += [float(one[1:-1].sum()) for one in values]  # without <s> and </s>
    return found


@torch.no_grad()
def rtd_scores(pretrained: Pretrained, rows: list[Row]) -> list[float]:
    """Σ log P(original)."""
    model = pretrained.model
    table, head = model.main.table(torch.float32), model.rtd_head

    def score(packed: EncodedTexts) -> Tensor:
        hidden = head.transform(model.main(packed.tokens, packed.packing, table))
        labels = torch.zeros(len(packed.tokens), dtype=torch.uint8)
        _, logit, _ = rtd_head(hidden, head.weight, head.bias, labels)
        return F.logsigmoid(-logit)

    return _sums(rows, score, pretrained.config.model.sequence_length)


@torch.no_grad()
def clm_scores(pretrained: Pretrained, rows: list[Row]) -> list[float]:
    """Σ log P(token) by the main model's vocabulary head, nothing masked."""
    model = pretrained.model
    table, head = model.main.table(torch.float32), model.main_head

    def score(packed: EncodedTexts) -> Tensor:
        hidden = head.transform(model.main(packed.tokens, packed.packing, table))
        return -vocab_head(hidden, table.matrix, head.bias, packed.tokens).nll

    return _sums(rows, score, pretrained.config.model.sequence_length)


@torch.no_grad()
def pseudo_log_likelihoods(pretrained: Pretrained, rows: list[Row]) -> list[float]:
    """Σ log P(token | the others), each token masked in turn."""
    model, length = pretrained.model, pretrained.config.model.sequence_length
    encoder = model.main if model.auxiliary is None else model.auxiliary
    head = model.main_head if model.auxiliary is None else model.auxiliary_head
    table, mask = encoder.table(torch.float32), pretrained.tokenizer.mask_id
    masked, owner = [], []
    for place, row in enumerate(rows):
        for position in range(1, len(row) - 1):
            masked.append([*row[:position], mask, *row[position + 1 :]])
            owner.append((place, position))
    totals = [0.0] * len(rows)
    for places in batches(masked):
        packed = EncodedTexts.pack([masked[i] for i in places], length)
        hidden = encoder(packed.tokens, packed.packing, table)
        where = packed.packing.cu_seqlens[:-1].long()
        where = where + torch.tensor([owner[i][1] for i in places])
        target = torch.tensor([rows[owner[i][0]][owner[i][1]] for i in places])
        nll = vocab_head(head.transform(hidden[where]), table.matrix, head.bias, target).nll
        for i, value in zip(places, nll.tolist(), strict=True):
            totals[owner[i][0]] -= value
    return totals


def scorers(pretrained: Pretrained) -> dict[str, Callable[[Pretrained, list[Row]], list[float]]]:
    """The scores that the run's objective has heads for."""
    model, found = pretrained.model, {"pll": pseudo_log_likelihoods}
    if model.rtd_head is not None:
        found["rtd"] = rtd_scores
    if model.main_head is not None and model.auxiliary is not None:
        found["clm"] = clm_scores
    return found


def blimp(
    pretrained: Pretrained, pairs: list[dict[str, str]], limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Accuracy of each score on each set, and ``overall``, the mean over the sets; ties count half.

    limit: the first so many pairs of each set.
    """
    sets: dict[str, list[dict[str, str]]] = defaultdict(list)
    for pair in pairs:
        if limit is None or len(sets[pair["UID"]]) < limit:
            sets[pair["UID"]].append(pair)
    kept = [pair for members in sets.values() for pair in members]
    most = pretrained.config.model.sequence_length - 2

    def rows(key: str) -> list[Row]:
        tokenizer = pretrained.tokenizer
        encoded = tokenizer.encode_batch([pair[key] for pair in kept])
        return [[tokenizer.bos_id, *ids[:most], tokenizer.eos_id] for ids in encoded]

    good, bad = rows("good"), rows("bad")
    result: dict[str, dict[str, float]] = {}
    for name, score in scorers(pretrained).items():
        wins = iter(
            (g > b) + 0.5 * (g == b)
            for g, b in zip(score(pretrained, good), score(pretrained, bad), strict=True)
        )
        per_set = {
            uid: sum(next(wins) for _ in members) / len(members) for uid, members in sets.items()
        }
        result[name] = per_set | {"overall": sum(per_set.values()) / len(per_set)}
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=("blimp",))
    parser.add_argument("run", metavar="RUN", help="folder of a pretraining run")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl[.xz]")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N pairs of each set")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    if not options.data.is_file():
        raise UserError(f"{options.data}: there is no such file: check --data")
    result = blimp(load(options.run), read_pairs(options.data), options.limit)
    names = list(result)
    print(f"{'set':<58}" + "".join(f"{name:>8}" for name in names))
    for uid in result[names[0]]:
        print(f"{uid:<58}" + "".join(f"{100 * result[name][uid]:8.1f}" for name in names))
    if options.output:
        with atomic_write(options.output, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
