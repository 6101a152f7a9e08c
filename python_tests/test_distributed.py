"""Several gloo processes against one: same losses, resumed, wrongly started."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from training_runs import ENVIRONMENT, TINY, command, train

import metro_ext
from metro_ext.checkpoint import checkpoint_steps, load_checkpoint
from metro_ext.distributed import _start_name, lost_connection
from metro_ext.export import main as export

SHARED = ["--run.accumulation=4", "--run.log_interval=1", "--parallel.timeout=60"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launch_ranks(commands: list[list[str]], port: int | None = None, size: int = 0) -> list:
    """Starts a command a rank as a launcher would; (exit code, stdout, stderr) of each."""
    group = {"WORLD_SIZE": str(size or len(commands)), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port or free_port())}  # fmt: skip
    processes = [
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**ENVIRONMENT, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, words in enumerate(commands)
    ]  # fmt: skip
    done = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=600)
            done.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return done


def launch(ranks: int, folder: Path, *options: str, port: int | None = None) -> list:
    """Starts the same run on each rank."""
    return launch_ranks([command(folder, *options)] * ranks, port)


def train_on(ranks: int, folder: Path, *options: str) -> None:
    for code, out, err in launch(ranks, folder, *options):
        assert code == 0, out + err


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def assert_same_course(one: Path, other: Path, rel: float = 1e-5) -> None:
    left, right = records(one), records(other)
    assert [r["step"] for r in left] == [r["step"] for r in right]
    for a, b in zip(left, right, strict=True):
        for key in ("loss", "mlm_loss", "rtd_loss", "clm_loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=rel), (a["step"], key)
        assert a["tokens"] == b["tokens"] and a["lr"] == b["lr"]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory) -> Path:
    """50 steps of 4 micro-batches on one process, saved at 24, 48 and 50."""
    folder = tmp_path_factory.mktemp("distributed") / "alone"
    train(folder, "--steps", "50", *SHARED, *text, "--run.keep_checkpoints=9")
    return folder


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory):
    """The folder of a run of 50 steps on ranks under an engine, made when first asked for."""
    folders: dict[tuple[int, str], Path] = {}

    def run_on(ranks: int, mode: str) -> Path:
        if (ranks, mode) not in folders:
            folder = tmp_path_factory.mktemp(f"{mode}-{ranks}") / "run"
            train_on(ranks, folder, "--steps", "50", "--parallel", mode, *SHARED, *text)
            folders[ranks, mode] = folder
        return folders[ranks, mode]

    return run_on


@pytest.mark.parametrize(
    ("ranks", "mode"),
    [(2, "ddp"), (4, "zero1")],  # fsdp2: see the resume below
)
def test_any_number_of_ranks_gives_the_losses_of_one(ranks, mode, alone, unbroken):
    folder = unbroken(ranks, mode)
    assert_same_course(alone, folder)
    # Counts tell of the very masks: one more or less masked or replaced token would show.
    for key in ("mlm_accuracy", "rtd_majority", "replaced_share"):
        assert [r[key] for r in records(alone)] == [r[key] for r in records(folder)]


# A rank that kills itself at its first start, some time after a step of the run.
MORTAL = """
import os, pathlib, signal, sys, threading, time
sys.path.insert(0, os.getcwd())
from metro_ext.command_line import run
from metro_ext.train import main
records, victim, step, delay = pathlib.Path(sys.argv[1]), *sys.argv[2:5]
del sys.argv[1:5]

