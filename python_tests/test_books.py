"""bench/books.py without the books: how it runs and measures a process."""

import subprocess
import sys
from pathlib import Path

import pytest

# Last, so that an installed metro_ext is found before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import books


def test_the_peak_is_that_of_the_process_itself():
    """This one has torch in its memory: more than the smaller of the two."""
    small = books.call_with_peak("timeit", "-n1", "-r1", "pass")
    large = books.call_with_peak("timeit", "-n1", "-r1", "b'x' * 300_000_000")
    assert 1 < small < 100
    assert 300 < large < 400


def test_a_process_that_fails_is_an_error():
    with pytest.raises(subprocess.CalledProcessError):
        books.call_with_peak("timeit", "-n1", "-r1", "raise SystemExit(3)")


def test_waiting_for_data_is_a_share_of_all_intervals(tmp_path):
    lines = ['{"seconds": 3.0, "data_wait": 0.02}', '{"seconds": 1.0, "data_wait": 0.0}']
    (tmp_path / "timing.jsonl").write_text("\n".join(lines) + "\n")
    assert books.data_wait(tmp_path) == pytest.approx(0.015)
