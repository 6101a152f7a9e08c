"""Checkpoints that are whole or not there: checksummed, durable, no pickle.

Layout: `folder/step-00000100/{tensors.safetensors, state.json}`; of several ranks, in place of the
one file of tensors, one a rank (`metro_ext.checkpoint_parts`). A checkpoint is written under a
name that no reader takes for one, each file is synced to disk, then the folder gets its real name
in one rename. A process killed at any moment therefore leaves every earlier checkpoint as it was
and at most a leftover, which `clean_leftovers` removes at the next start.

`state.json` holds the caller's state, the checksum of every other file and a checksum of itself.
One run at a time may write to a folder: hold a `RunLock`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from metro_ext.atomic import fsync_file, fsync_folder, sha256_file
from metro_ext.checkpoint_parts import read_whole
from metro_ext.errors import UserError

CHECKPOINTS = "checkpoints"  # the folder of a run's checkpoints, in the run's folder
_FORMAT = "metro-ext checkpoint 1"  # one file of tensors; its checksum is `tensors_sha256`
_FORMAT_OF_PARTS = "metro-ext checkpoint 2"  # `files`: the checksum of each, by name
_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_UNFINISHED = ".tmp-"  # being written or being deleted
_REPLACED = ".old-"  # a checkpoint of the same step that is making way for a new one


class Checkpoint(NamedTuple):
    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    damaged: list[str]  # newer checkpoints that had to be passed over, one sentence each


class Latest(NamedTuple):
    step: int | None  # the newest whole checkpoint; None where there is none
    damaged: list[str]  # newer ones that are not whole, one sentence each


class _Damaged(Exception):
    """Why a checkpoint cannot be trusted."""


def save_checkpoint(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Writes `folder/step-…` and returns its path once it is safe on disk.

    tensors: any dtype of safetensors, any shape, any device; no two may share memory (store a tied
        tensor once). state: what JSON can hold, without NaN or infinity.

    A step that exists already is replaced. Raises UserError where the disk is full or the folder
    cannot be written; earlier checkpoints then stand untouched and nothing half-written is left.
    """
    try:
        with saving(folder, step) as unfinished:
            whole = {key: value.detach().contiguous() for key, value in tensors.items()}
            save_file(whole, unfinished / _TENSORS)
            fsync_file(unfinished / _TENSORS)
            return commit(folder, step, {_TENSORS: sha256_file(unfinished / _TENSORS)}, state)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(cannot_save(folder, step, reason)) from error


def cannot_save(folder: str | Path, step: int, reason: str) -> str:
    """The sentence for a user whose checkpoint was refused by the system."""
    return (
        f"cannot save {Path(folder) / checkpoint_name(step)}: {reason}; earlier checkpoints are "
        "untouched, so make room and run the same command to go on"
    )


