"""The README's examples run as they stand."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metro_ext.sample_text import sample_paths

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("python -m metro_ext.")
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, finished) -> Path:
    """A folder as the README's reader has it after the first command."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "runs").mkdir()
    (folder / "runs" / "default").symlink_to(finished)
    (folder / "books").mkdir()
    train, valid = sample_paths()
    (folder / "books" / "one.txt").write_bytes(train.read_bytes())
    shutil.copy(valid, folder / "held-out.txt")
    return folder


def test_examples_were_found():
    assert len(PYTHON) >= 2 and len(COMMANDS) >= 6


@pytest.mark.parametrize("example", PYTHON)
def test_python_example(example, workplace):
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=workplace, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_commands_in_their_order(workplace):
    for command in COMMANDS:
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=workplace, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout, command


def test_ci_finds_the_test_command():
    lines = [line for line in README.splitlines() if line.endswith("&& pytest -n 2")]
    assert len(lines) == 1 and lines[0].startswith("python3 -m venv .venv && ")
