"""Progress lines and records: bits kept, cut to a resume's step, readable in every state."""

import errno
import io
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from metro_ext import progress
from metro_ext.errors import UserError
from metro_ext.monitor import TRAINING_KEYS, Monitor, read_records


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def metrics(step):
    torch.manual_seed(step)
    loss = {key: torch.rand(()).item() * 10 for key in TRAINING_KEYS if key != "tokens"}
    return {**loss, "tokens": step * 4096, "replaced_fraction": 1 / (step + 2)}


def train(run_dir, first, last, **options):
    """Logs steps first … last, evaluates every third step."""
    with Monitor(run_dir, 12, stream=io.StringIO(), **options) as log:
        for step in range(first, last + 1):
            log.log(step, metrics(step))
            if step % 3 == 0:
                log.log_evaluation(step, {"mlm_loss": math.sqrt(step)})


def content(run_dir):
    return {name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "evaluation.jsonl")}


def test_records_hold_the_keys_and_the_bits(tmp_path):
    values = {"loss": 0.1 + 0.2, "lr": 5e-324, "tokens": 2**40, "mlm_loss": torch.tensor(1.1)}
    with Monitor(tmp_path, 10, stream=io.StringIO()) as log:
        log.log(5, {**values, "extra": 7, "grad_norm": math.inf, "clm_loss": math.nan})
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert list(record) == ["step", *TRAINING_KEYS, "extra"]
    assert record["loss"] == 0.1 + 0.2 and record["lr"] == 5e-324
    assert record["mlm_loss"] == torch.tensor(1.1).item()
    assert record["tokens"] == 2**40 and record["extra"] == 7
    assert record["rtd_loss"] is None and record["rtd_accuracy"] is None
    assert float(record["grad_norm"]) == math.inf and math.isnan(float(record["clm_loss"]))


def test_timing_is_kept_apart(tmp_path):
    clock, options = Clock(), {"flops_per_token": 2e6, "peak_flops": 1e10}
    options["peak_memory"] = iter([3_000_000, 5_500_000]).__next__
    with Monitor(tmp_path, 40, stream=(out := io.StringIO()), clock=clock, **options) as log:
        clock.now += 1.5
        with log.waiting_for_data():
            clock.now += 0.5
        log.log(10, {"tokens": 1000})
        clock.now += 4.0
        with log.untimed():
            clock.now += 100.0
        log.log(20, {"tokens": 5000})
    first, second = read_records(tmp_path / "timing.jsonl")
    assert first == {
        "step": 10, "tokens_per_s": 500.0, "mfu": 0.1, "seconds": 2.0, "data_wait": 0.25,
        "peak_mb": 3.0,
    }  # fmt: skip
    assert second == {
        "step": 20, "tokens_per_s": 1000.0, "mfu": 0.2, "seconds": 4.0, "data_wait": 0.0,
        "peak_mb": 5.5,
    }  # fmt: skip
    assert not {"mfu", "seconds", "tokens_per_s"} & set(read_records(tmp_path / "metrics.jsonl")[0])
    lines = out.getvalue().splitlines()
    assert "500 tok/s" in lines[0] and "MFU 10.0%" in lines[0] and "ETA 0:06" in lines[0]
    assert "1K tok/s" in lines[1] and "MFU 20.0%" in lines[1] and "ETA 0:08" in lines[1]


def test_the_line(tmp_path):
    with Monitor(tmp_path, 1500, stream=(out := io.StringIO()), clock=(clock := Clock())) as log:
        clock.now += 50
        log.log(500, {"loss": 31.25, "mlm_loss": 5.5, "rtd_loss": 0.41, "clm_loss": 5.25,
                      "rtd_accuracy": 0.861, "rtd_majority": 0.85, "sample_accuracy": 0.2,
                      "lr": 1e-3, "tokens": 1_024_000})  # fmt: skip
        clock.now += 8000
        log.log(501, {"loss": 12345.678, "mlm_loss": 6.0, "lr": 1e-3, "tokens": 1_026_048})
        log.log_evaluation(501, {"rtd_auc": 0.7, "tokens": 40})
    lines = [re.sub(r" +", " ", line) for line in out.getvalue().splitlines()]
    assert lines == [
        " 500/1500 ( 33.3%) loss 31.2500 mlm 5.5000 rtd 0.4100 clm 5.2500 rtd acc 86.1%"
        " (base 85.0%) sampled right 20.0%"
        " lr 1.00e-03 20.5K tok/s MFU - data wait 0.0% ETA 1:40",
        " 501/1500 ( 33.4%) loss 12346 mlm 6.0000 rtd - clm - rtd acc -"
        " (base -) sampled right -"
        " lr 1.00e-03 0 tok/s MFU - data wait 0.0% ETA 2220:00:00",
        "501/1500 held-out: rtd auc 0.7000 tokens 40",
    ]
    assert "\r" not in out.getvalue()


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "lo', b"\x00" * 30])
def test_a_resumed_run_has_the_bytes_of_the_unbroken_one(tmp_path, torn):
    train(tmp_path / "unbroken", 1, 12)
    train(tmp_path / "killed", 1, 8)  # killed after step 8; the checkpoint is of step 5
    for name in ("metrics.jsonl", "timing.jsonl", "evaluation.jsonl"):
        with open(tmp_path / "killed" / name, "ab") as file:
            file.write(torn)
    train(tmp_path / "killed", 6, 12, resumed_step=5, resumed_tokens=5 * 4096)
    assert content(tmp_path / "killed") == content(tmp_path / "unbroken")
    steps = [record["step"] for record in read_records(tmp_path / "killed" / "timing.jsonl")]
    assert steps == list(range(1, 13))
    assert len(list((tmp_path / "killed").iterdir())) == 3  # no temporary file is left