@contextlib.contextmanager
def saving(folder: str | Path, step: int) -> Iterator[Path]:
    """Around the writing of a checkpoint: a new, empty folder for its files, until `commit`.

    On any exception what was written goes.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(folder.parent)
        clean_leftovers(folder)
        unfinished_folder(folder, step).mkdir()
        yield unfinished_folder(folder, step)
    except BaseException:
        with contextlib.suppress(OSError):  # the next start removes what now cannot be
            clean_leftovers(folder)
        raise


def commit(
    folder: str | Path, step: int, files: Mapping[str, str], state: Mapping[str, Any]
) -> Path:
    """Turns the folder of `saving` into the checkpoint of a step and returns its path.

    files: SHA-256 of each file in it, by name; they are on disk. state: see `save_checkpoint`.
    """
    final = Path(folder) / checkpoint_name(step)
    unfinished, replaced = unfinished_folder(folder, step), _renamed(final, _REPLACED)
    checksums: dict[str, Any] = {"format": _FORMAT_OF_PARTS, "files": dict(files)}
    if files.keys() == {_TENSORS}:
        checksums = {"format": _FORMAT, "tensors_sha256": files[_TENSORS]}
    (unfinished / _STATE).write_bytes(_encode({**checksums, "step": step, "state": dict(state)}))
    fsync_file(unfinished / _STATE)
    fsync_folder(unfinished)
    if final.exists():
        os.rename(final, replaced)
    os.rename(unfinished, final)
    fsync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def load_checkpoint(folder: str | Path, step: int | None = None, device: str = "cpu") -> Checkpoint:
    """The checkpoint of a step, or the newest whole one, with its tensors on `device`.

    Raises UserError where there is none, or where the one asked for, or every one, is damaged.
    """
    folder = Path(folder)
    damaged: list[str] = []
    if step is None:
        step, damaged = latest_valid(folder)
        if step is None and damaged:
            raise UserError(f"no whole checkpoint in {folder}: {'; '.join(damaged)}")
        if step is None:
            raise UserError(f"expected a checkpoint in {folder}, found none")
    path = folder / checkpoint_name(step)
    if not path.is_dir():
        raise UserError(f"expected the checkpoint {path}, found none of that name")
    try:
        _, state = _verified(path)
        tensors = read_tensors(folder, step, device)
    except (_Damaged, SafetensorError) as error:
        raise UserError(f"the checkpoint {path} is damaged: {error}") from None
    return Checkpoint(step, tensors, state, damaged)


def read_tensors(folder: str | Path, step: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that is known to be whole, on `device`."""
    path = Path(folder) / checkpoint_name(step)
    if (path / _TENSORS).exists():
        return load_file(path / _TENSORS, device)
    return read_whole(path, device)


def latest_valid(folder: str | Path) -> Latest:
    """The newest checkpoint whose checksums hold, and what is wrong with any newer one.

    Reads every file of the checkpoints it looks at. With no step but damaged checkpoints, a run
    must not quietly start over.
    """
    damaged: list[str] = []
    for step in checkpoint_steps(folder):
        problem = damage(folder, step)
        if not problem:
            return Latest(step, damaged)
        damaged.append(problem)
    return Latest(None, damaged)


def damage(folder: str | Path, step: int, share: slice = slice(None)) -> str:
    """What is wrong with a checkpoint, in one sentence that names it; empty: nothing is.

    share: which of its files of tensors to read; ranks that check a large one share them.
    """
    try:
        _verified(Path(folder) / checkpoint_name(step), share)
    except _Damaged as error:
        return f"{checkpoint_name(step)}: {error}"
    return ""


def read_state(folder: str | Path, step: int) -> dict[str, Any]:
    """The caller's state of a checkpoint; its files of tensors are not looked at.

    Raises UserError where it is damaged.
    """
    path = Path(folder) / checkpoint_name(step)
    try:
        return _verified(path, slice(0))[1]
    except _Damaged as error:
        raise UserError(f"the checkpoint {path} is damaged: {error}") from None


