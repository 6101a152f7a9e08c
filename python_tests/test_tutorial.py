"""The tutorial's commands run as they stand, in their order, but for the length of training."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import read_page

import metro_ext

PACKAGE = Path(metro_ext.__file__).parent
TUTORIAL = (PACKAGE / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", TUTORIAL, re.DOTALL)
STEPS = "--steps 1500"


@pytest.fixture
def environment(tmp_path):
    """`python` is this interpreter, and finds this package."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}


def test_from_text_to_a_model_in_transformers(tmp_path, environment):
    pytest.importorskip("transformers", reason="needs the extra export")
    place = tmp_path / "home"
    place.mkdir()
    assert sum(block.count(STEPS) for _, block in BLOCKS) == 2
    said = []
    for language, block in BLOCKS:
        block = block.replace(STEPS, "--steps 4 --run.eval_batches=2")
        command = ["bash", "-euo", "pipefail", "-c", block]
        if language == "python":
            command = [sys.executable, "-c", block]
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    assert re.fullmatch(r"MPNetModel \(2, \d+, 128\)\n", said[-1]), said[-1]
    assert any("▁" in one for one in said)
    for name in ("runs/books/report.html", "compare.html"):
        tree = read_page((place / name).read_text(encoding="utf-8"))
        assert tree.all("article") and tree.all("figure")
    assert "objective.name" in tree.text  # what the two runs differ in


def test_installing_is_what_the_readme_says():
    """It is played in CI, with the README's command; the extra is one that there is."""
    (command,) = re.findall(r"```console\n(.*?)```", TUTORIAL, re.DOTALL)
    project = Path(__file__).parents[1]
    readme = (project / "README.md").read_text(encoding="utf-8")
    start, _, packages = command.strip().partition(" pip install ")
    assert f"{start} pip install 'torch>=2.10,<2.14' ." in readme
    assert packages == "'torch>=2.10,<2.14' '.[export]'"
    assert re.search(r"^export = \[", (project / "pyproject.toml").read_text(), re.M)
