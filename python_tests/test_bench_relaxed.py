"""The record of relaxed synchronisation, from runs that are there already."""

import json

import pytest

from bench import books, relaxed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(books, "prepare", lambda folder, vocab_size: [])
    monkeypatch.setattr(relaxed.subprocess, "run", lambda *_, **__: pytest.fail("trained again"))
    runs = [
        (name, 4.0 + 0.1 * number, 1000 if name.startswith("ddp") else 40)
        for number, name in enumerate(relaxed.RUNS)
    ]
    for name, loss, sent in runs:
        run = tmp_path / name
        run.mkdir()
        records = [
            {"step": step, "mlm_loss": value, "rtd_loss": 0.3, "clm_loss": 5.0,
             "unigram_loss": 6.0, "sent_bytes": sent * step // relaxed.STEPS}
            for step, value in ((250, 5.0), (relaxed.STEPS, loss))
        ]  # fmt: skip
        (run / "evaluation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        timing = [{"step": 250, "seconds": 2.0}, {"step": 500, "seconds": 3.5}]
        (run / "timing.jsonl").write_text("".join(json.dumps(r) + "\n" for r in timing))
    return tmp_path


def test_cases_compare_with_ddp(folder):
    found, curves = relaxed.cases(folder)
    ddp, other = found[0], found[list(curves).index("relaxed-4e-3")]
    assert ddp.ours == other.ours == 5.5 and list(curves) == list(relaxed.RUNS)
    assert ddp.figures["weighted_loss"] == pytest.approx(4.0 + 50 * 0.3 + 5.0)
    assert other.figures["mlm_loss_over_ddp-4e-3"] == pytest.approx(4.3 / 4.0)
    assert other.figures["mlm_loss_over_ddp-6e-3"] == pytest.approx(4.3 / 4.1)
    assert other.figures["weighted_loss_over_best_ddp"] == pytest.approx(24.3 / 24.0)
    assert other.figures["ddp_bytes_over_these"] == 25.0
    assert [point["step"] for point in other.figures["curve"]] == [250, relaxed.STEPS]
    assert relaxed.plot(curves).startswith(b"\x89PNG")


def test_a_run_that_broke_off_goes_on(folder):
    records = (folder / "ddp-4e-3" / "evaluation.jsonl").read_text().splitlines()
    (folder / "ddp-4e-3" / "evaluation.jsonl").write_text(records[0] + "\n")
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        relaxed.cases(folder)
