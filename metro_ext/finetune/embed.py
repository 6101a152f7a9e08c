"""A contrastive fine-tune on pairs, to an encoder of sentences that sentence-transformers loads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metro_ext import mpnet
from metro_ext.errors import UserError
from metro_ext.evaluate import beir, retrieval
from metro_ext.finetune import metrics, pairs
from metro_ext.finetune.heads import checked_loss, copy_of_main
from metro_ext.finetune.job import Job, Result, Scores
from metro_ext.finetune.loop import Settings, defaults, train
from metro_ext.model import Packing
from metro_ext.pretrained import Pretrained
from metro_ext.records import find
from metro_ext.sentence_files import write_sentence_files
from metro_ext.text_encoder import TextEncoder, sentence_vectors

TEMPERATURE = 0.05  # as in SimCSE (Gao et al., arXiv 2104.08821)


class SentenceModel(nn.Module):
    """The mean of the hidden states at unit length, trained by InfoNCE.

    Args:
        pretrained: its main encoder is copied, so that several seeds start alike.
        temperature: by which cosines are divided.
    """

    def __init__(self, pretrained: Pretrained, temperature: float):
        super().__init__()
        self.encoder = copy_of_main(pretrained)
        self.temperature = temperature

    def loss(
        self,
        tokens: Tensor,
        packing: Packing,
        labels: list[tuple[int, ...]],
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> Tensor:
        """`info_nce` of the packed texts' vectors.

        labels: for each example the numbers of its texts, of which equal ones have equal numbers.
        generator: not used, as there is no head.
        """
        hidden = self.encoder(tokens, packing, self.encoder.table(dtype))
        vectors = sentence_vectors(hidden, packing)
        return checked_loss(info_nce(vectors, labels, self.temperature))


def info_nce(vectors: Tensor, examples: list[tuple[int, ...]], temperature: float) -> Tensor:
    """Mean of -log softmax(cosines / temperature)[own positive] over the examples.

    The candidates of every anchor are all positives and all hard negatives of the batch (van den
    Oord et al., arXiv 1807.03748; Henderson et al., arXiv 1705.00652). A candidate whose text is
    the anchor's own, or that of its positive, is no negative and is left out.

    Args:
        vectors: float32 [sum of the examples' texts, H], of unit length, example after example:
            anchor, positive and perhaps a negative.
        examples: the numbers of these texts.
    """
    starts = [0]
    for texts in examples:
        starts.append(starts[-1] + len(texts))
    positives = [start + 1 for start in starts[:-1]]
    negatives = [start + 2 for start, texts in zip(starts, examples, strict=False) if texts[2:]]
    flat = [text for texts in examples for text in texts]
    device = vectors.device
    candidates = torch.tensor(positives + negatives, device=device)
    cosines = vectors[torch.tensor(starts[:-1], device=device)] @ vectors[candidates].T
    candidate = torch.tensor([flat[i] for i in positives + negatives], device=device)
    anchor, positive = (torch.tensor([e[i] for e in examples], device=device) for i in (0, 1))
    same = (candidate == anchor[:, None]) | (candidate == positive[:, None])
    same &= ~torch.eye(*same.shape, dtype=torch.bool, device=device)
    logits = (cosines / temperature).masked_fill(same, float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(examples), device=device))


def numbered(all_pairs: Sequence[pairs.Pair]) -> list[tuple[int, ...]]:
    """The texts of each pair as numbers; equal texts have equal ones."""
    numbers: dict[str, int] = {}
    return [
        tuple(numbers.setdefault(text, len(numbers)) for text in pair if text is not None)
        for pair in all_pairs
    ]


@dataclass(frozen=True)
class Judges:
    """What a data folder has to score sentence vectors by: ``dev.tsv``, a collection, or both."""

    scored: list[pairs.ScoredPair] | None
    collection: beir.Collection | None

    @classmethod
    def of(cls, folder: Path) -> "Judges":
        scored = pairs.read_scored(find(folder, "dev.tsv")) if _has(folder, "dev.tsv") else None
        collection = beir.read(folder, "dev") if _has(folder, "corpus.jsonl") else None
        if scored is None and collection is None:
            raise UserError(
                f"{folder}: expected dev.tsv (columns sentence1, sentence2, score), or "
                "corpus.jsonl, queries.jsonl and qrels/dev.tsv, found neither"
            )
        return cls(scored, collection)

    def scores(self, texts: TextEncoder) -> Scores:
        """Spearman's (first) and Pearson's correlation of cosines; nDCG and the like."""
        found: Scores = {}
        if self.scored:
            one = texts.embed([pair.first for pair in self.scored])
            two = texts.embed([pair.second for pair in self.scored])
            cosines = (one * two).sum(1).tolist()
            both = metrics.correlations([pair.score for pair in self.scored], cosines)
            found["dev.tsv"] = {name: both[name] for name in ("spearman", "pearson")}
        if self.collection:
            found["qrels/dev.tsv"] = retrieval.evaluate(texts, self.collection)
        return found


def _has(folder: Path, name: str) -> bool:
    try:
        return find(folder, name).is_file()
    except UserError:
        return False


@dataclass(frozen=True)
class Embed:
    """The fine-tune on pairs as a `metro_ext.finetune.job.Kind`."""

    name: str = "embed"
    temperature: float = TEMPERATURE
    tests_reason = "embed has no test set to predict: leave out --submission"

    def settings(self, hidden: int) -> Settings:
        """One epoch over batches of 64: every other pair of a batch gives negatives."""
        return replace(defaults(self.name, False, hidden), epochs=1, batch=64)

    def finetune(self, job: Job, seed: int) -> Result:
        train_pairs = pairs.read_pairs(pairs.find_pairs(job.data))[: job.limit]
        judges = Judges.of(job.data)
        texts = job.pretrained.texts
        rows = [texts.rows([text for text in p if text is not None]) for p in train_pairs]
        model = SentenceModel(job.pretrained, self.temperature).to(job.device)
        train(model, rows, numbered(train_pairs), job.settings, seed)
        return Result(model, judges.scores(TextEncoder(model.encoder.eval(), texts.tokenizer)))

    def write(self, job: Job, chosen: Result, out: Path) -> list[Path]:
        """``MPNetModel`` and what sentence-transformers needs to pool its states."""
        encoder = chosen.model.encoder
        mpnet.write_encoder(out, encoder, job.pretrained.tokenizer)
        write_sentence_files(out, encoder.config.hidden, encoder.config.sequence_length)
        return []

    def load_tests(self, data: Path) -> NoReturn:
        raise UserError(self.tests_reason)

    def submit(self, job: Job, chosen: Result, tests: Any, out: Path) -> NoReturn:
        raise UserError(self.tests_reason)
