"""The command line as a user meets it: runs, resumes, is killed, is given bad input."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import ENVIRONMENT, command, train

import metro_ext
from metro_ext.checkpoint import checkpoint_steps, load_checkpoint


def bits(folder: Path) -> dict:
    """Everything about a run that must not depend on interruptions."""
    tensors = load_checkpoint(folder / "checkpoints").tensors
    return {
        "metrics": (folder / "metrics.jsonl").read_bytes(),
        "evaluation": (folder / "evaluation.jsonl").read_bytes(),
        "tensors": {k: v.contiguous().view(-1).view(torch.uint8) for k, v in tensors.items()},
    }


def assert_same_bits(a: Path, b: Path) -> None:
    left, right = bits(a), bits(b)
    assert left["metrics"] == right["metrics"]
    assert left["evaluation"] == right["evaluation"]
    assert left["tensors"].keys() == right["tensors"].keys()
    for name, value in left["tensors"].items():
        assert torch.equal(value, right["tensors"][name]), name


def test_records_and_files(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [3, 6, 9, 12, 15, 18, 20]
    keys = {"step", "loss", "mlm_loss", "rtd_loss", "clm_loss", "rtd_accuracy", "grad_norm", "lr",
            "tokens"}  # fmt: skip
    assert all(keys <= r.keys() for r in records)
    assert records[-1]["tokens"] == 20 * 256
    timing = [json.loads(line) for line in (finished / "timing.jsonl").read_text().splitlines()]
    assert all({"tokens_per_s", "mfu", "seconds"} <= r.keys() for r in timing)
    held_out = [
        json.loads(line) for line in (finished / "evaluation.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in held_out] == [8, 16, 20]
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoint_steps(finished / "checkpoints") == [20, 16]


def test_the_loss_falls(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["mlm_loss"] < records[0]["mlm_loss"] - 0.05


def test_a_finished_run_is_left_alone(finished, text):
    before = bits(finished)
    train(finished, "--steps", "20", *text)
    after = bits(finished)
    assert before["metrics"] == after["metrics"] and before["evaluation"] == after["evaluation"]


def test_two_runs_of_one_command_give_the_same_bits(finished, text, tmp_path):
    train(tmp_path / "run", "--steps", "20", *text)
    assert_same_bits(finished, tmp_path / "run")


def test_killed_runs_resume_bit_for_bit(finished, text, tmp_path):
    """SIGKILL at random moments, same command again, until it ends by itself."""
    folder, kills = tmp_path / "killed", 0
    generator = random.Random(4)
    for _ in range(30):
        process = subprocess.Popen(
            command(folder, "--steps", "20", *text),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        # Until there is something new to lose: the next checkpoint, and a moment more.
        seen = checkpoint_steps(folder / "checkpoints")
        while process.poll() is None and checkpoint_steps(folder / "checkpoints") == seen:
            time.sleep(0.002)
        time.sleep(generator.random() * 0.05)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read().decode()
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    train(folder, "--steps", "20", *text)
    assert kills >= 2
    assert_same_bits(finished, folder)


def test_sigterm_finishes_the_checkpoint_in_flight(text, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    process = subprocess.Popen(
        command(tmp_path / "run", "--steps", "2000", *text, "--run.checkpoint_interval=1"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    while process.poll() is None and not checkpoint_steps(checkpoints):
        time.sleep(0.002)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and not err, err
    assert all(entry.name.startswith("step-") for entry in checkpoints.iterdir())
    newest = checkpoint_steps(checkpoints)[0]
    done = train(tmp_path / "run", "--steps", str(newest + 1), *text)
    assert f"resuming after step {newest}" in done.stdout


def test_saving_beside_the_training_changes_nothing(finished, text, tmp_path):
    train(tmp_path / "run", "--steps", "20", "--run.async_save=false", *text)
    assert_same_bits(finished, tmp_path / "run")


def test_accumulation_gives_the_step_of_one_large_batch(text, tmp_path):
    """Not the same draws, so not the same bits: the same number of tokens and a falling loss."""
    train(tmp_path / "run", "--steps", "9", "--run.accumulation=2", *text)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["tokens"] == 9 * 2 * 256


@pytest.mark.parametrize("objective", ["electra", "clm-all", "mlm"])
def test_other_objectives(objective, text, tmp_path):
    train(tmp_path / "run", "--steps", "4", "--objective", objective, *text)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (record["rtd_loss"] is not None) == (objective == "electra")
    assert (record["clm_loss"] is not None) == (objective == "clm-all")


def test_bf16(text, tmp_path):
    train(tmp_path / "run", "--steps", "4", "--precision", "bf16", *text)


def test_load_gives_model_and_tokenizer(finished):
    pretrained = metro_ext.load(finished)
    hidden = pretrained.hidden_states(["the old house", "rain"])
    alone = pretrained.hidden_states("rain")[0]
    torch.testing.assert_close(hidden[1], alone)
    assert hidden[0].shape == (len(pretrained.tokenizer.encode("the old house")) + 2, 32)
    assert pretrained.step == 20


def test_inspect(finished):
    done = subprocess.run(
        [sys.executable, "-m", "metro_ext.inspect", str(finished), "the [MASK] house"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "guesses:" in done.stdout and done.stdout.count("replaced") >= 3


def test_print_config_round_trips(tmp_path):
    arguments = [sys.executable, "-m", "metro_ext.train", "--preset", "base", "--optim.lr=0.002"]
    printed = subprocess.run([*arguments, "--print-config"], capture_output=True, text=True)
    (tmp_path / "config.toml").write_text(printed.stdout)
    again = subprocess.run(
        [sys.executable, "-m", "metro_ext.train", "--config", tmp_path / "config.toml",
         "--print-config"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert again.stdout == printed.stdout and "lr = 0.002" in printed.stdout


def refused(done: subprocess.CompletedProcess) -> str:
    """One clear sentence on stderr, no traceback."""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines and lines[-1].startswith("error: "), done.stderr
    return lines[-1]


def test_unknown_option_names_the_nearest(tmp_path):
    done = train(tmp_path / "run", "--optim.learning_rat=1", code=2)
    assert "optim.lr" in refused(done)
    assert not (tmp_path / "run").exists()


def test_missing_text(tmp_path):
    done = train(tmp_path / "run", "--data.train=nowhere.txt", "--data.valid=nowhere.txt", code=2)
    assert "nowhere.txt" in refused(done)


def test_another_configuration_on_the_same_folder(finished, text):
    before = bits(finished)
    done = train(finished, "--steps", "20", "--optim.lr=0.5", *text, code=2)
    assert "optim.lr" in refused(done)
    assert before["metrics"] == bits(finished)["metrics"]


def test_all_checkpoints_damaged(finished, text, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    for path in folder.glob("checkpoints/*/tensors.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    done = train(folder, "--steps", "20", *text, code=2)
    assert "no whole checkpoint" in refused(done)


def test_the_newest_checkpoint_damaged_falls_back(finished, text, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    path = folder / "checkpoints" / "step-00000020" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    done = train(folder, "--steps", "20", *text)
    assert "step-00000020" in done.stderr and "resuming after step 16" in done.stdout
    assert_same_bits(finished, folder)


def test_a_loss_that_explodes_stops_the_run(text, tmp_path):
    done = train(tmp_path / "run", "--steps", "20", "--optim.lr=1e30", *text, code=2)
    assert "finite" in refused(done)


def test_two_runs_on_one_folder(text, tmp_path):
    first = subprocess.Popen(
        command(tmp_path / "run", "--steps", "2000", *text),
        stdout=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.05)
        done = train(tmp_path / "run", "--steps", "2000", *text, code=2)
        assert "in use" in refused(done)
    finally:
        first.kill()
        first.wait()


def test_cuda_asked_for_and_missing(text, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done = train(tmp_path / "run", "--run.device=cuda", *text, code=2)
    assert "cuda" in refused(done)