def die():
    while not records.exists() or records.read_bytes().count(b"\\n") < int(step):
        time.sleep(0.002)
    time.sleep(float(delay))
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == victim and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    threading.Thread(target=die, daemon=True).start()
run(main)
"""


@pytest.mark.parametrize("seed", range(int(os.environ.get("METRO_KILLS", "1"))))
def test_a_killed_rank_is_started_again_and_nothing_is_lost(seed, unbroken, text, tmp_path):
    """SIGKILL at a random moment under torchrun; METRO_KILLS=5 does it five times."""
    chance, mode = random.Random(seed), ("ddp", "fsdp2")[seed % 2]
    (tmp_path / "rank.py").write_text(MORTAL)
    folder = tmp_path / "run"
    death = [chance.randrange(2), chance.randrange(5, 45), chance.uniform(0, 0.05)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "--max-restarts=1", tmp_path / "rank.py", folder / "metrics.jsonl", *map(str, death),
         "--run.dir", folder, *TINY, "--steps=50", "--parallel", mode, *SHARED, *text],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=600,
    )  # fmt: skip
    where = f"rank, step, delay {death}\n{done.stdout}{done.stderr}"
    assert done.returncode == 0, where
    assert done.stdout.count("resuming after step") == 1, where
    reference = unbroken(2, mode)
    left, right = (load_checkpoint(run / "checkpoints").tensors for run in (reference, folder))
    assert left.keys() == right.keys()
    assert all(value.equal(right[name]) for name, value in left.items()), where
    assert records(reference) == records(folder), where


def test_saved_on_four_ranks_resumed_on_two(alone, text, tmp_path):
    """The end of a run that changes hands twice is that of one that does not."""
    folder = tmp_path / "run"
    options = ["--steps", "50", *SHARED, *text, "--run.keep_checkpoints=9"]
    train_on(4, folder, *options, "--parallel", "fsdp2")
    for step in (48, 50):
        for path in (folder / "checkpoints" / f"step-{step:08d}").iterdir():
            path.unlink()
        (folder / "checkpoints" / f"step-{step:08d}").rmdir()
    assert checkpoint_steps(folder / "checkpoints")[0] == 44
    out = launch(2, folder, *options, "--parallel", "ddp")
    assert [code for code, *_ in out] == [0, 0], out
    assert "resuming after step 44" in out[0][1]
    assert_same_course(alone, folder)
    left = load_checkpoint(alone / "checkpoints").tensors
    right = load_checkpoint(folder / "checkpoints").tensors
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.shape == right[name].shape, name


def test_resumed_on_three_ranks_to_the_same_bits(text, tmp_path):
    """A ring of three adds up in an order that depends on where a gradient lies in its bucket."""
    options = ["--steps=8", "--run.accumulation=3", "--run.checkpoint_interval=4", *text]
    for name in ("unbroken", "resumed"):
        train_on(3, tmp_path / name, *options)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000008")
    train_on(3, tmp_path / "resumed", *options)
    left, right = (
        load_checkpoint(tmp_path / name / "checkpoints").tensors for name in ("unbroken", "resumed")
    )
    assert left.keys() == right.keys()
    assert [name for name, value in left.items() if not value.equal(right[name])] == []


def test_a_checkpoint_of_several_ranks_loads_and_exports_as_one(unbroken, tmp_path):
    run, out = unbroken(2, "ddp"), tmp_path / "exported"
    parts = list((run / "checkpoints" / "step-00000050").glob("*.safetensors"))
    assert len(parts) == 2
    whole = load_checkpoint(run / "checkpoints").tensors
    for name, value in metro_ext.load(run).model.named_parameters():
        assert value.equal(whole[f"model.{name}"]), name
    export([str(run), str(out), "--training-state"])
    (state,) = (out / "training-state").iterdir()
    assert sorted(path.name for path in state.iterdir()) == ["state.json", "tensors.safetensors"]
    exported = load_file(state / "tensors.safetensors")
    assert exported.keys() == whole.keys()
    assert all(value.equal(exported[name]) for name, value in whole.items())


def refused(done: list) -> str:
    """Every rank ends with 2; rank 0 says one sentence and the others nothing."""
    assert [code for code, *_ in done] == [2] * len(done), done
    assert all("Traceback" not in err for *_, err in done), done
    assert all("error: " not in err for *_, err in done[1:]), done
    (line,) = [ln for ln in done[0][2].splitlines() if ln.startswith("error: ")]
    return line


def test_ranks_that_do_not_divide_the_batch(text, tmp_path):
    line = refused(launch(2, tmp_path / "run", "--steps", "4", "--run.accumulation=3", *text))
    assert "run.accumulation" in line and "3" in line and "2 ranks" in line


def test_an_unknown_option_on_two_ranks(text, tmp_path):
    assert "optim.lr" in refused(launch(2, tmp_path / "run", "--optim.learning_rat=1", *text))


def test_ranks_with_different_options(text, tmp_path):
    same = command(tmp_path / "run", "--run.accumulation=2", *text)
    assert "rank 1 was started with other" in refused(launch_ranks([same, [*same, "--seed=9"]]))


def test_a_rank_that_never_comes(text, tmp_path):
    words = command(tmp_path / "run", "--run.accumulation=2", "--parallel.timeout=3", *text)
    assert "the 2 processes did not meet" in refused(launch_ranks([words], size=2))


def test_the_rank_that_others_wait_for_is_named():
    store = dist.HashStore()
    store.set_timeout(timedelta(milliseconds=50))
    with pytest.raises(RuntimeError, match="rank 1 did not come within 3 s"):
        _start_name(store, 0, 2, 3)
    with pytest.raises(RuntimeError, match="rank 0 did not answer within 0 s"):
        _start_name(store, 1, 2, 0)


def test_a_lost_rank_is_told_in_a_sentence():
    gloo = (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
        "[127.0.0.1]:5771. This is typically caused by a remote worker crashing."
    )
    sentence = "Connection closed by peer [127.0.0.1]:5771"
    assert lost_connection(RuntimeError(gloo)) == sentence
    wrapped = f"Got the following error when running the callback: RuntimeError: {gloo}\n\nAt:"
    assert lost_connection(RuntimeError(wrapped)) == sentence
    assert lost_connection(dist.DistNetworkError("gone")) == "gone"
    assert not lost_connection(RuntimeError("a defect")) and not lost_connection(ValueError(gloo))


def test_a_new_start_on_an_old_store_takes_no_name_of_the_old():
    """torchrun's store keeps what the ranks of an earlier start left there."""
    store, names = dist.HashStore(), set()
    for start in range(3):
        order = (1, 0, 2) if start else (0, 1, 2)  # a rank that is early finds the old name
        found: dict[int, str] = {}

        def rank(number, found=found):
            found[number] = _start_name(store, number, 3, 60)

        threads = [threading.Thread(target=rank, args=(number,)) for number in order]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found.keys() == {0, 1, 2} and len(set(found.values())) == 1
        names |= set(found.values())
    assert len(names) == 3


