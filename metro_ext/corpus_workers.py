"""Processes that encode units and write shards, and the parent's side of them.

A task is a line of JSON on a worker's standard input, the answer a line on its standard output. The
processes are started by name, not forked: what the parent has loaded (torch, say) is not in them.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metro_ext.corpus_format import Shard
from metro_ext.corpus_parts import encode_unit
from metro_ext.corpus_plan import Plan
from metro_ext.corpus_shards import ShardTask, write_shard
from metro_ext.errors import UserError
from metro_ext.tokenizer import Tokenizer
from metro_ext.word_encoder import WordEncoder

# A worker sees the modules that its parent sees, wherever those came from.
_LAUNCH = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from metro_ext.corpus_workers import serve; serve(sys.argv[2])"
)
PARTS, CORPUS, TOKENIZER_COPY = "parts", "corpus", "tokenizer.model"


class WorkerEnded(UserError):
    """A process of the build was killed; what is done can be gone on with."""


class Work:
    """The tasks of one build, done in this process.

    Args:
        folder: of the build: it has the plan, the tokenizer, `parts` and `corpus`.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._plan = Plan.read(folder)
        tokenizer = Tokenizer.load(folder / TOKENIZER_COPY)
        self._vocab_size = tokenizer.vocab_size
        self._encoder = WordEncoder(tokenizer)

    def encode(self, unit: int) -> int:
        parts = self._folder / PARTS
        return encode_unit(self._plan, unit, parts, self._encoder, self._vocab_size)

    def shard(self, task: dict[str, Any]) -> dict[str, Any]:
        parts, corpus = self._folder / PARTS, self._folder / CORPUS
        shard = write_shard(ShardTask(**task), parts, corpus, self._vocab_size)
        return {"index": task["index"], **asdict(shard)}


class Workers:
    """Does tasks on several processes, or, for one, in this one; a context manager."""

    def __init__(self, folder: Path, count: int):
        self._local = Work(folder) if count == 1 else None
        self._processes = [] if count == 1 else [_Process(folder) for _ in range(count)]
        self._free: queue.SimpleQueue = queue.SimpleQueue()
        for process in self._processes:
            self._free.put(process)

    def encode(self, units: Iterable[int]) -> Iterator[int]:
        """Encode units; the number of tokens of each, as they come to an end."""
        return self._do("encode", units)

    def shards(self, tasks: Iterable[ShardTask]) -> Iterator[tuple[int, Shard]]:
        """Write shards; (index, shard) as they come to an end."""
        answers = self._do("shard", map(asdict, tasks))
        return ((answer.pop("index"), Shard(**answer)) for answer in answers)

    def _do(self, method: str, tasks: Iterable[Any]) -> Iterator[Any]:
        if self._local is not None:
            yield from map(getattr(self._local, method), tasks)
            return
        with ThreadPoolExecutor(len(self._processes)) as threads:
            waiting = [threads.submit(self._call, method, task) for task in tasks]
            try:
                for done in as_completed(waiting):
                    yield done.result()
            finally:
                # Whatever ended this ends the other tasks too.
                threads.shutdown(wait=False, cancel_futures=True)
                if not all(future.done() for future in waiting):
                    self.close()

    def _call(self, method: str, task: Any) -> Any:
        process = self._free.get()
        try:
            return process.call(method, task)
        finally:
            self._free.put(process)

    def close(self) -> None:
        for process in self._processes:
            process.close()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Process:
    def __init__(self, folder: Path):
        command = [sys.executable, "-c", _LAUNCH, json.dumps(sys.path), str(folder)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8"
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes
        self._tasks, self._answers = self._process.stdin, self._process.stdout

    def call(self, method: str, task: Any) -> Any:
        try:
            print(json.dumps([method, task]), file=self._tasks, flush=True)
            line = self._answers.readline()
        except (BrokenPipeError, ValueError):  # ValueError: closed by `close`
            line = ""
        if not line:
            code = self._process.wait()
            killed = " (out of memory?)" if code == -signal.SIGKILL else ""
            raise WorkerEnded(
                f"a process of the build ended with code {code}{killed}: run the command again to "
                "go on, with fewer --workers if memory is short"
            )
        answer = json.loads(line)
        if "user" in answer:
            raise UserError(answer["user"])
        if "system" in answer:
            raise OSError(*answer["system"])
        return answer["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._tasks, self._answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def serve(folder: str) -> None:
    """A worker's main: answers tasks until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_read_tasks, args=(tasks,), daemon=True).start()
    try:
        work = Work(Path(folder))
    except UserError as error:
        print(json.dumps({"user": str(error)}), flush=True)
        return
    while True:
        method, task = tasks.get()
        print(json.dumps(_answer(getattr(work, method), task)), flush=True)


def _read_tasks(tasks: queue.SimpleQueue) -> None:
    for line in sys.stdin:
        tasks.put(json.loads(line))
    # The parent is gone, killed perhaps: an end at once, before another build goes on here.
    os._exit(1)


def _answer(method: Callable[[Any], Any], task: Any) -> dict[str, Any]:
    try:
        return {"result": method(task)}
    except UserError as error:
        return {"user": str(error)}
    except OSError as error:
        return {"system": [error.errno, error.strerror, error.filename]}
    except Exception:
        traceback.print_exc()
        os._exit(1)
