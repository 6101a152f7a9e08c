"""Programs that show runs, beside the run's own records: TensorBoard, Weights & Biases.

Each takes the same calls (`Board`); which of them a run has is said by `run.tensorboard` and
`run.wandb`. Nothing leaves the machine: Weights & Biases writes into the run's folder, unless the
environment says otherwise (WANDB_MODE=online).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from metro_ext.config_schema import RunConfig
from metro_ext.errors import UserError

PROJECT = "metro-ext"


class Board(Protocol):
    """Takes numbers by name; closed at the run's end."""

    def add(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def require_boards(config: RunConfig) -> None:
    """Raises UserError where one that the configuration asks for is not installed."""
    if config.tensorboard:
        _summary_writer()
    if config.wandb:
        _wandb()


def open_boards(
    config: RunConfig, folder: Path, resumed_step: int, settings: Mapping[str, Any]
) -> list[Board]:
    """The boards that a run's configuration asks for.

    Args:
        folder: of the run; each board writes into a folder of its own in it.
        resumed_step: what was told of later steps is told anew; 0 for a run that begins.
        settings: the whole configuration as plain values, to be shown with the run.

    Raises:
        UserError: one is not installed, or cannot be started.
    """
    require_boards(config)
    boards: list[Board] = []
    if config.tensorboard:
        boards.append(TensorBoard(folder, resumed_step))
    if config.wandb:
        boards.append(WeightsAndBiases(folder, resumed_step, settings))
    return boards


class TensorBoard:
    """Event files in `folder/tensorboard`."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self._writer = _summary_writer()(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in `folder/wandb`, to be sent with `wandb sync` or read with `wandb beta leet`.

    A resumed run goes on under the same id. Steps are a number like any other, against which the
    rest is drawn: Weights & Biases' own count may not go back to a checkpoint.
    """

    def __init__(self, folder: Path, resumed_step: int, settings: Mapping[str, Any]) -> None:
        wandb = _wandb()
        latest = folder / "wandb" / "latest-run"  # a link to ...run-DATE_TIME-ID
        known = resumed_step > 0 and latest.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.resolve().name,
                dir=str(folder),
                config=dict(settings),
                id=latest.resolve().name.rpartition("-")[2] if known else None,
                resume="allow" if known else None,
                mode=os.environ.get("WANDB_MODE", "offline"),
                settings=wandb.Settings(console="off", silent=True, save_code=False),
            )
        except (wandb.Error, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"run.wandb is true, but Weights & Biases cannot start: {reason}; see to that or "
                "leave run.wandb out"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        """Nothing to do: a process of its own writes what it is told at once."""

    def close(self) -> None:
        self._run.finish()


def _summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard", "TensorBoard") from None
    return SummaryWriter


def _wandb() -> Any:
    # A folder named wandb in the working folder (Weights & Biases' own habit) can be imported too,
    # as a package without content.
    try:
        import wandb
    except ImportError:
        raise _missing("wandb", "Weights & Biases") from None
    if not hasattr(wandb, "init"):
        raise _missing("wandb", "Weights & Biases")
    return wandb


def _missing(extra: str, name: str) -> UserError:
    return UserError(
        f"run.{extra} is true, but {name} is not installed: pip install 'metro-ext[{extra}]', or "
        f"leave run.{extra} out"
    )
