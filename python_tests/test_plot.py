"""The picture of a run shows the numbers of its records, and only panels that have some."""

import io
import math
import struct
import subprocess
import sys

import pytest

from metro_ext.errors import UserError
from metro_ext.monitor import Monitor
from metro_ext.plot import plot_run, run_figure


def record(run_dir, *, rtd, evaluations=True):
    with Monitor(run_dir, 40, stream=io.StringIO()) as log:
        for step in range(10, 50, 10):
            values = {"mlm_loss": 9 - step / 10, "tokens": step}
            if rtd:
                values |= {"rtd_loss": math.nan if step == 20 else 4 / step, "rtd_accuracy": 0.8}
            log.log(step, values)
            if evaluations:
                log.log_evaluation(step, {"mlm_loss": 8 - step / 10, "unigram_loss": 5.5}
                                   | ({"rtd_auc": step / 50} if rtd else {}))  # fmt: skip


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


def test_curves_hold_the_records(tmp_path):
    record(tmp_path, rtd=True)
    shown = panels(run_figure(tmp_path))
    assert len(shown) == 6
    loss = shown["Replaced token detection: loss"].lines[0]
    assert list(loss.get_xdata()) == [10, 20, 30, 40]
    assert loss.get_ydata()[0] == 0.4 and math.isnan(loss.get_ydata()[1])
    held_out = shown["Held-out masked-token loss"]
    assert list(held_out.lines[0].get_ydata()) == [7, 6, 5, 4]
    assert set(held_out.lines[1].get_ydata()) == {5.5}  # the level of the unigram model
    assert list(shown["Replaced token detection, held-out"].lines[0].get_ydata())[-1] == 0.8
    for axes in shown.values():
        assert axes.get_xlabel() == "step" and axes.get_ylabel()


def test_panels_without_numbers_are_left_out(tmp_path):
    record(tmp_path, rtd=False)
    assert len(panels(run_figure(tmp_path))) == 3
    record(tmp_path, rtd=False, evaluations=False)
    assert set(panels(run_figure(tmp_path))) == {"Vocabulary losses", "Throughput"}


def test_the_image_is_written(tmp_path):
    record(tmp_path, rtd=True)
    path = plot_run(tmp_path)
    data = path.read_bytes()
    assert path == tmp_path / "training.png" and data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (3 * 600, 2 * 456)


def test_a_folder_without_records(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl, found none"):
        plot_run(tmp_path)
    for arguments in ([str(tmp_path)], [], ["--help-me"]):
        command = [sys.executable, "-m", "metro_ext.plot", *arguments]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
        assert process.stderr.startswith("error: expected the folder of")
    assert not list(tmp_path.iterdir())
