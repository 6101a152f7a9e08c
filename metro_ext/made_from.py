"""What a run's own tokenizer and corpora were made from, recorded beside them.

They outlive a start of the run that failed, and the next start may name other texts or settings:
what was made for the one is not to be taken for what the other asks for.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metro_ext.atomic import atomic_write, fsync_folder, sha256_file, temporary_sibling
from metro_ext.errors import UserError
from metro_ext.text_files import find_text_files

SUFFIX = ".made_from.json"
Setting = str | int | bool


@dataclass(frozen=True)
class TextFile:
    """A text file as it is now: absolute path, size in bytes, time of its last change in ns."""

    path: str
    size: int
    changed: int

    @classmethod
    def now(cls, path: Path) -> "TextFile":
        status = path.stat()
        return cls(str(path.resolve()), status.st_size, status.st_mtime_ns)

    @functools.cached_property
    def sha256(self) -> str:
        return sha256_file(self.path)

    def record(self) -> dict[str, Setting]:
        return {**dataclasses.asdict(self), "sha256": self.sha256}

    def is_same(self, recorded: Mapping[str, Setting]) -> bool:
        """Whether it holds the text of a record: a copy, or one only touched, still does."""
        name = Path(self.path).name  # tells the format
        if (name, self.size) != (Path(str(recorded["path"])).name, recorded["size"]):
            return False
        untouched = (self.path, self.changed) == (recorded["path"], recorded["changed"])
        return untouched or self.sha256 == recorded["sha256"]


@dataclass(frozen=True)
class MadeFrom:
    """Settings by key, and texts in their order; None: they are gone, what they were is unknown."""

    settings: Mapping[str, Setting]
    texts: Sequence[TextFile] | None = ()

    def write(self, path: Path) -> None:
        document = {
            "settings": dict(self.settings),
            "texts": [text.record() for text in self.texts or ()],
        }
        with atomic_write(path, "w") as file:
            file.write(json.dumps(document, indent=1) + "\n")

    def difference(self, path: Path) -> str | None:
        """What the record at `path` has otherwise, in words; None if nothing.

        Raises:
            UserError: the record is damaged.
        """
        try:
            recorded = json.loads(path.read_bytes())
            settings, texts = recorded["settings"], recorded["texts"]
            for key in {**settings, **self.settings}:
                was, wanted = settings.get(key), self.settings.get(key)
                if was != wanted:
                    return f"{key} was {_word(was)} and is {_word(wanted)}"
            if self.texts is None:
                return None
            if len(self.texts) != len(texts):
                return f"there were {len(texts)} text files and are {len(self.texts)}"
            for text, before in zip(self.texts, texts, strict=True):
                if not text.is_same(before):
                    if text.path == before["path"]:
                        return f"{text.path} has changed"
                    return f"the text was {before['path']} and is {text.path}"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: damaged ({error}): remove it and what it is of") from error
        return None


def text_files(
    paths: Sequence[str | os.PathLike], may_be_gone: bool = False
) -> tuple[TextFile, ...] | None:
    """The files behind text files and folders; UserError as `find_text_files` has it.

    may_be_gone: None where a path is not there, instead of the error.
    """
    if may_be_gone and not all(os.path.exists(path) for path in paths):
        return None
    return tuple(TextFile.now(path) for path in find_text_files(paths))


def make_once(path: Path, made_from: MadeFrom, resuming: bool, make: Callable[[], None]) -> None:
    """Makes `path`, unless it is there and was made from the same.

    The record is written before `make` begins and after what it was of has gone, so that a process
    killed in between leaves none that is false.

    Args:
        path: a file or folder that `make` makes, whole or not at all.
        resuming: the run has checkpoints: what they were trained on is not replaced.

    Raises:
        UserError: it was made from something else, and the run is to be resumed; or nobody knows
            what it was made from, and it is not to be deleted on a guess.
    """
    record = path.with_name(path.name + SUFFIX)
    if path.exists():
        if not record.exists():
            if resuming:  # an imported run, or one of a version that kept no records
                return
            raise UserError(
                f"{path} is there already, and nothing tells what it was made from; remove it, or "
                "name another --run folder"
            )
        try:
            difference = made_from.difference(record)
        except UserError:
            if resuming:  # the checkpoint knows the texts by their checksums
                return
            raise
        if difference is None:
            return
        if resuming:
            raise UserError(
                f"{path} was made for the run that is to be resumed, but {difference}; give the "
                "same options and texts, or another --run folder"
            )
        _remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    made_from.write(record)
    make()


def _remove(path: Path) -> None:
    """In one step for every reader: half a folder must not keep its name."""
    doomed = temporary_sibling(path)
    os.rename(path, doomed)
    fsync_folder(path.parent)
    if doomed.is_dir():
        shutil.rmtree(doomed)
    else:
        with contextlib.suppress(FileNotFoundError):
            doomed.unlink()


def _word(value: Setting | None) -> str:
    return "not given" if value is None else str(value)
