"""Contenders in processes of their own, driven in turns.

Each contender lives in a process, so that its peak memory is its own and nothing that another
loads or compiles helps or hurts it. The parent asks one at a time and waits for the answer: their
timings interleave and never overlap. A request is one line of JSON on the worker's standard input,
``{"method": ..., "arguments": {...}}``; the answer is one line, ``{"result": ...}`` or
``{"error": "..."}``.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# A worker sees the very modules that its parent sees, wherever those came from.
_LAUNCH = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
_GRACE_SECONDS = 10


class WorkerError(RuntimeError):
    """A worker answered with an error, or ended before it answered."""


class Worker:
    """A running ``python -m <module> --worker <name> ...``; a context manager.

    Args:
        module: its main calls `serve` when given ``--worker``.
        name: which contender it is.
        arguments: further arguments of the command line.
    """

    def __init__(self, module: str, name: str, arguments: Sequence[str] = ()):
        self.name = name
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", _LAUNCH, json.dumps(sys.path), module),
                *("--worker", name, *arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, method: str, **arguments: Any) -> Any:
        """What the worker's method returns.

        Raises:
            WorkerError: the method raised, or the worker has ended.
        """
        try:
            self.process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.name}: {self._ending()} during {method}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer["result"]

    def _ending(self) -> str:
        code = self.process.wait()
        if code >= 0:
            return f"ended with code {code}"
        killed = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{killed}"

    def close(self) -> None:
        """Ends the worker: asks by closing its input, kills it if it does not listen."""
        if not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it is gone already
                self.process.stdin.close()
        try:
            self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Crew:
    """Workers of one module by their names; a context manager, whose end is theirs.

    Args:
        module, arguments: of each `Worker`.
        needed: those without whom there is nothing to measure. Any other that fails leaves.
    """

    def __init__(self, module: str, arguments: Sequence[str] = (), needed: Sequence[str] = ()):
        self.module, self.arguments, self.needed = module, arguments, needed
        self.workers: dict[str, Worker] = {}
        self.present: list[str] = []
        self.absent: dict[str, str] = {}  # who has left since the last muster, and why

    def muster(self, names: Iterable[str]) -> None:
        """All of these take part, also those that have left before. New ones are started together,
        so that they import their libraries at the same time."""
        self.present, self.absent = list(names), {}
        for name in self.present:
            if name not in self.workers:
                self.workers[name] = Worker(self.module, name, self.arguments)

    def call(self, name: str, method: str, **arguments: Any) -> Any:
        """As `Worker.call`."""
        return self.workers[name].call(method, **arguments)

    def attempt(self, name: str, method: str, **arguments: Any) -> Any:
        """The same; None of one that failed and left."""
        try:
            return self.call(name, method, **arguments)
        except WorkerError as error:
            self.drop(name, error)
            return None

    def drop(self, name: str, error: Exception) -> None:
        """Ends a worker that failed, and with it all the memory that it holds.

        Raises:
            error: it is not a worker's, or of one that is needed.
        """
        if not isinstance(error, WorkerError) or name in self.needed or name not in self.present:
            raise error
        self.workers.pop(name).close()
        self.present = [other for other in self.present if other != name]
        self.absent[name] = str(error)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()


def serve(methods: Mapping[str, Callable[..., Any]]) -> None:
    """Answers requests until the parent closes the pipe.

    Whatever a library prints goes to standard error: standard output carries answers only.
    """
    sys.stdout.flush()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": methods[request["method"]](**request["arguments"])}
        except Exception as error:
            traceback.print_exc()
            first_line = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first_line}"}
        print(json.dumps(answer), file=channel, flush=True)