def test_missing_nccl(text, tmp_path):
    done = launch(2, tmp_path / "run", "--parallel.backend=nccl", *SHARED, *text)
    assert "NCCL" in refused(done)


def test_a_changed_model_on_resume(alone, text):
    done = launch(2, alone, "--steps", "50", *SHARED, *text, "--model.ffn=96")
    assert "model.ffn" in refused(done)


def test_a_port_in_use_ends_within_the_timeout(text, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        start = time.monotonic()
        done = launch(
            2, tmp_path / "run", "--run.accumulation=2", "--parallel.timeout=5", *text,
            port=other.getsockname()[1],
        )  # fmt: skip
        assert time.monotonic() - start < 60
    line = refused(done)
    assert "in use" in line


def test_sharding_without_a_launcher(text, tmp_path):
    done = train(tmp_path / "run", "--parallel=fsdp2", *text, code=2)
    assert "torchrun" in done.stderr


def test_recomputed_layers_give_the_same_bits(text, tmp_path):
    for name, policy in (("kept", "none"), ("again", "all")):
        train(tmp_path / name, "--steps", "6", f"--run.recompute={policy}", *text)
    kept = load_checkpoint(tmp_path / "kept" / "checkpoints").tensors
    again = load_checkpoint(tmp_path / "again" / "checkpoints").tensors
    assert all(value.equal(again[name]) for name, value in kept.items())
