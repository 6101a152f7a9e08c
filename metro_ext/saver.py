"""Writes the checkpoints of a run, all its ranks together, and beside the training where asked.

`stage` copies what training will change, `write` hands the copies to a thread. The thread has
connections of its own to those of the other ranks: each writes its part, rank 0 alone names the
checkpoint whole, and a rank that fails makes all fail. One save is in flight at most.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metro_ext import checkpoint
from metro_ext.atomic import sha256_file
from metro_ext.checkpoint_parts import part_of, read_into, write_parts
from metro_ext.distributed import AgreedError, World
from metro_ext.errors import UserError

_MOST_STEPS = 100  # checkpoints that a resume looks at, newest first


class Saver:
    """The checkpoints of a run; a context manager that waits for the save in flight.

    Args:
        folder: of the checkpoints; the same for all ranks, who must all do what each does.
        keep: the newest ones that stay.
        background: write in a thread, from copies.
        timeout: seconds to wait for another rank.
    """

    def __init__(self, folder: Path, world: World, keep: int, background: bool, timeout: int):
        self.folder, self._keep = folder, keep
        self._world, self._writers = world, world.beside(timeout)
        self._thread = ThreadPoolExecutor(1, "checkpoint", _yield) if background else None
        self._pending: Future | None = None
        self._copies: dict[str, Tensor] = {}

    def stage(self, key: str, part: Tensor) -> Tensor:
        """`part` on the CPU; where saves are in the background, a copy that stays as it is until
        the next save. Call `wait` before the first of a save."""
        if self._thread is None:
            return part.cpu()
        if key not in self._copies:
            pinned = part.device.type == "cuda"
            self._copies[key] = torch.empty_like(part, device="cpu", pin_memory=pinned)
        return self._copies[key].copy_(part)

    def write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Saves a step; the oldest checkpoints go.

        Args:
            tensors: on the CPU, as `stage` gives them; DTensors are parts, others are whole.
            state: what JSON can hold.

        Raises:
            UserError: this save could not be written, or, in the background, the one before; on
                every rank alike.
        """
        self.wait()
        if self._thread is None:
            self._write(step, tensors, state)
        else:
            self._pending = self._thread.submit(self._write, step, tensors, state)

    def wait(self) -> None:
        """Returns when the save in flight, if there is one, is on disk.

        Raises:
            UserError: it could not be written; on every rank alike.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> tuple[int | None, list[str]]:
        """The newest whole checkpoint, None without any, and what is wrong with newer ones.

        The ranks share the reading of its files.

        Raises:
            UserError: there are checkpoints, and none is whole; on every rank alike.
        """
        world, folder = self._world, self.folder
        world.together(lambda: checkpoint.clean_leftovers(folder) if world.is_first else None)
        steps = world.together(lambda: checkpoint.checkpoint_steps(folder))[:_MOST_STEPS]
        damaged: list[str] = []
        for step in json.loads(world.gather(json.dumps(steps))[0]):  # what rank 0 sees
            share = slice(world.rank, None, world.size)
            problems = filter(None, world.gather(checkpoint.damage(folder, step, share)))
            if (problem := next(problems, None)) is None:
                return step, damaged
            damaged.append(problem)
        if damaged:
            raise UserError(f"no whole checkpoint in {folder}: {'; '.join(damaged)}")
        return None, []

    def read(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Fills tensors, such as those of `write`, in place from a whole checkpoint of the run.

        It may have been written by any number of ranks.
        """
        if self._world.size > 1:
            read_into(self.folder / checkpoint.checkpoint_name(step), tensors)
            return
        found = checkpoint.read_tensors(self.folder, step)
        for key, value in tensors.items():
            value.copy_(found[key])

    def _write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        world, folder = self._writers, self.folder
        if world.size == 1:
            checkpoint.save_checkpoint(folder, step, tensors, state)
        else:
            try:
                self._write_parts(step, tensors, state)
            except UserError as error:  # the same on every rank
                raise AgreedError(checkpoint.cannot_save(folder, step, str(error))) from None
        first = world.is_first
        world.together(lambda: checkpoint.prune(folder, self._keep, step) if first else None)

    def _write_parts(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        world, folder, first = self._writers, self.folder, self._writers.is_first
        path = checkpoint.unfinished_folder(folder, step)
        with contextlib.ExitStack() as stack:
            saving = checkpoint.saving(folder, step)
            world.together(lambda: stack.enter_context(saving) if first else None)
            write_parts(path, tensors, world.group)
            own = world.together(lambda: _checksum(part_of(path, world.rank)))
            parts = [text.split() for text in world.gather(own)]
            files = {name: checksum for checksum, name in filter(None, parts)}
            world.together(lambda: _commit(folder, step, files, state) if first else None)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.wait()
        if self._thread is not None:  # its errors must not hide what ends the run
            self._thread.shutdown()


def _yield() -> None:
    """Leaves the processor to training, which computes on every core where there is no GPU."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _checksum(part: Path | None) -> str:
    return "" if part is None else f"{sha256_file(part)} {part.name}"


def _commit(folder: Path, step: int, files: Mapping[str, str], state: Mapping[str, Any]) -> None:
    path = checkpoint.unfinished_folder(folder, step)
    for name in files:
        if not (path / name).is_file():
            raise UserError(
                f"{name} is not on the file system of rank 0: run.dir must be a folder that all "
                "ranks share"
            )
    checkpoint.commit(folder, step, files, state)
