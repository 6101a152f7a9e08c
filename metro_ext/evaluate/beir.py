"""A test collection in BEIR's format (Thakur et al., arXiv 2104.08663), plain or compressed.

corpus.jsonl      {"_id": ..., "title": ..., "text": ...}, a document a line; title optional
queries.jsonl     {"_id": ..., "text": ...}
qrels/SPLIT.tsv   query-id, corpus-id, score: a first line with these names, then judgements
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from metro_ext.errors import UserError
from metro_ext.records import field, find, json_rows, tsv_rows

QRELS = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class Collection:
    """Queries and judgements in memory; the documents stay in their file.

    queries: id -> text, of the judged queries.
    relevance: query id -> document id -> grade; grades from 1 on are relevant.
    """

    corpus: Path
    qrels: Path
    queries: dict[str, str]
    relevance: dict[str, dict[str, int]]

    def documents(self) -> Iterator[tuple[str, str]]:
        """(id, title and text) of each document, from the file."""
        for where, record in json_rows(self.corpus):
            title = field(where, record, "title") if record.get("title") is not None else ""
            text = f"{title} {field(where, record, 'text')}".strip()
            yield field(where, record, "_id"), text


def read(folder: Path, split: str) -> Collection:
    """The collection of a folder.

    Raises:
        UserError: a file that is missing, a field or column that is missing, a grade that is no
            whole number, a judged query that is none, an id that comes twice; file and line are
            named.
    """
    corpus, path = find(folder, "corpus.jsonl"), find(folder, "queries.jsonl")
    qrels = find(folder / "qrels", f"{split}.tsv")
    texts: dict[str, str] = {}
    for where, record in json_rows(path):
        name = field(where, record, "_id")
        if name in texts:
            raise UserError(f"{where}: expected each _id once, found {name!r} twice")
        texts[name] = field(where, record, "text")
    relevance: dict[str, dict[str, int]] = {}
    for where, row in tsv_rows(qrels, None, list(QRELS)):
        query, document, grade = (row[name] for name in QRELS)
        if query not in texts:
            raise UserError(f"{where}: expected a query of {path}, found {query!r}")
        if document in relevance.setdefault(query, {}):
            raise UserError(f"{where}: expected one judgement of {document!r} for {query!r}")
        try:
            relevance[query][document] = int(grade)
        except ValueError:
            raise UserError(f"{where}: expected a whole number as score, found {grade!r}") from None
    if not relevance:
        raise UserError(f"{qrels}: expected judgements, found none")
    return Collection(corpus, qrels, {name: texts[name] for name in relevance}, relevance)
