"""Several gloo processes against one: same losses, resumed, wrongly started."""

import json
import socket
import subprocess
import time
from pathlib import Path

import pytest
from training_runs import ENVIRONMENT, command, train

from metro_ext.checkpoint import checkpoint_steps, load_checkpoint

SHARED = ["--run.accumulation=4", "--run.log_interval=1", "--parallel.timeout=60"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launch(ranks: int, folder: Path, *options: str, port: int | None = None) -> list:
    """Starts the ranks as a launcher would; (exit code, stdout, stderr) of each."""
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port or free_port())}  # fmt: skip
    processes = [
        subprocess.Popen(
            command(folder, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**ENVIRONMENT, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    done = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=240)
            done.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return done


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


@pytest.mark.parametrize(
    ("ranks", "mode"),
    [(2, "ddp"), (4, "zero1")],  # fsdp2: see the resume below
)
def test_any_number_of_ranks_gives_the_losses_of_one(ranks, mode, alone, text, tmp_path):
    train_on(ranks, tmp_path / "run", "--steps", "50", "--parallel", mode, *SHARED, *text)
    assert_same_course(alone, tmp_path / "run")
    # Counts tell of the very masks: one more or less masked or replaced token would show.
    for key in ("mlm_accuracy", "rtd_majority", "replaced_share"):
        assert [r[key] for r in records(alone)] == [r[key] for r in records(tmp_path / "run")]


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
