"""Retrieval by sentence vectors, scored as BEIR scores it: nDCG@10, recall, MRR@10.

Documents are read, encoded and compared in blocks, and each query keeps its best: memory does not
grow with the corpus.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from metro_ext.errors import UserError
from metro_ext.evaluate.beir import Collection
from metro_ext.text_encoder import TextEncoder

DOCUMENTS_PER_BLOCK = 2048
QUERIES_PER_BLOCK = 1024
DEPTH = 100  # documents kept for each query
Ranking = list[tuple[str, float]]


def evaluate(
    texts: TextEncoder, collection: Collection, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """`measures` of the collection's queries, by the cosine of sentence vectors.

    Judged documents that the corpus lacks count as not found; ``judged_missing`` is their number.

    Raises:
        UserError: the corpus is empty, or holds none of the judged documents.
    """
    judged = {name for grades in collection.relevance.values() for name in grades}
    missing = set(judged)

    def documents() -> Iterator[tuple[str, str]]:
        for name, text in collection.documents():
            missing.discard(name)
            yield name, text

    found = search(texts, collection.queries, documents(), dtype)
    if not found.documents:
        raise UserError(f"{collection.corpus}: expected documents, found none")
    if missing == judged:
        raise UserError(
            f"{collection.qrels}: expected documents of {collection.corpus}, found none of them "
            f"there ({min(judged)!r}, for one)"
        )
    try:
        scores = measures(collection.relevance, found.rankings())
    except UserError as error:
        raise UserError(f"{collection.corpus}: {error}") from None
    return scores | ({"judged_missing": float(len(missing))} if missing else {})


def measures(
    relevance: dict[str, dict[str, int]], rankings: dict[str, Ranking]
) -> dict[str, float]:
    """The means over all judged queries of pytrec_eval's figures and of BEIR's MRR.

    With the grades g (those below 0 count as 0) of a query's ranking from the best document on:
    nDCG@10 = Σ g_i / log2(i + 1) over the first 10, divided by the same sum of the best possible
    ranking; recall@k = relevant documents (grade above 0) among the first k, of all relevant ones;
    MRR@10 = 1 / place of the first relevant document, 0 beyond 10. Equal scores are ordered by
    falling document id, as trec_eval orders them. A document whose id is the query's is left out,
    as in BEIR. A query without relevant documents counts as 0.
    """
    totals = {"ndcg@10": 0.0, "recall@10": 0.0, "recall@100": 0.0, "mrr@10": 0.0}
    for query, grades in relevance.items():
        own = [(score, name) for name, score in rankings.get(query, []) if name != query]
        got = [max(0, grades.get(name, 0)) for _, name in sorted(own, reverse=True)]
        best = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
        if not best:
            continue
        totals["ndcg@10"] += _gain(got[:10]) / _gain(best[:10])
        for depth in (10, 100):
            totals[f"recall@{depth}"] += sum(grade > 0 for grade in got[:depth]) / len(best)
        first = next((place for place, grade in enumerate(got[:10], start=1) if grade > 0), None)
        totals["mrr@10"] += 1 / first if first else 0.0
    return {name: total / len(relevance) for name, total in totals.items()}


def _gain(grades: list[int]) -> float:
    return sum(grade / math.log2(place + 1) for place, grade in enumerate(grades, start=1))


class Best:
    """The best documents of each query so far.

    One more than ``DEPTH`` is kept, since a document may have the query's own id.
    """

    def __init__(self, queries: list[str], vectors: Tensor):
        self.queries, self.vectors = queries, vectors
        self.scores = torch.empty(len(queries), 0)
        self.places = torch.empty(len(queries), 0, dtype=torch.long)
        self.names: dict[int, str] = {}  # of the documents that some query keeps
        self.documents = 0

    def add(self, names: list[str], vectors: Tensor) -> None:
        """Documents with their vectors, float32 [documents, H]."""
        places = torch.arange(self.documents, self.documents + len(names))
        kept = []
        for block in range(0, len(self.queries), QUERIES_PER_BLOCK):
            rows = slice(block, block + QUERIES_PER_BLOCK)
            new = self.vectors[rows] @ vectors.T
            scores = torch.cat([self.scores[rows], new], 1)
            all_places = torch.cat([self.places[rows], places.expand(len(new), -1)], 1)
            top = scores.topk(min(DEPTH + 1, scores.shape[1]), dim=1)
            kept.append((top.values, all_places.gather(1, top.indices)))
        self.scores, self.places = (torch.cat(parts) for parts in zip(*kept, strict=True))
        candidates = self.names | dict(zip(places.tolist(), names, strict=True))
        self.names = {place: candidates[place] for place in self.places.unique().tolist()}
        self.documents += len(names)

    def rankings(self) -> dict[str, Ranking]:
        """Query id -> (document id, cosine), the best first."""
        found = {}
        rows = zip(self.queries, self.places.tolist(), self.scores.tolist(), strict=True)
        for query, places, scores in rows:
            names = [self.names[place] for place in places]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"expected each document's _id once, found {twice!r} twice")
            found[query] = list(zip(names, scores, strict=True))
        return found


def search(
    texts: TextEncoder,
    queries: dict[str, str],
    documents: Iterable[tuple[str, str]],
    dtype: torch.dtype = torch.float32,
) -> Best:
    """The documents of the highest cosine with each query.

    Args:
        queries: id -> text.
        documents: (id, text), read once and in order.
        dtype: of the encoder's matrix products.
    """
    best = Best(list(queries), texts.embed(list(queries.values()), dtype))
    remaining = iter(documents)
    while block := list(islice(remaining, DOCUMENTS_PER_BLOCK)):
        names, bodies = zip(*block, strict=True)
        best.add(list(names), texts.embed(bodies, dtype))
    return best
