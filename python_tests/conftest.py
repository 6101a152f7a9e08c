from pathlib import Path

import pytest
from training_runs import train

from metro_ext.sample_text import sample_paths


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> list[str]:
    """A training and a held-out text of a few pages."""
    folder = tmp_path_factory.mktemp("text")
    for path, size in zip(sample_paths(), (60_000, 20_000), strict=True):
        words = path.read_text(encoding="utf-8")[:size]
        (folder / path.name).write_text(words, encoding="utf-8")
    paths = [folder / path.name for path in sample_paths()]
    return [f"--data.train={paths[0]}", f"--data.valid={paths[1]}"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, text) -> Path:
    """A whole run of 20 steps."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    done = train(folder, "--steps", "20", *text)
    assert "20/20" in done.stdout and "try next" in done.stdout
    return folder
