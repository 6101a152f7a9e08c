"""Starts training runs by forking a process that has imported torch already, and watches them.

One import serves hundreds of runs. The server is a process of its own (`python fork_server.py`),
because a test process has long started threads, which do not survive a fork. It reads requests from
stdin, one JSON object a line, and answers each on stdout:

    {"do": "start", "argv": [...], "log": PATH, "fault": {...}, "environment": {...}}
                                                                  -> {"pid": N}
    {"do": "wait", "pid": N, "seconds": S}                        -> {"code": N or null}

A code is negative for the signal that ended the run; null: it still goes on. `fault` is what goes
wrong in the run (see `FAULTS`), `environment` what a launcher would have set.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# A process that goes on without end would outlive its test.
LONGEST_SECONDS = 600


class Server:
    """The test's side: a context manager around the process."""

    def __enter__(self) -> "Server":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def start(
        self, argv: list[str], log: Path, environment: dict[str, str] | None = None, **fault: Any
    ) -> int:
        """Begins `python -m metro_ext.train ARGV`; its process id. Output goes to `log`."""
        log.write_bytes(b"")  # a test that looks before the run has written finds no older output
        request = {"argv": argv, "log": str(log), "environment": environment or {}}
        return self._ask(do="start", **request, fault=fault)["pid"]

    def poll(self, pid: int) -> int | None:
        """The exit code; None while it runs."""
        return self._ask(do="wait", pid=pid, seconds=0)["code"]

    def wait(self, pid: int) -> int:
        """The exit code, once it has ended."""
        code = self._ask(do="wait", pid=pid, seconds=LONGEST_SECONDS)["code"]
        assert code is not None, f"process {pid} did not end"
        return code

    def run(self, argv: list[str], log: Path, code: int = 0, **fault: Any) -> str:
        """A run from begin to end; its output."""
        found = self.wait(self.start(argv, log, **fault))
        assert found == code, (found, log.read_text())
        return log.read_text()

    def _ask(self, **request: Any) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _spoil_loss(steps: list[int], value: str) -> None:
    """The loss of these training batches (by index) is multiplied by `value`."""
    _change_loss(steps, lambda loss: loss * float(value))


def _change_loss(steps: list[int], change: Callable[[Any], Any]) -> None:
    import torch

    from metro_ext import train_step
    from metro_ext.objective import Objective

    call, fill = Objective.__call__, train_step.StepInputs.fill
    now = {}

    def filled(self, number, *arguments):
        now["step"] = number
        return fill(self, number, *arguments)

    def spoiled(self, model, *arguments):
        out = call(self, model, *arguments)
        if torch.is_grad_enabled() and now.get("step") in steps:
            object.__setattr__(out, "loss", change(out.loss))
        return out

    Objective.__call__, train_step.StepInputs.fill = spoiled, filled


def _spoil_gradient(steps: list[int], value: str) -> None:
    """The loss of these training batches keeps its value; its gradient is multiplied by `value`."""
    import torch

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(_context, loss):
            return loss.clone()

        @staticmethod
        def backward(_context, gradient):
            return gradient * float(value)

    _change_loss(steps, Spoil.apply)


def _hang(step: int, where: str) -> None:
    """The step, or the thread that makes batches, waits for ever from `step` on."""
    import threading

    from metro_ext import batches, train_step

    def forever_from(function, number_of):
        def waiting(self, *arguments):
            if number_of(*arguments) >= step:
                threading.Event().wait()
            return function(self, *arguments)

        return waiting

    if where == "loader":
        source = batches.BatchSource
        source.batch = forever_from(source.batch, lambda index: index)
    else:
        inputs = train_step.StepInputs
        inputs.fill = forever_from(inputs.fill, lambda number, *_: number)


def _jumping_clock(seed: int) -> None:
    """time.time jumps by up to a year, either way, whenever it is read."""
    import random

    chance, real = random.Random(seed), time.time
    year = 365 * 86400
    time.time = lambda: real() + chance.uniform(-year, year)
    time.time_ns = lambda: int(time.time() * 1e9)


def _file_limit(size: int) -> None:
    """No file may grow beyond `size` bytes (EFBIG); Python ignores the signal that it brings."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


FAULTS = {
    "loss": _spoil_loss, "gradient": _spoil_gradient, "hang": _hang, "clock": _jumping_clock,
    "file_limit": _file_limit,
}  # fmt: skip


def _child(request: dict) -> None:
    from metro_ext.command_line import run
    from metro_ext.train import main

    os.chdir(REPOSITORY)
    os.environ |= request["environment"]
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        for name, arguments in request["fault"].items():
            FAULTS[name](**arguments)
        run(lambda: main(request["argv"]))
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


def main() -> None:
    import matplotlib.pyplot  # noqa: F401  (what a run imports late)

    import metro_ext.train  # noqa: F401

    codes: dict[int, int] = {}  # of those that have ended
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            pid = os.fork()
            if pid == 0:
                _child(request)
            codes.pop(pid, None)
            answer = {"pid": pid}
        else:
            pid = request["pid"]
            if pid not in codes and (code := _wait(pid, request["seconds"])) is not None:
                codes[pid] = code
            answer = {"code": codes.get(pid)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
