"""The processes of a run: how they meet, agree on errors and add up figures.

``torchrun`` (or a scheduler) starts N processes with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
and MASTER_PORT in their environment. Without these a run is one process and nothing here costs
anything.
"""

import dataclasses
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metro_ext.command_line import USER_ERROR
from metro_ext.errors import UserError

T = TypeVar("T")

_GRACE_SECONDS = 5  # for torch's own timeout to speak first
_MESSAGE_BYTES = 2000  # of a text that is passed between ranks; longer ones are cut
_POLL_SECONDS = 0.02


class AgreedError(UserError):
    """A UserError that every rank raises alike, so that rank 0 alone need print it."""


@dataclass
class Traffic:
    """Bytes that a rank sends in collectives, counted as those of a ring.

    On N ranks each sends (N - 1) / N of a buffer that is gathered, reduced to parts or made of a
    part for each rank, and twice that of one that is all-reduced (Patarasuk & Yuan, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations", 2009): no algorithm sends less.
    """

    sent: int = 0

    def all_reduce(self, size: int, ranks: int) -> None:
        """Counts the sum of a buffer of `size` bytes over `ranks`."""
        self.sent += 2 * size * (ranks - 1) // ranks

    def part(self, size: int, ranks: int) -> None:
        """Counts an all-gather into, a reduce-scatter or an all-to-all of `size` bytes."""
        self.sent += size * (ranks - 1) // ranks


