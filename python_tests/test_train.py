"""The command line as a user meets it: runs, resumes, is killed, is given bad input."""

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from corpora import exit_code, make_corpus, small_tokenizer
from training_runs import ENVIRONMENT, TINY, command, train

import metro_ext
from metro_ext import inspect
from metro_ext.checkpoint import checkpoint_steps, load_checkpoint
from metro_ext.config import load_config
from metro_ext.errors import UserError
from metro_ext.pretrained import EncodedTexts
from metro_ext.train import pretrain


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
    assert all({"tokens_per_s", "mfu", "seconds", "data_wait"} <= r.keys() for r in timing)
    assert all(50 < r["peak_mb"] < 10_000 for r in timing)
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
    assert process.returncode == 0 and not err, err
    assert all(entry.name.startswith("step-") for entry in checkpoints.iterdir())
    newest = checkpoint_steps(checkpoints)[0]
    done = train(tmp_path / "run", "--steps", str(newest + 1), *text)
    assert f"resuming after step {newest}" in done.stdout


def test_saving_beside_the_training_changes_nothing(finished, text, tmp_path):
    train(tmp_path / "run", "--steps", "20", "--run.async_save=false", *text)
    assert_same_bits(finished, tmp_path / "run")


def test_accumulation_counts_the_tokens_of_all_micro_batches(text, tmp_path):
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


def test_no_texts_have_no_hidden_states(finished):
    assert metro_ext.load(finished).hidden_states([]) == []


def test_inspect(finished):
    done = subprocess.run(
        [sys.executable, "-m", "metro_ext.inspect", str(finished), "the [MASK] house"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "guesses:" in done.stdout and done.stdout.count("replaced") >= 3
    assert "In place of [MASK] the main model read the first guess" in done.stdout


def test_inspect_shows_the_main_model_the_best_guess(finished):
    pretrained = metro_ext.load(finished)
    with_mask = inspect.inspect(pretrained, "the [MASK] house")
    (index,) = with_mask.guesses
    filled = [piece if i != index else with_mask.guesses[index][0][0]
              for i, piece in enumerate(with_mask.pieces)]  # fmt: skip
    ids = [next(i for i in range(400) if pretrained.tokenizer.pieces([i]) == [p]) for p in filled]
    packed = EncodedTexts.pack([[0, *ids, 2]], 32)
    head, main = pretrained.model.rtd_head, pretrained.main
    hidden = head.transform(main(packed.tokens, packed.packing, main.table(torch.float32)))
    logit = hidden @ head.weight.view(-1) + head.bias
    expected = logit.sigmoid()[1:-1].detach()
    torch.testing.assert_close(torch.tensor(with_mask.replaced), expected)


def test_inspect_says_what_it_left_out(finished):
    result = inspect.inspect(metro_ext.load(finished), "word " * 50)
    assert len(result.pieces) == 30 and result.left_out >= 20
    assert f"({result.left_out} tokens more than the model can read" in inspect.render(result)


@pytest.mark.parametrize("guesses", ["-1", "0"])
def test_inspect_without_a_guess(finished, capsys, guesses):
    assert exit_code(inspect.main, finished, "the [MASK] house", "--guesses", guesses) == 2
    assert f"--guesses: must be at least 1, found {guesses}" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"at least 1 guess, found {guesses}"):
        inspect.inspect(metro_ext.load(finished), "the [MASK] house", int(guesses))


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run.graph=on"], "run.graph is on, which needs a CUDA device"),
        (["--parallel=fsdp2"], "needs a launcher"),
        (["--run.tensorboard"], "TensorBoard is not installed"),
        (["--run.wandb"], "Weights & Biases is not installed"),
    ],
)
def test_cheap_checks_come_before_the_preparation(options, message, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = [*TINY, f"--run={tmp_path / 'run'}", "--run.device=cpu", *text, *options]
    with pytest.raises(UserError, match=message):
        pretrain(load_config(words))
    assert not (tmp_path / "run" / "tokenizer.model").exists()


def test_held_out_text_that_is_too_short_is_found_before_the_first_step(text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words\n")
    folder = tmp_path / "run"
    done = train(folder, "--steps", "2", text[0], f"--data.valid={short}", code=2)
    assert "data/valid: the corpus has" in refused(done)
    assert not (folder / "metrics.jsonl").exists()
    train(folder, "--steps", "2", *text)  # what was made of the short text is not in the way


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """Three corpora of one tokenizer; `other` differs from `train` by its last document."""
    folder, documents = tmp_path_factory.mktemp("corpora"), ["one little girl and her dog"] * 200
    texts = {"train": documents, "valid": documents, "other": [*documents[1:], "one other dog"]}
    return {
        name: make_corpus(folder / name, one, small_tokenizer()).folder
        for name, one in texts.items()
    }


def test_a_step_whose_evaluation_fails_is_saved(corpora, tmp_path):
    shutil.copytree(corpora["valid"], tmp_path / "valid")
    shard = tmp_path / "valid" / "shard-00000.bin"
    shard.write_bytes(b"\xff" * shard.stat().st_size)  # ids out of range
    data = [f"--data.train={corpora['train']}", f"--data.valid={tmp_path / 'valid'}"]
    done = train(tmp_path / "run", "--steps", "3", "--run.eval_interval=2", *data, code=2)
    assert "shard-00000.bin: damaged" in refused(done)
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [2]


def test_another_corpus_on_resume_is_refused(corpora, tmp_path):
    """In the place of the one that the run began with: no configuration tells it."""
    here, run = tmp_path / "corpus", tmp_path / "run"
    data = [f"--data.train={here}", f"--data.valid={corpora['valid']}"]
    shutil.copytree(corpora["train"], here)
    train(run, "--steps", "2", *data)
    shutil.rmtree(here)
    shutil.copytree(corpora["other"], here)
    done = train(run, "--steps", "3", *data, code=2)
    assert "another data.train than the corpus" in refused(done)


def test_fewer_steps_than_were_taken(finished, text):
    before = bits(finished)
    done = train(finished, "--steps", "19", *text, code=2)
    assert "a run of 20 steps, expected no more than run.steps = 19" in refused(done)
    assert before["metrics"] == bits(finished)["metrics"]


def test_the_command_to_go_on_for_longer_works(text, tmp_path):
    """It is told at the end of a run whose options are not the default ones."""
    done = train(tmp_path / "a run", "--steps", "2", *text)
    (line,) = [line for line in done.stdout.splitlines() if "go on for longer" in line]
    program, *words = shlex.split(line, comments=True)
    assert program == "python"
    again = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert "resuming after step 2" in again.stdout and "4/4" in again.stdout