def test_throughput_after_a_resume_counts_new_tokens_only(tmp_path):
    clock = Clock()
    options = {"resumed_step": 5, "resumed_tokens": 9000, "clock": clock}
    with Monitor(tmp_path, 10, stream=io.StringIO(), **options) as log:
        clock.now += 1
        log.log(6, {"tokens": 10_000})
    assert read_records(tmp_path / "timing.jsonl")[0]["tokens_per_s"] == 1000.0


def test_starting_anew_empties_the_records(tmp_path):
    train(tmp_path, 0, 6)
    train(tmp_path, 1, 2)
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]
    assert read_records(tmp_path / "evaluation.jsonl") == []


@pytest.mark.parametrize("line", [b"noise", b"[]", b"{}", b'{"step": "3"}', b"\xff", b"null", b""])
def test_a_damaged_line_is_named(tmp_path, line):
    train(tmp_path, 1, 4)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + line + b"\n" + lines[2])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
        Monitor(tmp_path, 12, resumed_step=3)
    assert path.read_bytes() == before


def test_lines_are_there_the_moment_they_are_logged(tmp_path):
    """A process killed right after log() has lost nothing."""
    code = (
        "import os, signal, sys\nfrom metro_ext.monitor import Monitor\n"
        "log = Monitor(sys.argv[1], 10)\nlog.log(3, {'loss': 1.5})\n"
        "log.log_evaluation(3, {'a': 2.5})\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert process.returncode == -9 and "loss  1.5000" in process.stdout
    assert read_records(tmp_path / "metrics.jsonl")[0]["loss"] == 1.5
    assert read_records(tmp_path / "evaluation.jsonl") == [{"step": 3, "a": 2.5}]


def test_a_full_disk_is_one_sentence(tmp_path):
    with (
        open("/dev/full", "ab", buffering=0) as full,
        Monitor(tmp_path, 10, stream=io.StringIO()) as log,
    ):
        log._records["timing.jsonl"]._file = full
        with pytest.raises(UserError, match=r"cannot write .*timing\.jsonl: No space left"):
            log.log(2, {"loss": 1.0})


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Monitor(tmp_path / "file" / "run", 10)


def test_sync_reaches_the_disk(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")),
                                                 real(fd)))  # fmt: skip
    with Monitor(tmp_path, 10, stream=io.StringIO()) as log:
        log.sync()
    names = {os.path.basename(path) for path in synced}
    assert names >= {"metrics.jsonl", "timing.jsonl", "evaluation.jsonl"}

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Monitor(tmp_path, 10, stream=io.StringIO()) as log:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match="Input/output error"):
            log.sync()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1234, "1.23K"),
        (18_249, "18.2K"),
        (470_000, "470K"),
        (1.5e6, "1.5M"),
    ],
)
def test_thousands(value, text):
    assert progress.thousands(value) == text


def test_numbers_survive_json(tmp_path):
    with Monitor(tmp_path, 10**6, stream=io.StringIO()) as log:
        values = [torch.rand((), dtype=torch.float64).item() for _ in range(50)]
        for step, value in enumerate(values):
            log.log_evaluation(step, {"x": value, "y": torch.tensor(value)})
    lines = (tmp_path / "evaluation.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["x"] for record in records] == values
    assert all(
        record["y"] == torch.tensor(v).item() for record, v in zip(records, values, strict=True)
    )
