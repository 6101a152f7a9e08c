"""Checkpoints of several ranks, and such as are written while training goes on."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_distributed import launch_ranks

from metro_ext import checkpoint
from metro_ext.checkpoint import (
    checkpoint_name,
    checkpoint_steps,
    latest_valid,
    load_checkpoint,
    save_checkpoint,
)
from metro_ext.distributed import World
from metro_ext.errors import UserError
from metro_ext.saver import Saver

ALONE = World()
# Rows over three ranks: 3 + 3 + 1, one rank with all, and fewer rows than ranks.
SHARDED = {
    "a": torch.arange(35.0).reshape(7, 5),
    "one": torch.arange(5.0).reshape(1, 5).bfloat16(),
    "b": torch.arange(2, dtype=torch.int64),
}
WHOLE = {
    "step": torch.tensor(7.0),
    "metrics": torch.linspace(0, 1, 12, dtype=torch.float64),
    "special": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
    "large": torch.arange(30000.0),
}

RANK = f"""
import resource, sys, torch, torch.distributed as dist
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from metro_ext.distributed import connect, disconnect
from metro_ext.errors import UserError
from metro_ext.saver import Saver
from test_saver import SHARDED, WHOLE

world = connect("gloo", 60)
mesh = init_device_mesh("cpu", (world.size,))

def spread(empty=False):
    make = torch.zeros_like if empty else torch.clone
    sharded = {{key: distribute_tensor(make(value), mesh, [Shard(0)], src_data_rank=None)
               for key, value in SHARDED.items()}}
    return sharded | {{key: make(value) for key, value in WHOLE.items()}}

with Saver(Path(sys.argv[1]), world, 2, True, 60) as saver:
    for step in (10, 20, 30):
        saver.write(step, spread(), {{"step": step}})
        dist.all_reduce(torch.ones(1000))  # training goes on
    saver.wait()
    tensors = spread(empty=True)
    assert saver.newest() == (30, [])
    saver.read(30, tensors)
    for key, value in SHARDED.items():
        assert tensors[key].full_tensor().equal(value), key
    if world.rank == 1:  # its disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    saver.write(40, spread() | {{"more": torch.ones(100 * world.size)}}, {{}})
    try:
        saver.wait()
    except UserError as error:
        print(type(error).__name__, error)
