"""Full and read-only disks, flipped bits and cut files: named, and nothing good is lost."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SHORT
from test_train import assert_same_bits

from metro_ext.checkpoint import checkpoint_steps, latest_valid, load_checkpoint
from metro_ext.corpus import Corpus
from metro_ext.errors import UserError
from metro_ext.monitor import Monitor
from metro_ext.tokenizer import Tokenizer


class Disk:
    """A tmpfs that can be made small, large or read-only."""

    def __init__(self, folder: Path):
        self.folder = folder

    def set(self, options: str) -> None:
        command = ["mount", "-o", f"remount,{options}", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def refused(out: str, *words: str) -> None:
    """One sentence with what happened; no traceback."""
    assert "Traceback" not in out
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), out


def prepared(unbroken: Path, folder: Path) -> Path:
    """A run's folder with tokenizer and corpora: what it writes from now on are checkpoints."""
    shutil.copytree(unbroken / "data", folder / "data")
    for path in unbroken.glob("tokenizer.model*"):  # and what it was made from
        shutil.copy(path, folder)
    return folder


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_fills_up(server, unbroken, text, disk, log):
    """A tmpfs that is full at the second checkpoint: exit code 2; with room again, the same bits"""
    folder = prepared(unbroken, disk.folder / "run")
    argv = ["--run", str(folder), *SHORT, *text]
    room = used(folder) + 3 * used(unbroken / "checkpoints" / "step-00000024") // 2
    disk.set(f"size={room // 1024 + 64}k")  # the rest: records, and pages that are not full
    refused(server.run(argv, log, code=2), "cannot save", "No space left")
    assert latest_valid(folder / "checkpoints") == (2, [])
    assert not list((folder / "checkpoints").glob(".tmp-*"))
    disk.set("size=16m")
    assert "resuming after step 2" in server.run(argv, log)
    assert_same_bits(unbroken, folder)


def test_a_quota_on_files(server, unbroken, text, tmp_path, log):
    """The kernel refuses a file beyond a size (RLIMIT_FSIZE): exit code 2; then the same bits"""
    folder = prepared(unbroken, tmp_path / "run")
    argv = ["--run", str(folder), *SHORT, *text]
    whole = (unbroken / "checkpoints/step-00000024/tensors.safetensors").stat().st_size
    out = server.run(argv, log, code=2, file_limit={"size": whole // 2})
    refused(out, "cannot save", "File too large")
    assert checkpoint_steps(folder / "checkpoints") == []
    server.run(argv, log)
    assert_same_bits(unbroken, folder)


def test_a_folder_that_becomes_read_only(server, text, disk, log):
    """A read-only file system under a run that begins, and under one that resumes: exit code 2"""
    folder = disk.folder / "run"
    argv = ["--run", str(folder), *SHORT, *text]
    server.run([*argv, "--steps", "4"], log)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    disk.set("ro")
    refused(server.run(argv, log, code=2), "Read-only file system")
    refused(server.run(["--run", str(disk.folder / "new"), *SHORT], log, code=2), "Read-only")
    disk.set("rw")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def looks_whole(run: Path) -> None:
    """What a start of the run, and `corpus info --verify`, check.

    Raises:
        UserError: something is damaged.
    """
    found = load_checkpoint(run / "checkpoints")
    if found.damaged:
        raise UserError(found.damaged[0])
    if Tokenizer.load(run / "tokenizer.model").sha256 != found.state["tokenizer_sha256"]:
        raise UserError("tokenizer.model is another one")
    for corpus in ("train", "valid"):
        Corpus.open(run / "data" / corpus).verify()
    with Watched(run, 24, resumed_step=found.step, checksums=found.state["records"]) as monitor:
        if monitor.said:
            raise UserError(monitor.said[0])


class Watched(Monitor):
    said: tuple[str, ...] = ()

    def warn(self, sentence):
        self.said = (*self.said, sentence)


CHECKED = [
    "checkpoints/step-00000024/tensors.safetensors", "checkpoints/step-00000024/state.json",
    "tokenizer.model", "data/train/manifest.json", "data/train/tokenizer.model",
    "data/train/documents.bin", "data/train/counts.bin", "data/train/shard-00000.bin",
    "data/valid/shard-00000.bin",
    "metrics.jsonl", "evaluation.jsonl", "timing.jsonl",
]  # fmt: skip
# Written anew at every start or end, and read by nothing of a run; a lock counts by being held.
# What a run's own texts were made from no longer decides once there are checkpoints.
MADE_FROM = ["tokenizer.model.made_from.json", "data/train.made_from.json"]
UNCHECKED = ["config.toml", "training.png", "run.lock", *MADE_FROM]


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    places = sorted({0, 7, len(content) // 3, len(content) // 2, len(content) - 2})
    for place in places:
        for bit in (0, 6):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            yield f"bit {bit} of byte {place} flipped", bytes(flipped)
    for size in (0, len(content) // 2, len(content) - 2):  # a manifest may lose its last newline
        yield f"cut to {size} bytes", content[:size]


@pytest.mark.parametrize("name", CHECKED)
def test_damage_is_found_and_named(unbroken, tmp_path, name, record_property):
    """Flipped bits and cuts in each kind of file: found by its checksum, and the file is named"""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    looks_whole(run)
    content, tried = (run / name).read_bytes(), 0
    for what, damaged in damages(content):
        (run / name).write_bytes(damaged)
        with pytest.raises(UserError) as error:
            looks_whole(run)
        assert Path(name).name in str(error.value), what
        tried += 1
        for path in run.glob("*.jsonl"):  # opening the records drops a torn last line
            shutil.copy(unbroken / path.name, path)
        (run / name).write_bytes(content)
    looks_whole(run)
    record_property("damages found", tried)


def test_every_file_of_a_run_is_known(unbroken):
    """No kind of file that a run writes is left out of the list above"""
    files = {str(path.relative_to(unbroken)) for path in unbroken.rglob("*") if path.is_file()}
    kinds = {name.replace("valid", "train").replace("00000022", "00000024") for name in files}
    assert kinds == {name.replace("valid", "train") for name in CHECKED + UNCHECKED}


def test_a_run_with_damaged_files(server, unbroken, text, tmp_path, log):
    """The newest checkpoint cut: the one before is taken, same bits; else: named, refused"""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    argv = ["--run", str(run), *SHORT, *text]
    state = run / "checkpoints" / "step-00000024" / "state.json"
    state.write_bytes(state.read_bytes()[:-9])
    for name in UNCHECKED:
        (run / name).write_bytes(b"\0 damaged")
    out = server.run(argv, log)
    assert "damaged checkpoint passed over: step-00000024" in out and "state.json" in out
    assert "resuming after step 22" in out
    assert_same_bits(unbroken, run)

    metrics = run / "metrics.jsonl"
    good = metrics.read_bytes()
    metrics.write_bytes(good.replace(b'"step": 3,', b'"step": 2,', 1))
    assert "metrics.jsonl is damaged or was changed" in server.run(argv, log)
    metrics.write_bytes(good.replace(b'"step": 3,', b'"step  3,', 1))
    refused(server.run(argv, log, code=2), "line 1 of", "metrics.jsonl")
    metrics.write_bytes(good)
    shard = run / "data" / "train" / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    refused(server.run(argv, log, code=2), "shard-00000.bin: truncated")
