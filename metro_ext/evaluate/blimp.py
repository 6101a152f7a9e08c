"""Minimal pairs: of two sentences that differ in one point, which does the model score higher?

BLiMP (Warstadt et al., arXiv 1912.00582). Scores, each a sum over the sentence's tokens (not its
length's mean: both sentences are judged whole, as in the paper):

    rtd   log-probability that the main model finds each token original
    clm   log-probability of each token by the main model's vocabulary head, which reads it
    pll   pseudo-log-likelihood (Salazar et al., arXiv 1910.14659): each token masked in turn, by
          the network that was trained to fill masks (the auxiliary one; the main one of ``mlm``)
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from metro_ext.errors import UserError
from metro_ext.ops import rtd_head, vocab_head
from metro_ext.pretrained import Pretrained
from metro_ext.records import field, json_rows
from metro_ext.text_encoder import EncodedTexts, by_tokens

FIELDS = ("UID", "good", "bad")
Row = list[int]


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Pairs of a .jsonl file, plain or compressed: BLiMP's own fields, or those of ``FIELDS``."""
    pairs = []
    for where, record in json_rows(path):
        official = "sentence_good" in record
        names = ("UID", "sentence_good", "sentence_bad") if official else FIELDS
        values = (field(where, record, name) for name in names)
        pairs.append(dict(zip(FIELDS, values, strict=True)))
    if not pairs:
        raise UserError(f"{path}: expected pairs of sentences, found none")
    return pairs


Score = Callable[[Tensor, EncodedTexts], Tensor]  # the main model's states [T, H] -> [T]


@torch.no_grad()
def _sums(pretrained: Pretrained, rows: list[Row], score: Score) -> list[float]:
    """For each row, the sum of its tokens' scores."""
    main, length = pretrained.main, pretrained.config.model.sequence_length
    table = main.table(torch.float32)
    found: list[float] = []
    for places in by_tokens(rows):
        packed = EncodedTexts.pack([rows[place] for place in places], length)
        values = score(main(packed.tokens, packed.packing, table), packed)
        values = values.double().split(packed.lengths)
        found += [float(one[1:-1].sum()) for one in values]  # without <s> and </s>
    return found


def rtd_scores(pretrained: Pretrained, rows: list[Row]) -> list[float]:
    """Σ log P(original)."""
    head = pretrained.model.rtd_head
    assert head is not None  # `scorers` looks

    def score(hidden: Tensor, packed: EncodedTexts) -> Tensor:
        labels = torch.zeros(len(packed.tokens), dtype=torch.uint8)
        _, logit, _ = rtd_head(head.transform(hidden), head.weight, head.bias, labels)
        return F.logsigmoid(-logit)

    return _sums(pretrained, rows, score)


def clm_scores(pretrained: Pretrained, rows: list[Row]) -> list[float]:
    """Σ log P(token) by the main model's vocabulary head, nothing masked."""
    head, table = pretrained.model.main_head, pretrained.main.table(torch.float32)
    assert head is not None  # `scorers` looks

    def score(hidden: Tensor, packed: EncodedTexts) -> Tensor:
        return -vocab_head(head.transform(hidden), table.matrix, head.bias, packed.tokens).nll

    return _sums(pretrained, rows, score)


@torch.no_grad()
def pseudo_log_likelihoods(pretrained: Pretrained, rows: list[Row]) -> list[float]:
    """Σ log P(token | the others), each token masked in turn."""
    model, length = pretrained.model, pretrained.config.model.sequence_length
    encoder = model.main if model.auxiliary is None else model.auxiliary
    head = model.main_head if model.auxiliary is None else model.auxiliary_head
    assert head is not None  # every objective has one or the other
    table, mask = encoder.table(torch.float32), pretrained.tokenizer.mask_id
    masked, owner = [], []
    for place, row in enumerate(rows):
        for position in range(1, len(row) - 1):
            masked.append([*row[:position], mask, *row[position + 1 :]])
            owner.append((place, position))
    totals = [0.0] * len(rows)
    for places in by_tokens(masked):
        packed = EncodedTexts.pack([masked[i] for i in places], length)
        hidden = encoder(packed.tokens, packed.packing, table)
        where = packed.packing.cu_seqlens[:-1].long()
        where = where + torch.tensor([owner[i][1] for i in places])
        target = torch.tensor([rows[owner[i][0]][owner[i][1]] for i in places])
        nll = vocab_head(head.transform(hidden[where]), table.matrix, head.bias, target).nll
        for i, value in zip(places, nll.tolist(), strict=True):
            totals[owner[i][0]] -= value
    return totals


Scorer = Callable[[Pretrained, list[Row]], list[float]]


def scorers(pretrained: Pretrained) -> dict[str, Scorer]:
    """The scores that the run's objective has heads for."""
    model = pretrained.model
    found: dict[str, Scorer] = {"pll": pseudo_log_likelihoods}
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
