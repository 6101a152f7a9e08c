"""The tensors that training changes, by their keys in a checkpoint: this rank's part of each.

``model.NAME`` are weights, ``optimizer.KEY.NAME`` moments and step counts, ``outer.NAME`` the outer
weights and momentum of relaxed synchronisation, ``interval.NAME`` the figures that the next line of
the log reports. Where ranks train apart, what each has of its own has its rank before it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from metro_ext import checkpoint
from metro_ext.distributed import World
from metro_ext.optim import AdamW
from metro_ext.parallel import Local
from metro_ext.relaxed import OuterOptimizer
from metro_ext.saver import Saver
from metro_ext.tally import Tally


class TrainingState:
    """What a checkpoint holds besides counts and settings.

    Args:
        engine, optimizer, outer, tally: whose tensors they are; outer, of relaxed ranks.
        world: this rank among all.
        saver: of the run's checkpoints.
    """

    def __init__(
        self,
        engine: Local,
        optimizer: AdamW,
        outer: OuterOptimizer | None,
        tally: Tally,
        world: World,
        saver: Saver,
    ):
        self._engine, self._optimizer, self._outer = engine, optimizer, outer
        self._tally, self._world, self._saver = tally, world, saver
        self._own = "" if outer is None else f"rank.{world.rank}."

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """A checkpoint with `state`, what JSON can hold, beside the tensors; the oldest goes.

        Raises:
            UserError: it, or the one before, could not be written.
        """
        self._saver.wait()
        tensors = {
            key: self._engine.spread(name, self._saver.stage(key, part))
            for key, name, part in self._parts()
        }
        for key, value in self._interval():
            tensors[key] = self._saver.stage(key, value)
        self._saver.write(step, tensors, state)

    def load(self, step: int) -> None:
        """Fills the tensors from a whole checkpoint of the run, of any number of ranks."""
        staged = [
            (name, part, key, self._saver.stage(key, part)) for key, name, part in self._parts()
        ]
        tensors = {key: self._engine.spread(name, copy) for name, _, key, copy in staged}
        interval = {key: self._saver.stage(key, value) for key, value in self._interval()}
        self._saver.read(step, tensors | interval)
        for _, part, _, copy in staged:
            part.copy_(copy)
        for key, value in self._interval():
            value.copy_(interval[key])
        if self._outer is not None:
            self._outer.restart()

    def save_weights(
        self, folder: Path, step: int, state: Mapping[str, Any], rank: int, timeout: int
    ) -> None:
        """The weights alone, in a folder of checkpoints that keeps one.

        Args:
            rank: whose, where ranks train apart and each has weights of its own.
            timeout: seconds, as parallel.timeout.
        """
        tensors = {
            key: self._engine.spread(name, part.cpu())
            for key, name, part in self._parts()
            if key.startswith("model.")
        }
        if self._outer is None:
            Saver(folder, self._world, 1, False, timeout).write(step, tensors, state)
        elif self._world.rank == rank:
            checkpoint.save_checkpoint(folder, step, tensors, state)

    def _parts(self) -> Iterator[tuple[str, str, Tensor]]:
        """(key, parameter that it is or belongs to, this rank's part) of all but the interval's."""
        for name, value in self._engine.named_parameters():
            yield f"model.{name}", name, value.detach()
        for key, value in self._optimizer.tensors().items():  # exp_avg.main.layers.0...
            yield f"{self._own}optimizer.{key}", key.split(".", 1)[1], value
        if self._outer is not None:
            for name, value in self._outer.tensors().items():
                yield f"outer.{name}", name, value
            for name, value in self._outer.own_tensors().items():
                yield f"{self._own}outer.{name}", name, value

    def _interval(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._tally.tensors().items():
            yield f"{self._own}interval.{name}", value
