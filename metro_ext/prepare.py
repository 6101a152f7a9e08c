"""From what a configuration names to corpora on disk: tokenizer and shards, made once a run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from metro_ext.atomic import sha256_file
from metro_ext.checkpoint import CHECKPOINTS, checkpoint_steps
from metro_ext.config_schema import Config
from metro_ext.corpus import Corpus
from metro_ext.corpus_build import build_corpus
from metro_ext.corpus_format import MANIFEST
from metro_ext.errors import UserError
from metro_ext.made_from import MadeFrom, make_once, text_files
from metro_ext.mixture import Mixture, split_weight
from metro_ext.sample_text import sample_paths
from metro_ext.tokenizer import TOKENIZER_FILE, Tokenizer, train_tokenizer


@dataclass(frozen=True)
class Prepared:
    """What a run reads: the tokenizer, both texts, and the configuration with its vocabulary."""

    tokenizer: Tokenizer
    train: Mixture[Corpus]
    valid: Corpus
    config: Config

    def corpora(self) -> Iterator[tuple[str, Corpus]]:
        """What the run reads, by the key that names it; a mixture's second corpus is train.1."""
        for i, corpus in enumerate(self.train.corpora):
            yield f"train.{i}" if i else "train", corpus
        yield "valid", self.valid


def prepare(config: Config, say: Callable[[str], None]) -> Prepared:
    """Tokenizer and corpora of a run, made in its folder unless they are there already.

    With no ``data.train`` the text that ships in the package is used. Each file appears only when
    it is whole, so that a killed preparation goes on where it was. What an earlier start made from
    other texts or settings is made anew, as long as the run has no checkpoint.

    Raises:
        UserError: a text cannot be read; tokenizer, corpora and configuration do not match; the run
            has checkpoints, but its files were made from other texts or settings.
    """
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    train, valid = config.data.train, config.data.valid
    if not train:
        train, valid = ((str(path),) for path in sample_paths())
    elif not valid:
        raise UserError("data.valid must name held-out text when data.train is given")
    resuming = bool(checkpoint_steps(folder / CHECKPOINTS))
    entries = [split_weight(entry) for entry in train]
    paths = [path for path, _ in entries]
    tokenizer = _tokenizer(config, folder / TOKENIZER_FILE, paths, resuming, say)
    wanted = config.model.vocab_size
    if wanted not in (0, tokenizer.vocab_size):
        raise UserError(
            f"model.vocab_size must be the tokenizer's {tokenizer.vocab_size} (or 0 to take it), "
            f"found {wanted}"
        )
    mixture = _mixture(entries, tokenizer, folder / "data", resuming, say)
    valid_corpus = _corpus(valid, tokenizer, folder / "data" / "valid", resuming, say)
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    return Prepared(tokenizer, mixture, valid_corpus, config)


def unigram_nats(mixture: Mixture[Corpus]) -> np.ndarray:
    """-ln p of every id under the add-one unigram model of a training text: float64 [V].

    Special ids take no part; they are infinitely surprising.
    """
    counts = mixture.unigram_counts() + 1
    counts[list(mixture.corpora[0].tokenizer.special_ids)] = 0
    with np.errstate(divide="ignore"):
        return np.log(counts.sum()) - np.log(counts)


def _is_corpus(path: str) -> bool:
    return (Path(path) / MANIFEST).is_file()


def _tokenizer(
    config: Config, own: Path, train: Sequence[str], resuming: bool, say: Callable[[str], None]
) -> Tokenizer:
    """The named tokenizer, the one of a given corpus, or one trained here; its file is `own`."""
    given = None
    if config.data.tokenizer:
        given = Tokenizer.load(config.data.tokenizer)
    elif _is_corpus(train[0]):
        given = Corpus.open(train[0]).tokenizer
    if given is not None:
        if not (own.is_file() and sha256_file(own) == given.sha256):
            made_from = MadeFrom({"the tokenizer's sha256": given.sha256})
            make_once(own, made_from, resuming, lambda: given.save(own))
        return given
    size, cased = config.data.vocab_size, config.data.cased

    def make() -> None:
        say(f"training a tokenizer of {size} entries on {_names(train)}")
        train_tokenizer(train, size, cased=cased).save(own)

    settings = {"data.vocab_size": size, "data.cased": cased}
    make_once(own, MadeFrom(settings, text_files(train, may_be_gone=resuming)), resuming, make)
    return Tokenizer.load(own)


def _mixture(
    entries: Sequence[tuple[str, Fraction | None]],
    tokenizer: Tokenizer,
    folder: Path,
    resuming: bool,
    say: Callable[[str], None],
) -> Mixture[Corpus]:
    """Corpora with weights or, without any, corpora by their size, or text files as one corpus."""
    paths, weights = zip(*entries, strict=True)
    weighted = [weight for weight in weights if weight is not None]
    if not weighted and not _is_corpus(paths[0]):
        return Mixture.of([_corpus(paths, tokenizer, folder / "train", resuming, say)])
    if weighted and len(weighted) < len(paths):
        path = paths[weights.index(None)]
        raise UserError(f"data.train: expected a weight for each text or for none, {path} has none")
    for weight in weighted:  # found here, before any text is encoded
        if weight < 0:
            raise UserError(f"data.train: expected weights of at least 0, found {float(weight):g}")
    if weighted and not any(weighted):
        raise UserError("data.train: the weights are all 0: give one of the texts a share")
    corpora = [
        _corpus([path], tokenizer, folder / f"train-{i}", resuming, say)
        for i, path in enumerate(paths)
    ]
    return Mixture.of(corpora, weighted or None)


def _corpus(
    paths: Sequence[str], tokenizer: Tokenizer, own: Path, resuming: bool, say: Callable
) -> Corpus:
    """The given corpus folder, or one built from text files in the run's folder."""
    if _is_corpus(paths[0]):
        if len(paths) > 1:
            raise UserError(f"expected one corpus folder, found {len(paths)}: {_names(paths)}")
        return Corpus.open(paths[0], tokenizer)

    def make() -> None:
        say(f"encoding {_names(paths)}")
        build_corpus(paths, tokenizer, own)

    settings = {"the tokenizer's sha256": tokenizer.sha256}
    make_once(own, MadeFrom(settings, text_files(paths, may_be_gone=resuming)), resuming, make)
    return Corpus.open(own, tokenizer)


def _names(paths: Sequence[str]) -> str:
    return ", ".join(str(path) for path in paths)
