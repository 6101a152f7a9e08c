"""Wrong inputs without end: every parser and every operator answers with a result or a sentence.

    python fuzz.py TARGET[,TARGET...] COUNT SEED FOLDER

A process of its own, since what is looked for may end it. COUNT inputs go to each target. Its
address space is limited, so that a length read from a file cannot become an allocation, and so is
the processor time of an input. The input at work is in FOLDER/input; stdout has counts for each
target, a JSON object a line. Exit code 1: an exception that is no sentence for a user, or a hang.
"""

import base64
import gzip
import json
import lzma
import mmap
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

SECONDS_AN_INPUT = 5.0  # of processor time
ALLOWANCE = 256 << 20  # bytes that a process may take beyond what it has before the first input

Target = Callable[[random.Random], None]
Check = Callable[[bytes], None]

# What breaks parsers: borders of widths, signs, nesting, what JSON and TOML have names for.
TOKENS = [
    b"", b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"[" * 2000, b"\0",
    b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\t", b"\\u0000", b'"\\ud800"', b"=", b"--",
    b"18446744073709551616", b"9223372036854775807", b"-9223372036854775808", b"4294967295",
    b"\x00\x00\x00\x00\x00\x00\x00\x80", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"1" * 5000,
    "é".encode(), "\u202e".encode(), b"'", b"#", b",",
]  # fmt: skip


def mutated(seed: bytes, chance: random.Random) -> bytes:
    """A few edits: bits, bytes, stretches cut, doubled, moved, or replaced by one of TOKENS."""
    data = bytearray(seed)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice((1, 2, 8, 64, len(data))))
        kind = chance.randrange(6)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[start:end]
        elif kind == 2:
            data[start:start] = data[start:end]
        elif kind == 3:
            data[start : start + chance.choice((0, 1, 4, 8))] = chance.choice(TOKENS)
        elif kind == 4:
            data[start:end] = bytes(chance.randrange(256) for _ in range(min(16, end - start)))
        else:
            words = data.split(b" ")
            chance.shuffle(words)
            data = bytearray(b" ".join(words))
    return bytes(data[: 4 * len(seed) + 20_000])


def by_mutation(check: Check, *seeds: bytes) -> Target:
    def target(chance: random.Random) -> None:
        data = mutated(chance.choice(seeds), chance)
        record(data)
        check(data)

    return target


class Record:
    """The input at work, in a file that a crash leaves behind: no system call an input."""

    def __init__(self, path: Path, size: int = 1 << 20):
        with open(path, "wb+") as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)

    def __call__(self, data: bytes) -> None:
        cut = data[: len(self._map) - 8]
        self._map[:8] = len(cut).to_bytes(8, "little")
        self._map[8 : 8 + len(cut)] = cut


record: Callable[[bytes], None] = lambda data: None  # noqa: E731 (main puts a Record here)


class Hang(Exception):
    """An input that took too long."""


def _alarm(_number, _frame) -> None:
    raise Hang


def run(name: str, target: Target, count: int, seed: int) -> dict[str, int]:
    """Feeds a target; how many inputs were accepted, and how many refused with a sentence."""
    from metro_ext.errors import UserError

    signal.signal(signal.SIGVTALRM, _alarm)
    counts = {"accepted": 0, "refused": 0}
    chance = random.Random(seed)
    for _ in range(count):
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS_AN_INPUT)
        try:
            target(chance)
            counts["accepted"] += 1
        except UserError as error:
            if not str(error):
                raise AssertionError("an error without a sentence") from error
            counts["refused"] += 1
        except RuntimeError as error:
            # What an operator says, or PyTorch for it: see `fuzz_operators`.
            if name != "operators" or type(error) is not RuntimeError:
                raise
            counts["refused"] += 1
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return counts


def limit_memory() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ALLOWANCE, used + ALLOWANCE))


def compressed(data: bytes) -> dict[str, bytes]:
    return {"": data, ".gz": gzip.compress(data), ".xz": lzma.compress(data)}


def main() -> None:
    sys.modules["fuzz"] = sys.modules["__main__"]  # so that the targets have the `record` of below
    from fuzz_targets import TARGETS

    global record
    names, count, seed = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3])
    folder, targets = Path(sys.argv[4]), {}
    for name in names:
        (folder / name).mkdir()
        targets[name] = TARGETS[name](folder / name)
    record = Record(folder / "input")
    limit_memory()
    try:
        for name, target in targets.items():
            print(json.dumps({"target": name, **run(name, target, count, seed)}), flush=True)
    except BaseException:
        traceback.print_exc()
        print("target:", name, file=sys.stderr)
        data = (folder / "input").read_bytes()
        size = int.from_bytes(data[:8], "little")
        print("input:", base64.b64encode(data[8 : 8 + size]).decode(), file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # with little address space left, not every library ends in order


if __name__ == "__main__":
    main()
