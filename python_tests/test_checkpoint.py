"""Checkpoints: bitwise round trips, damage found and named, kills and full disks survived."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from metro_ext import checkpoint
from metro_ext.checkpoint import (
    RunLock,
    checkpoint_steps,
    clean_leftovers,
    latest_valid,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from metro_ext.errors import UserError

FILES = ("tensors.safetensors", "state.json")


def sample(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(37, 5, generator=generator),
        "half": torch.randn(64, generator=generator).bfloat16(),
        "count": torch.tensor(2**62 + step),
        "bytes": torch.randint(0, 256, (3, 4), dtype=torch.uint8, generator=generator),
        "empty": torch.zeros(0, 8),
        "special": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "transposed": torch.randn(3, 4, generator=generator).t(),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_whole(loaded, step: int) -> None:
    expected = sample(step)
    assert loaded.step == step and loaded.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        found = loaded.tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert bits(found) == bits(tensor), name


@pytest.fixture
def folder(tmp_path):
    """Three whole checkpoints: steps 100, 200, 300."""
    for step in (100, 200, 300):
        save_checkpoint(tmp_path, step, sample(step), {"step": step, "lr": 0.1 + 0.2})
    return tmp_path


def test_round_trip_is_bitwise(folder):
    for step in (100, 200, 300):
        loaded = load_checkpoint(folder, step)
        assert_whole(loaded, step)
        assert loaded.state == {"step": step, "lr": 0.1 + 0.2} and loaded.damaged == []
    assert load_checkpoint(folder).step == 300
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "step-00000100", "step-00000200", "step-00000300",
    ]  # fmt: skip
    # Any reader of safetensors can have the tensors.
    assert load_file(folder / "step-00000300" / FILES[0])["count"] == 2**62 + 300


def damage_places():
    """A byte of every region: header length, header, payload begin and end; all of the JSON."""
    for position in (0, 7, 8, 40, 0.5, -1):
        yield FILES[0], position
    for position in (0, 1, 2, 0.2, 0.4, 0.6, 0.8, -2, -1):
        yield FILES[1], position


@pytest.mark.parametrize(("name", "position"), list(damage_places()))
def test_a_flipped_bit_is_found_and_named(folder, name, position):
    path = folder / "step-00000300" / name
    data = bytearray(path.read_bytes())
    index = int(position * len(data)) if isinstance(position, float) else position
    for bit in (0, 5):
        flipped = bytearray(data)
        flipped[index] ^= 1 << bit
        path.write_bytes(flipped)
        step, damaged = latest_valid(folder)
        assert step == 200 and len(damaged) == 1
        assert "step-00000300" in damaged[0] and name in damaged[0]
    loaded = load_checkpoint(folder)
    assert_whole(loaded, 200)
    assert loaded.damaged == damaged
    with pytest.raises(UserError, match=r"step-00000300 is damaged"):
        load_checkpoint(folder, 300)


def test_every_byte_of_the_state_counts(folder):
    path = folder / "step-00000300" / FILES[1]
    data = path.read_bytes()
    for index in range(len(data)):
        path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        assert latest_valid(folder).step == 200, f"byte {index} ({data[index : index + 1]})"
    path.write_bytes(data)
    assert latest_valid(folder).step == 300


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [0, 5, 0.5, -1])
def test_truncation_is_found(folder, name, size):
    path = folder / "step-00000300" / name
    length = path.stat().st_size
    os.truncate(path, int(size * length) if isinstance(size, float) else size % length)
    assert latest_valid(folder).step == 200


def test_missing_and_foreign_files_are_found(folder):
    (folder / "step-00000300" / FILES[0]).unlink()
    shutil.copytree(folder / "step-00000100", folder / "step-00000400")  # a step under a false name
    (folder / "step-00000500").mkdir()
    (folder / "step-7").mkdir()  # not a name we write
    step, damaged = latest_valid(folder)
    assert step == 200
    assert [line.split(":")[0] for line in damaged] == [f"step-00000{n}00" for n in (5, 4, 3)]
    assert "No such file" in damaged[0] and "step 100" in damaged[1] and FILES[0] in damaged[2]
    # Tensors of another checkpoint, each file whole in itself.
    shutil.copy(folder / "step-00000100" / FILES[0], folder / "step-00000200" / FILES[0])
    assert latest_valid(folder).step == 100


def test_a_forged_state_is_damage_not_a_crash(folder):
    """The checksum of state.json holds, but it is not what a save writes."""
    path = folder / "step-00000300" / FILES[1]
    document = json.loads(path.read_text())
    for key in ("step", "state", "tensors_sha256", "format"):
        for other in (None, [], {"a": 1}):
            path.write_bytes(checkpoint._encode({**document, key: other, "extra": 0}))
            assert latest_valid(folder).step == 200
        path.write_bytes(checkpoint._encode({k: v for k, v in document.items() if k != key}))
        assert latest_valid(folder).step == 200
    path.write_bytes(checkpoint._encode(document))
    assert latest_valid(folder).step == 300


@pytest.mark.parametrize("text", ["[]", "{}", "null", "[" * 100_000, '{"step": 1, "step": 1}', ""])
def test_foreign_json_is_damage_not_a_crash(folder, text):
    (folder / "step-00000300" / FILES[1]).write_text(text)
    assert latest_valid(folder).step == 200


def test_nothing_to_load(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert latest_valid(empty) == (None, []) and latest_valid(empty / "none") == (None, [])
    with pytest.raises(UserError, match="expected a checkpoint"):
        load_checkpoint(empty)
    with pytest.raises(UserError, match="step-00000150"):
        load_checkpoint(folder, 150)
    for step in checkpoint_steps(folder):
        (folder / f"step-{step:08d}" / FILES[1]).write_text("{}")
    with pytest.raises(UserError, match=r"no whole checkpoint.*300.*200.*100"):
        load_checkpoint(folder)


def test_prune_keeps_the_last_whole_one(folder):
    assert prune(folder, 3) == [] and prune(folder, 2) == [100]
    save_checkpoint(folder, 400, sample(400), {})
    for step in (300, 400):
        os.truncate(folder / f"step-{step:08d}" / FILES[0], 50)
    assert prune(folder, 1) == [300]  # 400 is the newest, 200 the only whole one
    assert checkpoint_steps(folder) == [400, 200]
    assert_whole(load_checkpoint(folder), 200)
    os.truncate(folder / "step-00000200" / FILES[0], 50)
    assert prune(folder, 1) == []  # none is whole: nothing is thrown away
    with pytest.raises(ValueError, match="keep"):
        prune(folder, 0)


def test_a_prune_killed_halfway_leaves_no_half_checkpoint(folder, monkeypatch):
    def killed(path, **_):
        if path.exists():
            (path / FILES[0]).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(folder, 2)
    monkeypatch.undo()
    assert checkpoint_steps(folder) == [300, 200]
    assert clean_leftovers(folder) == [".tmp-step-00000100"]


def test_a_step_is_replaced_also_when_damaged(folder):
    os.truncate(folder / "step-00000300" / FILES[0], 50)
    save_checkpoint(folder, 300, sample(300), {"again": True})
    assert_whole(load_checkpoint(folder), 300)
    assert load_checkpoint(folder).state == {"again": True}
    assert len(list(folder.iterdir())) == 3


def test_leftovers_are_cleaned_and_a_replaced_step_comes_back(folder):
    (folder / ".tmp-step-00000400").mkdir()
    (folder / ".tmp-step-00000400" / FILES[0]).write_bytes(b"half")
    os.rename(folder / "step-00000300", folder / ".old-step-00000300")  # killed before the rename
    shutil.copytree(folder / "step-00000200", folder / ".old-step-00000200")  # killed after it
    (folder / "notes").mkdir()
    assert latest_valid(folder) == (200, [])
    assert clean_leftovers(folder) == [".old-step-00000200", ".tmp-step-00000400"]
    assert_whole(load_checkpoint(folder), 300)
    assert (folder / "notes").is_dir()


@pytest.mark.parametrize("call", ["mkdir", "save_file", "write", "fsync", "rename"])
@pytest.mark.parametrize("step", [300, 400])  # one to be replaced, one new
def test_a_full_disk_leaves_what_was_there(folder, monkeypatch, call, step):
    """Each system call of a save fails in turn, at its first and at every later use."""
    targets = {
        "mkdir": (checkpoint.Path, "mkdir"),
        "save_file": (checkpoint, "save_file"),
        "write": (checkpoint.Path, "write_bytes"),
        "fsync": (os, "fsync"),
        "rename": (os, "rename"),
    }
    owner, name = targets[call]
    real = getattr(owner, name)
    for fail_at in range(1, 8):
        calls = 0

        def failing(*args, fail_at=fail_at, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)
        try:
            save_checkpoint(folder, step, sample(step), {"new": True})
        except UserError as error:
            assert "No space left on device" in str(error) and f"step-{step:08d}" in str(error)
        else:
            assert calls < fail_at, "the failure was swallowed"
            break
        finally:
            monkeypatch.undo()
        found = latest_valid(folder)
        assert found.damaged == [] and found.step in (300, step)
        assert not [e.name for e in folder.iterdir() if e.name.startswith((".tmp", ".old"))]
        for kept in (100, 200, 300):
            assert_whole(load_checkpoint(folder, kept), kept)
    assert fail_at > 1, f"{call} was never called"


FILL = """
import os, sys, torch
from metro_ext.checkpoint import save_checkpoint
from metro_ext.errors import UserError
if sys.argv[2] == "limit":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
for step in (10, 20, 30):
    try:
        save_checkpoint(sys.argv[1], step, {"a": torch.full(((40 if step < 30 else 4000) * 256,),
                                                            float(step))}, {})
    except UserError as error:
        print(step, error)
