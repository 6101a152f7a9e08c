"""What a run's folder holds, for its report: configuration, records, checkpoint."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metro_ext.checkpoint import CHECKPOINTS, checkpoint_steps
from metro_ext.config import load_config
from metro_ext.config_schema import Config
from metro_ext.errors import UserError
from metro_ext.health import Health
from metro_ext.monitor import EVALUATION_FILE, METRICS_FILE, TIMING_FILE, read_records
from metro_ext.tokenizer import TOKENIZER_FILE
from metro_ext.train import CONFIG_FILE

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A run's folder as read.

    name: the shortest end of its path that no other run of the report has.
    records: by file name.
    tokenizer: SHA-256 of its file; None where there is none.
    has_checkpoint: whether its weights can be looked for.
    """

    name: str
    folder: Path
    config: Config
    records: dict[str, Records]
    tokenizer: str | None
    has_checkpoint: bool

    @property
    def step(self) -> int:
        """The last step that is recorded."""
        return max((records[-1]["step"] for records in self.records.values() if records), default=0)

    def last(self, file: str) -> dict[str, Any]:
        """The last record of a file; empty where there is none."""
        return self.records[file][-1] if self.records[file] else {}

    def warnings(self) -> list[str]:
        """What the records say of the run's health, with the remedies."""
        settings = self.config.objective
        at_1 = settings.sampling_temperature == 1.0 and settings.sampling_temperature_end == 0.0
        health = Health(self.config.optim.warmup_steps, at_1)
        found = []
        for record in self.records[METRICS_FILE]:
            found += health.warnings(record["step"], finite(record))
        for key, meaning in _FAULTS.items():
            total = sum(record.get(key) or 0 for record in self.records[METRICS_FILE])
            if total:
                steps = [r["step"] for r in self.records[METRICS_FILE] if r.get(key)]
                found.append(f"{meaning}: {total}, the last up to step {steps[-1]}")
        return found


_FAULTS = {
    "skipped_steps": "steps skipped for want of a finite loss and gradient",
    "loss_spikes": "steps whose loss jumped far above the running median",
}


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """A record with None for what is NaN, infinite or no number."""
    return {key: number(value) for key, value in record.items()}


def number(value: Any) -> int | float | None:
    """The value if it is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in these folders.

    Raises:
        UserError: a folder is named twice or holds no run, or a file in it is damaged.
    """
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise UserError(f"expected each run once, found {folders[place]} twice")
    return [_read(path, _short_name(path, resolved)) for path in resolved]


def _short_name(folder: Path, others: list[Path]) -> str:
    for count in range(1, len(folder.parts)):
        end = folder.parts[-count:]
        if sum(other.parts[-count:] == end for other in others) == 1:
            return "/".join(end)
    return str(folder)


def _read(folder: Path, name: str) -> Run:
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: expected the folder of a run with {CONFIG_FILE}, found none")
    files = (METRICS_FILE, EVALUATION_FILE, TIMING_FILE)
    tokenizer = folder / TOKENIZER_FILE
    return Run(
        name=name,
        folder=folder,
        config=load_config(toml_path=folder / CONFIG_FILE),
        records={file: read_records(folder / file) for file in files},
        tokenizer=hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        if tokenizer.is_file()
        else None,
        has_checkpoint=bool(checkpoint_steps(folder / CHECKPOINTS)),
    )