disconnect()
"""


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory) -> tuple[Path, list]:
    """Checkpoints of three ranks, of which the last failed; what each rank said."""
    folder = tmp_path_factory.mktemp("ranks") / "checkpoints"
    return folder, launch_ranks([[sys.executable, "-c", RANK, str(folder)]] * 3)


def test_three_ranks_save_and_one_process_reads(three_ranks):
    folder, done = three_ranks
    assert [code for code, *_ in done] == [0, 0, 0], done
    found = load_checkpoint(folder)
    expected = SHARDED | WHOLE
    assert found.step == 30 and found.state == {"step": 30} and found.damaged == []
    assert found.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert found.tensors[name].dtype == value.dtype, name
        assert found.tensors[name].shape == value.shape, name
        assert bits(found.tensors[name]) == bits(value), name
    assert checkpoint_steps(folder) == [30, 20]
    names = {path.name.split(".")[-1] for path in (folder / checkpoint_name(30)).iterdir()}
    assert names == {"safetensors", "json"}  # no pickle
    assert len(list((folder / checkpoint_name(30)).glob("*.safetensors"))) == 3


def test_what_all_ranks_hold_is_written_once(three_ranks):
    folder, _ = three_ranks
    stored = sum(path.stat().st_size for path in (folder / checkpoint_name(30)).glob("*.safe*"))
    tensors = (SHARDED | WHOLE).values()
    assert stored < sum(value.nbytes for value in tensors) + 3 * 2000


def test_a_rank_that_cannot_write_fails_all_alike(three_ranks):
    folder, done = three_ranks
    for _, out, _ in done:
        assert out.startswith("AgreedError cannot save") and checkpoint_name(40) in out
        assert "rank 1: File too large; earlier checkpoints are untouched" in out
    assert checkpoint_steps(folder) == [30, 20] and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "swap", "empty list", "foreign name"])
def test_a_damaged_part_is_found_and_named(harm, three_ranks, tmp_path):
    folder = tmp_path / "checkpoints"
    subprocess.run(["cp", "-r", str(three_ranks[0]), str(folder)], check=True)
    path = folder / checkpoint_name(30)
    one, two, three = sorted(path.glob("*.safetensors"))
    if harm == "flip":
        data = bytearray(two.read_bytes())
        data[-1] ^= 1
        two.write_bytes(data)
    elif harm == "cut":
        os.truncate(two, two.stat().st_size - 1)
    elif harm == "remove":
        two.unlink()
    elif harm == "swap":
        three.write_bytes(one.read_bytes())
    else:
        document = json.loads((path / "state.json").read_text())
        files = {"../state.json": "0"} if harm == "foreign name" else []
        (path / "state.json").write_bytes(checkpoint._encode({**document, "files": files}))
    step, damaged = latest_valid(folder)
    assert step == 20 and len(damaged) == 1 and checkpoint_name(30) in damaged[0]
    named = three if harm == "swap" else two
    assert (named.name in damaged[0]) or "state.json" in damaged[0]
    assert Saver(folder, ALONE, 2, False, 60).newest() == (20, damaged)


@pytest.fixture
def held(monkeypatch):
    """Saves wait for the event; each notes that it has begun."""
    event, begun, real = threading.Event(), [], checkpoint.save_checkpoint

    def slow(folder, step, tensors, state):
        begun.append(step)
        assert event.wait(60)
        return real(folder, step, tensors, state)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    return event, begun


def stage_and_write(saver: Saver, step: int, weight: torch.Tensor) -> None:
    saver.wait()
    saver.write(step, {"weight": saver.stage("weight", weight)}, {})


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, held):
    event, _ = held
    weight = torch.ones(3)
    with Saver(tmp_path, ALONE, 2, True, 60) as saver:
        stage_and_write(saver, 1, weight)
        weight.add_(1)  # while the write waits for the event
        assert checkpoint_steps(tmp_path) == []
        event.set()
    assert load_checkpoint(tmp_path, 1).tensors["weight"].equal(torch.ones(3))


def test_one_save_in_flight(tmp_path, held):
    event, begun = held
    with Saver(tmp_path, ALONE, 9, True, 60) as saver:
        stage_and_write(saver, 1, torch.ones(3))
        second = threading.Thread(target=stage_and_write, args=(saver, 2, torch.zeros(3)))
        second.start()
        assert begun in ([], [1])
        event.set()
        second.join()
    assert begun == [1, 2]
    for step in (1, 2):
        value = load_checkpoint(tmp_path, step).tensors["weight"]
        assert value.equal(torch.full((3,), 2.0 - step))


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_save_is_told_at_the_next_one_or_the_end(tmp_path, background):
    (tmp_path / "file").write_text("")
    saver = Saver(tmp_path / "file", ALONE, 2, background, 60)
    with pytest.raises(UserError, match="cannot save"), saver:
        stage_and_write(saver, 1, torch.ones(3))
        if background:
            with pytest.raises(UserError, match="cannot save"):
                stage_and_write(saver, 2, torch.ones(3))
            stage_and_write(saver, 3, torch.ones(3))


def test_what_ends_the_run_waits_for_the_save_and_is_not_hidden(tmp_path):
    with pytest.raises(SystemExit), Saver(tmp_path, ALONE, 2, True, 60) as saver:
        stage_and_write(saver, 1, torch.ones(3))
        sys.exit(1)
    assert checkpoint_steps(tmp_path) == [1]
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit), Saver(tmp_path / "file", ALONE, 2, True, 60) as saver:
        stage_and_write(saver, 1, torch.ones(3))
        sys.exit(1)


def test_no_whole_checkpoint_is_not_a_new_run(tmp_path):
    saver = Saver(tmp_path, ALONE, 2, False, 60)
    assert saver.newest() == (None, [])
    save_checkpoint(tmp_path, 5, {"weight": torch.ones(3)}, {})
    (tmp_path / checkpoint_name(5) / "state.json").write_text("{}")
    with pytest.raises(UserError, match="no whole checkpoint"):
        saver.newest()
