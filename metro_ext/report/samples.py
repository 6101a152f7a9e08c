"""Corrupted held-out text, and what the main model says of every token of it."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from metro_ext.batches import EvaluationSource
from metro_ext.corpus import Corpus
from metro_ext.corpus_format import MANIFEST
from metro_ext.errors import UserError
from metro_ext.held_out import pack
from metro_ext.objective import Objective
from metro_ext.pretrained import Pretrained, load

LONGEST = (
    160  # tokens of a passage that are shown: a page long enough to judge, short enough to read
)
SHORTEST = 16  # shorter sequences (the rest of a document, cut by a window) are passed over
THRESHOLD = 0.5  # of the probability above which the main model says "replaced"


@dataclass(frozen=True)
class Token:
    """piece: what the main model read; original: what stood there (None: the same); masked:
    whether it was hidden from the auxiliary model; probability: of being replaced, as the main
    model sees it."""

    piece: str
    original: str | None
    masked: bool
    probability: float

    @property
    def outcome(self) -> str:
        """ "kept", "alarm" (kept, but said to be replaced), "found" or "missed" (replaced)."""
        said = self.probability >= THRESHOLD
        if self.original is None:
            return "alarm" if said else "kept"
        return "found" if said else "missed"


@dataclass(frozen=True)
class Samples:
    """passages: texts as the main model reads them; step: of the checkpoint that was asked."""

    passages: list[list[Token]]
    step: int


def samples(run: Path, count: int) -> Samples:
    """The first sequences of a run's held-out corpus, corrupted as in its evaluation.

    Args:
        count: passages at most.

    Raises:
        UserError: no whole checkpoint, an objective without RTD, or no held-out corpus.
    """
    pretrained = load(run)
    config = pretrained.config
    if pretrained.model.rtd_head is None:
        raise UserError(
            f"the objective {config.objective.name} detects no replaced tokens: no verdicts to show"
        )
    corpus = Corpus.open(_held_out(run, config.data.valid), pretrained.tokenizer)
    length = config.model.sequence_length
    windows = max(1, min(2 * count, len(corpus) // length))
    batch = EvaluationSource(corpus, windows * length, length).batch(0)
    special = torch.tensor(pretrained.tokenizer.special_ids)
    objective = Objective(
        config.objective, special, pretrained.tokenizer.mask_id, dtype=torch.float32
    )
    objective.set_step(pretrained.step, config.run.steps)
    tokens, packing = pack(batch, torch.device("cpu"))
    with torch.no_grad():
        out = objective(pretrained.model, tokens, packing)
    assert out.corrupted is not None and out.label is not None and out.rtd_logit is not None
    masked = set(out.position[out.target >= 0].tolist())
    borders = batch.cu_seqlens.tolist()
    read = (tokens, out.corrupted, out.label, out.rtd_logit.sigmoid())
    passages: list[list[Token]] = []
    for start, end in itertools.pairwise(borders):
        inside = range(start + 1, min(end - 1, start + 1 + LONGEST))  # without <s> and </s>
        if len(inside) >= SHORTEST and len(passages) < count and out.label[inside[0]] <= 1:
            passages.append(_passage(pretrained, inside, masked, *read))
    if not passages:
        raise UserError(f"no passage of {SHORTEST} tokens among the first held-out ones")
    return Samples(passages, pretrained.step)


def _passage(
    pretrained: Pretrained,
    inside: range,
    masked: set[int],
    tokens: torch.Tensor,
    corrupted: torch.Tensor,
    label: torch.Tensor,
    probability: torch.Tensor,
) -> list[Token]:
    part = slice(inside.start, inside.stop)
    read = pretrained.tokenizer.pieces(corrupted[part].tolist())
    originals = pretrained.tokenizer.pieces(tokens[part].tolist())
    return [
        Token(
            read[row],
            originals[row] if label[place] == 1 else None,
            place in masked,
            float(probability[place]),
        )
        for row, place in enumerate(inside)
    ]


def _held_out(run: Path, valid: tuple[str, ...]) -> Path:
    """The held-out corpus as `metro_ext.prepare` has it: a given one, or the run's own."""
    if valid and (Path(valid[0]) / MANIFEST).is_file():
        return Path(valid[0])
    return run / "data" / "valid"
