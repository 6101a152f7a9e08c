"""A small English text that ships with the package: see README.md beside this file."""

from importlib import resources
from pathlib import Path


def sample_paths() -> tuple[Path, Path]:
    """The files to train on and to validate on: UTF-8, a paragraph a line, blank between books."""
    folder = resources.files(__name__)
    return Path(str(folder / "train.txt")), Path(str(folder / "valid.txt"))
