"""From what a configuration names to corpora on disk: tokenizer and shards, made once a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from metro_ext.config_schema import Config
from metro_ext.corpus import Corpus, build_corpus
from metro_ext.corpus_format import MANIFEST
from metro_ext.errors import UserError
from metro_ext.sample_text import sample_paths
from metro_ext.tokenizer import TOKENIZER_FILE, Tokenizer, train_tokenizer


@dataclass(frozen=True)
class Prepared:
    """What a run reads: the tokenizer, both corpora, and the configuration with its vocabulary."""

    tokenizer: Tokenizer
    train: Corpus
    valid: Corpus
    config: Config


def prepare(config: Config, say: Callable[[str], None]) -> Prepared:
    """Tokenizer and corpora of a run, made in its folder unless they are there.

    With no ``data.train`` the text that ships in the package is used. Each file appears only when
    it is whole, so that a killed preparation goes on where it was.

    Raises:
        UserError: a text cannot be read, or tokenizer, corpora and configuration do not match.
    """
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    train, valid = config.data.train, config.data.valid
    if not train:
        train, valid = tuple([str(path)] for path in sample_paths())
    elif not valid:
        raise UserError("data.valid must name held-out text when data.train is given")
    tokenizer = _tokenizer(config, folder, train, say)
    train_corpus = _corpus(train, tokenizer, folder / "data" / "train", say)
    valid_corpus = _corpus(valid, tokenizer, folder / "data" / "valid", say)
    wanted = config.model.vocab_size
    if wanted not in (0, tokenizer.vocab_size):
        raise UserError(
            f"model.vocab_size must be the tokenizer's {tokenizer.vocab_size} (or 0 to take it), "
            f"found {wanted}"
        )
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    return Prepared(tokenizer, train_corpus, valid_corpus, config)


def unigram_nats(corpus: Corpus) -> np.ndarray:
    """-ln p of every id under the add-one unigram model of a corpus: float64 [V].

    Special ids take no part; they are infinitely surprising.
    """
    counts = corpus.unigram_counts().astype(np.float64) + 1
    counts[list(corpus.tokenizer.special_ids)] = 0
    with np.errstate(divide="ignore"):
        return np.log(counts.sum()) - np.log(counts)


def _is_corpus(path: str) -> bool:
    return (Path(path) / MANIFEST).is_file()


def _tokenizer(
    config: Config, folder: Path, train: Sequence[str], say: Callable[[str], None]
) -> Tokenizer:
    """The named tokenizer, the run's own, the one of a given corpus, or a new one."""
    if config.data.tokenizer:
        return Tokenizer.load(config.data.tokenizer)
    own = folder / TOKENIZER_FILE
    if own.exists():
        return Tokenizer.load(own)
    if _is_corpus(train[0]):
        tokenizer = Corpus.open(train[0]).tokenizer
    else:
        say(f"training a tokenizer of {config.data.vocab_size} entries on {_names(train)}")
        tokenizer = train_tokenizer(train, config.data.vocab_size, cased=config.data.cased)
    tokenizer.save(own)
    return tokenizer


def _corpus(
    paths: Sequence[str], tokenizer: Tokenizer, own: Path, say: Callable[[str], None]
) -> Corpus:
    """The given corpus folder, or one built from text files in the run's folder."""
    if _is_corpus(paths[0]):
        if len(paths) > 1:
            raise UserError(f"expected one corpus folder, found {len(paths)}: {_names(paths)}")
        return Corpus.open(paths[0], tokenizer)
    if not own.exists():
        say(f"encoding {_names(paths)}")
        build_corpus(paths, tokenizer, own)
    return Corpus.open(own, tokenizer)


def _names(paths: Sequence[str]) -> str:
    return ", ".join(str(path) for path in paths)