def checkpoint_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def unfinished_folder(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is while it is being written."""
    return _renamed(Path(folder) / checkpoint_name(step), _UNFINISHED)


def checkpoint_steps(folder: str | Path) -> list[int]:
    """Steps of the checkpoints in a folder, newest first, whole or not."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in folder.iterdir())
    steps = (
        int(match[1]) for match in found if match and match[0] == checkpoint_name(int(match[1]))
    )
    return sorted(steps, reverse=True)


def prune(folder: str | Path, keep: int, whole: int | None = None) -> list[int]:
    """Deletes all but the `keep` newest checkpoints and returns the steps deleted.

    Damaged checkpoints do not count as kept ones to fall back on: where none of the newest is
    whole, the newest whole one among the older stays.

    whole: a step that is known to be whole, having just been saved: then none is read.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, found {keep}")
    folder = Path(folder)
    steps = checkpoint_steps(folder)
    doomed = steps[keep:]
    if doomed:
        whole = latest_valid(folder).step if whole is None else whole
        doomed = [] if whole is None else [step for step in doomed if step != whole]
    for step in doomed:
        path = folder / checkpoint_name(step)
        unfinished = _renamed(path, _UNFINISHED)
        shutil.rmtree(unfinished, ignore_errors=True)
        os.rename(path, unfinished)  # a kill halfway must not leave half a checkpoint
        shutil.rmtree(unfinished, ignore_errors=True)
    return doomed


def clean_leftovers(folder: str | Path) -> list[str]:
    """Removes what a killed process left in the folder; returns the names of what it removed.

    A checkpoint that was making way for a new one of the same step, which then never came, gets
    its name back. Call it at the start of a run, under the run's lock.
    """
    removed: list[str] = []
    folder = Path(folder)
    if not folder.is_dir():
        return removed
    for entry in sorted(folder.iterdir()):
        if re.fullmatch(re.escape(_REPLACED) + r"step-\d{8,}", entry.name):
            final = folder / entry.name.removeprefix(_REPLACED)
            if not final.exists():
                os.rename(entry, final)
                continue
        elif not re.fullmatch(re.escape(_UNFINISHED) + r"step-\d{8,}", entry.name):
            continue
        shutil.rmtree(entry)
        removed.append(entry.name)
    return removed


class RunLock:
    """Context manager: this process alone may write to a run's folder.

    The kernel holds the lock (flock on `run.lock`) and drops it when the process ends, however it
    ends, so that there is no stale lock. The file itself stays: removing it would let two
    processes lock two files of one name. Raises UserError where another run holds it.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._path = Path(run_dir) / "run.lock"
        self._file: Any = None

    def __enter__(self) -> RunLock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self._path, "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"expected a writable run folder, but {self._path}: {error.strerror}"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(20).strip()
            file.close()
            raise UserError(
                f"the run folder {self._path.parent} is in use by process {owner or '?'}; "
                "wait for it to end, or name another folder with --run"
            ) from None
        except OSError as error:
            file.close()
            raise UserError(f"cannot lock {self._path}: {error.strerror}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _renamed(path: Path, prefix: str) -> Path:
    return path.with_name(prefix + path.name)


def _encode(document: Mapping[str, Any]) -> bytes:
    """The one spelling of a document, its own checksum included: any changed byte is found."""

    def spell(value: Mapping[str, Any]) -> bytes:
        return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    content = {key: value for key, value in document.items() if key != "sha256"}
    return spell({**content, "sha256": hashlib.sha256(spell(content)).hexdigest()})


def _verified(path: Path, share: slice = slice(None)) -> tuple[dict[str, str], dict[str, Any]]:
    """(checksum by file, the caller's state); _Damaged unless state.json is exactly what was saved.

    share: the files whose checksums must hold, too.
    """
    try:
        data = (path / _STATE).read_bytes()
        document = json.loads(data)
        if not isinstance(document, dict) or _encode(document) != data:
            raise _Damaged(f"the checksum of {_STATE} does not hold")
        files = _files(document)
        if document["step"] != int(path.name.removeprefix("step-")):
            raise _Damaged(f"{_STATE} is that of step {document['step']}")
        for name, checksum in sorted(files.items())[share]:
            if sha256_file(path / name) != checksum:
                raise _Damaged(f"the checksum of {name} does not hold")
    except OSError as error:
        raise _Damaged(f"{Path(error.filename or path).name}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise _Damaged(f"{_STATE} is not what was saved") from None
    return files, document["state"]


def _files(document: Mapping[str, Any]) -> dict[str, str]:
    """The checksum of each file of tensors, by name; _Damaged for what no save writes."""
    checksums = {_FORMAT: "tensors_sha256", _FORMAT_OF_PARTS: "files"}
    key = checksums.get(str(document.get("format")))
    if key is None:
        raise _Damaged(
            f"expected '{_FORMAT}' or '{_FORMAT_OF_PARTS}', found '{document.get('format')}'"
        )
    if document.keys() != {"format", "step", key, "state", "sha256"}:
        raise _Damaged(f"the keys of {_STATE} are not those of a checkpoint")
    files = {_TENSORS: document[key]} if key == "tensors_sha256" else document[key]
    if not isinstance(files, dict) or any(name != Path(name).name for name in files):
        raise _Damaged(f"the files named in {_STATE} are not those of a checkpoint")
    return files