@dataclass(frozen=True)
class World:
    """This process among all of the run.

    rank, size: of this process, and how many there are.
    local_rank: among the processes of this machine; the number of its GPU.
    distributed: whether a process group exists (also true for one process under torchrun).
    group: the connections that its collectives use; None: those of the training itself.
    traffic: what this rank has sent.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    distributed: bool = False
    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks of a tensor, in place and on its device: one collective."""
        if self.distributed:
            dist.all_reduce(values, group=self.group)
            self.traffic.all_reduce(values.nbytes, self.size)
        return values

    def beside(self, timeout: int) -> "World":
        """The same processes over connections of their own (gloo), for another thread.

        A collective. timeout: seconds after which its collectives give up.
        """
        if not self.distributed:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        return dataclasses.replace(self, group=group)

    def gather(self, text: str) -> list[str]:
        """The text of every rank, by rank; one of more than 2000 bytes is cut."""
        if not self.distributed:
            return [text]
        own = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
        content = text.encode()[:_MESSAGE_BYTES]
        own[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.group)
        return [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in everyone]

    def stack(self, values: Tensor) -> Tensor:
        """The ranks' tensors [...] of one shape as [size, ...], on every rank."""
        if not self.distributed:
            return values[None]
        everyone = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(everyone, values.contiguous(), group=self.group)
        self.traffic.part(self.size * values.nbytes, self.size)
        return torch.stack(everyone)

    def exchange(self, parts: Tensor) -> Tensor:
        """Of a tensor [size, ...] its part r goes to rank r; the parts that came, by rank."""
        if not self.distributed:
            return parts
        found = torch.empty_like(parts)
        dist.all_to_all_single(found, parts.contiguous(), group=self.group)
        self.traffic.part(parts.nbytes, self.size)
        return found

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank; a user's mistake on any rank is raised on all of them.

        Raises:
            AgreedError: the mistake of the lowest rank that met one.
        """
        if not self.distributed:
            return action()
        message = ""
        try:
            result = action()
        except UserError as error:
            message = str(error)
        except OSError as error:
            message = f"{error.filename or 'the system'}: {error.strerror or error}"
        self._agree(message)
        return result  # where there is none, the line above has raised

    def in_turn(self, action: Callable[[], T]) -> T:
        """As `together`, but rank 0 is done before the others begin: it makes files they read."""
        found: list[T] = []
        self.together(lambda: found.append(action()) if self.is_first else None)
        self.together(lambda: None if self.is_first else found.append(action()))
        return found[0]

    def _agree(self, message: str) -> None:
        for rank, text in enumerate(self.gather(message)):
            if text:
                raise AgreedError(text if rank == 0 else f"rank {rank}: {text}")


def launched() -> bool:
    """Whether a launcher started this process as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_rank() -> int:
    """RANK of this process; 0 without a launcher, and where it is not a number."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def connect(backend: str, timeout: int) -> World:
    """Joins the other processes that a launcher started; one process without a launcher.

    Args:
        backend: ``gloo``, ``nccl``, or ``auto``: NCCL for tensors on CUDA where there is a device.
            Tensors on the CPU go through gloo in any case.
        timeout: seconds after which a process that waits for the others gives up.

    Raises:
        UserError: the launcher's variables are incomplete, NCCL is missing, or the processes do
            not find each other.
    """
    if not launched():
        return World()
    numbers = {}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ.get(key, "0" if key == "LOCAL_RANK" else "")
        if not text.isdecimal():
            raise UserError(f"{key} must be a number in the environment, found {text!r}; torchrun "
                            "sets it")  # fmt: skip
        numbers[key] = int(text)
    cuda = torch.cuda.is_available()
    if backend == "nccl" and not (cuda and dist.is_nccl_available()):
        raise UserError(
            "parallel.backend is nccl, but this torch has no NCCL or no CUDA device; use "
            "--parallel.backend=gloo, or install a CUDA build of torch"
        )
    if cuda and backend == "auto" and not dist.is_nccl_available():
        raise UserError(
            "this torch has CUDA but no NCCL; use --parallel.backend=gloo, or one process"
        )
    with_nccl = cuda and backend != "gloo"
    if cuda:
        torch.cuda.set_device(numbers["LOCAL_RANK"] % torch.cuda.device_count())
    # A client that reaches a port of another service waits there for ever, inside the C++ code.
    watchdog = threading.Timer(timeout + _GRACE_SECONDS, _give_up, [numbers["RANK"], timeout])
    watchdog.daemon = True
    watchdog.start()
    limit = timedelta(seconds=timeout)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore("metro_ext", store)
        store = dist.PrefixStore(_start_name(store, rank, size, timeout), store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if with_nccl else "gloo",
            store=store, rank=rank, world_size=size, timeout=limit,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR', '')}:{numbers['MASTER_PORT']}"
        reason = str(error).strip().splitlines()[0]
        hint = " (is the port in use?)" if "EADDRINUSE" in str(error) else ""
        raise UserError(
            f"the {numbers['WORLD_SIZE']} processes did not meet at {address}{hint}: {reason}"
        ) from None
    finally:
        watchdog.cancel()
    return World(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], True)


def _start_name(store: dist.Store, rank: int, size: int, timeout: int) -> str:
    """A name for this start of the processes that all of them know and no earlier start had.

    The store is that of torchrun's agent and outlives the processes, which torch (2.10 to 2.13)
    assumes it does not: started again, a rank would find there the address of one that died, call
    it and be refused. TORCHELASTIC_RESTART_COUNT is no name: each machine counts for itself.
    So rank 0 draws one, and another rank trusts the name that it finds once rank 0 has answered,
    under that very name, with the number that the rank drew.

    Raises:
        RuntimeError: a rank did not come in time.
    """
    number, deadline = secrets.token_hex(8), time.monotonic() + timeout
    if rank == 0:
        store.set("start", number)
        for other in range(1, size):
            try:
                theirs = store.get(f"{number}/called by {other}").decode()
            except RuntimeError:
                raise RuntimeError(f"rank {other} did not come within {timeout} s") from None
            store.set(f"{number}/answered {theirs}", "")
        return number
    while time.monotonic() < deadline:
        name = store.get("start").decode()
        store.set(f"{name}/called by {rank}", number)
        if store.check([f"{name}/answered {number}"]):
            return name
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"rank 0 did not answer within {timeout} s")


def lost_connection(error: BaseException) -> str:
    """What happened to the other processes, where an exception is about that; else empty."""
    line = (str(error).strip().splitlines() or [""])[0]
    if not isinstance(error, dist.DistError) and not (
        isinstance(error, RuntimeError) and "/gloo/" in line
    ):
        return ""
    # gloo: "[file:line] what happened [address]. This is typically caused by ..."
    return re.sub(r"^.*?\[/\S*\] ", "", line).split(". This is")[0]


def _give_up(rank: int, timeout: int) -> None:
    if rank == 0:
        print(f"error: no other process came within {timeout} s", file=sys.stderr, flush=True)
    os._exit(USER_ERROR)


def disconnect() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