"""


def fill(folder, how):
    return subprocess.run(
        [sys.executable, "-c", FILL, str(folder), how], capture_output=True, text=True, check=True
    ).stdout


def test_the_kernel_refuses_to_write(tmp_path):
    """A file size limit set in the kernel: the error arrives through the safetensors library."""
    out = fill(tmp_path, "limit")
    assert out.startswith("30 cannot save") and "File too large" in out
    assert sorted(e.name for e in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]
    assert torch.equal(load_checkpoint(tmp_path).tensors["a"], torch.full((40 * 256,), 20.0))


def test_a_disk_that_is_really_full(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        out = fill(tmp_path, "disk")
        assert out.startswith("30 cannot save") and "No space left" in out
        assert sorted(e.name for e in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]
        assert latest_valid(tmp_path) == (20, [])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_json_cannot_hold_is_refused(folder):
    for state in ({"loss": float("nan")}, {"tensor": torch.zeros(1)}):
        with pytest.raises((ValueError, TypeError)):
            save_checkpoint(folder, 400, sample(400), state)
    assert checkpoint_steps(folder) == [300, 200, 100] and len(list(folder.iterdir())) == 3


SAVER = """
import sys, torch
from metro_ext.checkpoint import prune, save_checkpoint
step = int(sys.argv[2])
print("ready", flush=True)
while True:
    # Every other step is saved twice, so that replacing is hit too.
    for _ in range(1 + step % 2):
        save_checkpoint(sys.argv[1], step, {"a": torch.full((300, 256), float(step))}, {"s": step})
    print(step, flush=True)
    prune(sys.argv[1], 2)
    step += 1
