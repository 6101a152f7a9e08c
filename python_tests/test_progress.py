"""The panel on a terminal, which is a pseudo-terminal here, and plain lines everywhere else."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console
from training_runs import ENVIRONMENT, command

from bench import progress as progress_picture
from metro_ext import progress_live
from metro_ext.monitor import Monitor
from metro_ext.progress_live import CURVE_POINTS, Curve, Panelled

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
VALUES = {"loss": 31.25, "mlm_loss": 5.5, "rtd_loss": None, "lr": 1e-3, "rtd_accuracy": 0.861}
TIMING = {"tokens_per_s": 20_480.0, "mfu": None, "seconds": 2.0, "data_wait": 0.01,
          "peak_mb": 1234.5}  # fmt: skip


def on_a_terminal(words: list[str], columns: int, code: str = "xterm-256color") -> tuple[int, str]:
    """What a command writes to a terminal of so many columns, and its exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        words,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": code},
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # EIO: the last one to hold the other end has gone
            break
        if not part:
            break
        said += part
    os.close(ours)
    return process.wait(timeout=60), said.decode()


def panel(width: int = 100) -> tuple[Panelled, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    return Panelled(console, "runs/here", 1500, 0), stream


def plain(live: Panelled, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(live.picture())
    return console.file.getvalue().splitlines()


@pytest.fixture(scope="module")
def on_terminal(text, tmp_path_factory) -> tuple[str, object]:
    """A run of 12 steps with a terminal: what it wrote, and its folder."""
    folder = tmp_path_factory.mktemp("terminal") / "run"
    code, said = on_a_terminal(command(folder, "--steps", "12", *text), columns=90)
    assert code == 0, said
    return said, folder


def test_a_run_on_a_terminal_shows_a_panel(on_terminal):
    said, _ = on_terminal
    assert "\x1b[" in said  # colours, and the cursor going up to draw anew
    shown = ESCAPES.sub("", said)
    assert re.search(r"12/12\s+100\.0%", shown) and "held-out at 12" in shown
    assert "waiting for data" in shown and "learning rate" in shown
    assert "(base" not in shown  # no plain line beside it
    last = shown[shown.rindex("╭") :]
    assert last.count("│") == 2 * (last[: last.index("╯")].count("\n") - 1)  # each line has both
    assert "try next" in last[last.index("╯") :]  # the run's last words are below the panel


def test_the_cursor_is_not_hidden(on_terminal):
    """A run that is killed could not bring it back."""
    assert "\x1b[?25l" not in on_terminal[0]


def test_the_records_are_those_of_a_run_without_a_terminal(on_terminal, text, tmp_path):
    _, folder = on_terminal
    words = command(tmp_path / "run", "--steps", "12", *text)
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "12/12 (100.0%)" in done.stdout and "(base" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr and "│" not in done.stdout
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()


MONITOR = (
    "import sys\nfrom metro_ext.monitor import Monitor\n{before}\n"
    "with Monitor(sys.argv[1], 10) as log:\n"
    "    log.log(5, {{'loss': 1.5, 'tokens': 10}})\n    log.warn('too hot')\n    print('between')\n"
)


@pytest.mark.parametrize(
    ("before", "terminal", "panelled"),
    [
        ("", "xterm", True),
        ("", "dumb", False),
        ("sys.modules['rich'] = None", "xterm", False),  # as if it were not installed
    ],
)
def test_where_there_is_a_panel(tmp_path, before, terminal, panelled):
    words = [sys.executable, "-c", MONITOR.format(before=before), str(tmp_path)]
    code, said = on_a_terminal(words, 100, terminal)
    assert code == 0, said
    assert ("╭" in said) == panelled and ("5/10 ( 50.0%)" in said) == (not panelled)
    shown = ESCAPES.sub("", said)
    assert "warning: too hot" in shown and "between" in shown
    if panelled:  # what was said in between stands above the panel that is left
        assert shown.index("too hot") < shown.index("between") < shown.rindex("╭")


def test_rows_of_what_the_objective_has():
    live, _ = panel()
    assert any("first interval" in line for line in plain(live))
    live.interval(500, VALUES, TIMING, eta=100.0)
    live.evaluation(500, {"mlm_loss": 5.75, "unigram_loss": 6.5})
    text = "\n".join(plain(live))
    assert "runs/here" in text and "500/1500" in text and "33.3%" in text and "1:40 left" in text
    assert re.search(r"MLM loss +5\.5000 +5\.7500", text) and re.search(r"alone +6\.5000", text)
    assert "RTD loss" not in text and re.search(r"RTD accuracy +86\.1%", text)
    assert "20.5K tokens/s" in text and "MFU -" in text and "data 1.0%" in text
    assert "skipped" not in text
    live.interval(550, {**VALUES, "skipped_steps": 2, "mlm_loss": float("nan")}, TIMING, 1.0)
    text = "\n".join(plain(live))
    assert "skipped steps 2" in text and re.search(r"MLM loss +nan", text)
    live.close()


@pytest.mark.parametrize("width", [20, 60, 200])
def test_it_fits_any_terminal(width):
    live, _ = panel(width)
    live.interval(500, VALUES, TIMING, eta=100.0)
    assert all(len(line) <= width for line in plain(live, width))
    live.close()


def test_drawings_are_rare():
    now = [0.0]
    live, stream = panel()
    live._clock = lambda: now[0]
    for step in range(1, 101):
        now[0] += progress_live.REDRAW_SECONDS / 10
        live.tick(step)
    assert 10 <= stream.getvalue().count("╭") <= 11
    live.close()


def test_a_monitor_that_is_never_told_anything_draws_nothing(tmp_path):
    live, stream = panel()
    live.close()
    assert stream.getvalue() == ""
    with Monitor(tmp_path, 10, stream=(lines := io.StringIO())) as log:
        log.tick(1)
    assert lines.getvalue() == ""


@pytest.mark.parametrize(
    ("values", "shown"),
    [([], ""), ([1.0], ""), ([1, 1], "▁▁"), ([0, 7], "▁█"), (range(8), "▁▂▃▄▅▆▇█"),
     (range(16), "▁▂▃▄▅▆▇█"), (range(17), "▁▂▃▄▅▆▇█")],
)  # fmt: skip
def test_curve(values, shown):
    curve = Curve()
    for value in values:
        curve.add(value)
    assert curve.text(8) == shown


def test_a_curve_of_any_length_is_bounded_and_keeps_its_shape():
    curve = Curve()
    for step in range(100_000):
        curve.add(float(step))
    assert len(curve._points) < CURVE_POINTS and curve.text(8) == "▁▂▃▄▅▆▇█"


def test_the_picture_of_a_run(on_terminal, tmp_path, capsys):
    output = tmp_path / "run.svg"
    progress_picture.main([str(on_terminal[1]), str(output), "--step", "9"])
    assert "kB" in capsys.readouterr().out
    svg = output.read_text(encoding="utf-8")
    root = ElementTree.fromstring(svg)
    text = "".join(root.itertext()).replace("\xa0", " ")
    assert "9/12" in text and "held-out at 8" in text
    assert len(svg) < 200_000 and not re.search(r"url\(.?http|href", svg)
