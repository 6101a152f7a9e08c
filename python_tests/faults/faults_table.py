"""The table of what was tried and survived: bench/results/faults.json."""

import json
import platform
from collections.abc import Iterable
from pathlib import Path

import torch


def update(path: Path, rows: Iterable[dict]) -> None:
    """Put rows into the table, each in place of an older one of the same test.

    What other commands measured (the sanitizers), and tests not run now, stay.
    """
    before = json.loads(path.read_text()) if path.exists() else {}
    tried = {row["test"]: row for row in before.get("tried", [])}
    tried |= {row["test"]: row for row in rows}
    document = {
        "script": "faults",
        "command": "pytest python_tests/faults --faults-json bench/results/faults.json",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "tried": list(tried.values()),
    }
    path.write_text(json.dumps(before | document, indent=1) + "\n")