"""


def test_kill_in_the_middle_of_saving(tmp_path):
    """SIGKILL at random moments: the newest checkpoint is whole and not older than reported.

    Goes on until three kills have fallen into a save and left something half-done behind.
    """
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    step, caught = 1, 0
    for attempt in range(30):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), str(step)], stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"ready\n"
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        where = f"seed {seed}, attempt {attempt}"
        reported = int(rest[-1]) if rest else step
        caught += any(e.name.startswith((".tmp", ".old")) for e in tmp_path.iterdir())
        clean_leftovers(tmp_path)
        assert all(e.name.startswith("step-") for e in tmp_path.iterdir()), where
        found, damaged = latest_valid(tmp_path)
        assert damaged == [] and found is not None and found >= reported, where
        loaded = load_checkpoint(tmp_path)
        assert torch.equal(loaded.tensors["a"], torch.full((300, 256), float(found))), where
        assert loaded.state == {"s": found}, where
        step = found + 1
        if caught == 3:
            return
    pytest.fail(f"{caught} of 30 kills fell into a save (seed {seed})")


def test_two_runs_on_one_folder_are_refused(tmp_path):
    run = tmp_path / "run"
    with RunLock(run):
        pid = int((run / "run.lock").read_text())
        with pytest.raises(UserError, match=rf"in use by process {pid}; .*--run"), RunLock(run):
            pass
    with RunLock(run):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = (
        "import sys, time\nfrom metro_ext.checkpoint import RunLock\n"
        "with RunLock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid};"), RunLock(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    with RunLock(tmp_path):
        assert int((tmp_path / "run.lock").read_text()) == os.getpid()


def test_an_unwritable_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="writable run folder"), RunLock(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="cannot save"):
        save_checkpoint(tmp_path / "file", 1, sample(1), {})


def test_the_state_is_readable_json(folder):
    document = json.loads((folder / "step-00000300" / FILES[1]).read_text())
    assert document["step"] == 300 and document["state"]["lr"] == 0.1 + 0.2
