"""The training loop of one rank: batches in, optimizer steps, records and checkpoints out.

The micro-batches of a step are numbered over all ranks, and everything random about one follows its
number. N ranks that share `run.accumulation` micro-batches therefore make the update of one process
that takes them in turn, up to the rounding of a sum.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from metro_ext import checkpoint
from metro_ext.batches import BatchSource, evaluation_batches, micro_batch_index, prefetch
from metro_ext.config import differences, from_dict, to_dict
from metro_ext.cuda_graph import GraphedStep, wanted
from metro_ext.distributed import AgreedError, World
from metro_ext.errors import UserError
from metro_ext.guards import StopRequest, Watchdog
from metro_ext.hardware import choose_device
from metro_ext.health import Health
from metro_ext.held_out import evaluate
from metro_ext.model import PAD_ID
from metro_ext.monitor import Monitor
from metro_ext.objective import Objective, mask_count
from metro_ext.optim import AdamW, learning_rate
from metro_ext.parallel import engine
from metro_ext.prepare import Prepared, unigram_nats
from metro_ext.tally import Tally
from metro_ext.train_step import StepInputs, TrainStep

CHECKPOINTS = "checkpoints"
FAULTS = "faults"  # what a run that ended on skipped steps leaves for metro_ext.replay
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Keys that change what a run reports, how long it is or who computes it, not what a step computes.
RESUMABLE_KEYS = {
    "run.dir", "run.steps", "run.log_interval", "run.eval_interval", "run.eval_batches",
    "run.checkpoint_interval", "run.keep_checkpoints", "run.tensorboard", "run.recompute",
    "run.graph", "run.max_skipped", "run.hang_timeout",
    "parallel.mode", "parallel.backend", "parallel.timeout",
}  # fmt: skip


class Trainer:
    """One run: model, optimizer, data and records, from a configuration.

    Args:
        prepared: tokenizer, corpora, and the configuration with its vocabulary size filled in.
        world: this rank among all.

    Raises:
        UserError: a device is missing, the ranks cannot share the micro-batches of a step,
            run.graph asks for a graph where there can be none, or run.compile and a schedule meet.
    """

    def __init__(self, prepared: Prepared, world: World):
        self.config, self.prepared, self.world = prepared.config, prepared, world
        run_config, model_config = self.config.run, self.config.model
        self.folder = Path(run_config.dir)
        self.device = choose_device(run_config.device, world.local_rank)
        self.dtype = DTYPES[run_config.precision]
        self.graphed = wanted(
            run_config.graph, self.device, world.distributed, compiled=run_config.compile
        )
        if run_config.accumulation % world.size:
            raise UserError(
                "run.accumulation, the micro-batches of a step, must be a multiple of the number "
                f"of ranks, found {run_config.accumulation} for {world.size} ranks"
            )
        if run_config.compile and self.config.objective.has_schedule:
            raise UserError(
                "objective.sampling_temperature_end and objective.mlm_weight_end go with "
                "run.compile=false: a compiled step has them as constants"
            )
        self.accumulation = run_config.accumulation // world.size  # of this rank
        special = torch.tensor(prepared.tokenizer.special_ids, device=self.device)
        self.objective = Objective(
            self.config.objective, special, prepared.tokenizer.mask_id, self.dtype
        )
        self.engine = engine(self.config, self.objective, self.device, world)
        self.model = self.engine.model
        self.optimizer = AdamW(self.engine, self.config.optim)
        self.source = BatchSource(
            prepared.train,
            run_config.tokens_per_batch,
            model_config.sequence_length,
            run_config.seed,
        )
        self.unigram_nats = unigram_nats(prepared.train)
        self.step = 0
        self.tokens = 0
        # Of the interval that the next line reports; part of a checkpoint, so that a resumed run
        # writes the same line.
        warm_up = self.config.optim.warmup_steps
        self.tally = Tally(self.device, run_config.max_skipped, warm_up)
        self.interval_steps = 0
        self.records: dict[str, str] = {}  # checksums of the records at the last checkpoint
        settings = self.config.objective
        at_1 = settings.sampling_temperature == 1.0 and settings.sampling_temperature_end == 0.0
        self.health = Health(warm_up, at_1)

    def train(self, monitor: Monitor, stop: StopRequest | None = None) -> bool:
        """Trains from the current step to the last.

        Args:
            stop: asks to save and return after the current step; with several ranks on CUDA, at
                the next one that is reported. It is enough that one rank was asked.

        Returns:
            Whether all steps were taken.
        """
        config, first, stop = self.config.run, self.step, stop or StopRequest()
        self.model.train()
        indices = (
            micro_batch_index(step, micro, self.world.rank, self.world.size, self.accumulation)
            for step in range(first, config.steps)
            for micro in range(self.accumulation)
        )
        depth = 2 * self.accumulation
        with (
            contextlib.closing(prefetch(self.source, indices, depth)) as batches,
            Watchdog(config.hang_timeout) as watchdog,
        ):
            upcoming = list(itertools.islice(batches, self.accumulation))
            inputs = StepInputs(upcoming, self.device)
            inputs.counts.copy_(self.world.sum(self.terms(upcoming)))
            take_step = self._prepared_step(inputs)
            for step in range(first + 1, config.steps + 1):
                watchdog.alive()
                current, upcoming = upcoming, list(itertools.islice(batches, self.accumulation))
                rate = learning_rate(step, config.steps, self.config.optim)
                inputs.fill(step, current, self.terms(upcoming), rate)
                inputs.stop.fill_(stop.asked)
                self.objective.set_step(step, config.steps)
                take_step()
                self.step = step
                self.tokens += config.tokens_per_batch * config.accumulation
                self.interval_steps += 1
                if not self._report(monitor, rate, stop, watchdog):
                    return False
        return True

    def _report(self, monitor: Monitor, rate: float, stop: StopRequest, watchdog: Watchdog) -> bool:
        """Logs, evaluates and saves, where the step is due; whether the run goes on."""
        config, step = self.config.run, self.step
        last = step == config.steps
        log_due = step % config.log_interval == 0 or last
        evaluation_due = _due(step, config.eval_interval) or last
        checkpoint_due = _due(step, config.checkpoint_interval) or last
        # On the CPU there is nothing to wait for.
        reads = self.device.type == "cpu" or log_due or evaluation_due or checkpoint_due
        if reads:
            self._check_finite()
        # Several processes have to come to the same answer at the same step.
        asked = stop.asked
        if self.world.distributed:
            asked = reads and self.tally.stop.item() > 0
        if log_due:
            self._log(monitor, rate)
        monitor.tick(step)
        if evaluation_due:
            with monitor.untimed():
                monitor.log_evaluation(step, self.evaluate())
            watchdog.alive()
        if checkpoint_due or asked:
            with monitor.untimed():
                self.records = monitor.sync()
                self.save()
            watchdog.alive()
        return last or not asked

    def _prepared_step(self, inputs: StepInputs) -> Callable[[], None]:
        step = TrainStep(self.config, self.engine, self.optimizer, self.world, inputs, self.tally)
        if not self.graphed:
            return step
        return GraphedStep(step, self.device, lambda: self.objective.constants)

    def _check_finite(self) -> None:
        """Waits for the steps so far.

        Raises:
            AgreedError: too many steps in a row had no finite loss and gradient; what it takes to
                repeat the first of them is on disk.
        """
        _, in_row, last, loss, norm = self.tally.skipped.tolist()
        if in_row < self.tally.limit:
            return
        first = int(last - in_row + 1)
        with contextlib.suppress(UserError):  # a full disk must not hide the fault
            self._save_fault(first, int(last), {"loss": repr(loss), "grad_norm": repr(norm)})
        raise AgreedError(
            f"step {first} and the {in_row - 1:.0f} after it: expected a finite loss and gradient, "
            f"found loss {loss} and gradient norm {norm}; look into it with python -m "
            f"metro_ext.replay {self.folder}, try a lower optim.lr or a longer warm-up in a new "
            "run, or go on past these batches with a larger --run.max_skipped (checkpoints are in "
            f"{self.folder / CHECKPOINTS})"
        )

    def _save_fault(self, first: int, last: int, found: dict[str, str]) -> None:
        """The weights that the skipped steps met, and the batches of the first of them."""
        micros = self.config.run.accumulation
        indices = [micro_batch_index(first - 1, micro, 0, 1, micros) for micro in range(micros)]
        state = {
            "config": to_dict(self.config),
            "tokenizer_sha256": self.prepared.tokenizer.sha256,
            "skipped_steps": [first, last],
            "batches": [
                {
                    "rank": index % self.world.size,
                    "index": index,
                    "seed": int(self.source.batch(index).seed),
                    "documents": self.source.documents(index),
                }
                for index in indices
            ],
            **found,
        }
        tensors = self._whole(part for part in self._parts() if part[0].startswith("model."))
        self.world.together(
            lambda: (
                checkpoint.save_checkpoint(self.folder / FAULTS, first - 1, tensors, state)
                if self.world.is_first
                else None
            )
        )

    def terms(self, batches: list) -> Tensor:
        """float64 [3]: the MLM, RTD and CLM terms in this rank's micro-batches of a step."""
        special = torch.tensor(self.prepared.tokenizer.special_ids)
        masked = tokens = 0
        for batch in batches if self.config.run.accumulation > 1 else ():
            maskable = int((~torch.isin(batch.tokens, special)).sum())
            count = mask_count(batch.tokens.numel(), self.config.objective.mask_fraction)
            masked += min(count, maskable)
            tokens += int((batch.tokens != PAD_ID).sum())
        clm = tokens if self.model.objective == "clm-all" else masked
        return torch.tensor([masked, tokens, clm], dtype=torch.float64)

    def _log(self, monitor: Monitor, rate: float) -> None:
        figures, warnings = self.tally.report(self.interval_steps, self.model.auxiliary is not None)
        figures |= {"lr": rate, "tokens": self.tokens}
        if self.config.objective.has_schedule:
            figures["sampling_temperature"], figures["mlm_weight"] = self.objective.constants
        monitor.log(self.step, figures)
        for sentence in warnings + self.health.warnings(self.step, figures):
            monitor.warn(sentence)
        self.tally.clear()
        self.interval_steps = 0

    def evaluate(self) -> dict[str, float | None]:
        """Figures on the held-out corpus; every rank computes them all, so that none can differ."""
        batches = evaluation_batches(
            self.prepared.valid,
            self.config.run.tokens_per_batch,
            self.config.model.sequence_length,
        )
        limited = itertools.islice(batches, self.config.run.eval_batches)
        self.objective.set_step(self.step, self.config.run.steps)
        return evaluate(self.model, self.engine.run, limited, self.device, self.unigram_nats)

    def save(self) -> None:
        """A checkpoint of the current step, written by rank 0; older ones than the last k go."""
        tensors = self._whole(self._parts())
        tensors |= {f"interval.{name}": value for name, value in self.tally.tensors().items()}
        state = {
            "config": to_dict(self.config),
            "tokens": self.tokens,
            "interval_steps": self.interval_steps,
            "records": self.records,
            "tokenizer_sha256": self.prepared.tokenizer.sha256,
        }
        self.world.together(lambda: self._write(tensors, state) if self.world.is_first else None)

    def _whole(self, parts: Iterable[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        """Rank 0's tensors of a checkpoint; a collective, in which the others only take part."""
        tensors = {}
        for key, name, part in parts:
            whole = self.engine.whole(name, part)
            if self.world.is_first:
                tensors[key] = whole.cpu() if self.world.distributed else whole
        return tensors

    def _parts(self) -> list[tuple[str, str, Tensor]]:
        """(key in a checkpoint, parameter, this rank's part) of all that training changes."""
        parameters = self.engine.named_parameters()
        found = [(f"model.{name}", name, value.detach()) for name, value in parameters]
        for key, value in self.optimizer.tensors().items():  # exp_avg.main.layers.0...
            found.append((f"optimizer.{key}", key.split(".", 1)[1], value))
        return found

    def _write(self, tensors: dict[str, Tensor], state: dict) -> None:
        folder = self.folder / CHECKPOINTS
        checkpoint.save_checkpoint(folder, self.step, tensors, state)
        checkpoint.prune(folder, self.config.run.keep_checkpoints)

    def resume(self) -> bool:
        """Loads the newest whole checkpoint, if there is any; every rank reads it.

        Raises:
            UserError: it belongs to another configuration, or none is whole.
        """
        folder = self.folder / CHECKPOINTS
        if self.world.is_first:
            checkpoint.clean_leftovers(folder)
        if not checkpoint.checkpoint_steps(folder):
            return False
        found = checkpoint.load_checkpoint(folder)
        for sentence in found.damaged if self.world.is_first else ():
            print(f"warning: damaged checkpoint passed over: {sentence}", file=sys.stderr)
        self._check_same_run(found.state)
        with torch.no_grad():
            for key, name, part in self._parts():
                part.copy_(self.engine.part(name, found.tensors[key]))
            for name, value in self.tally.tensors().items():
                value.copy_(found.tensors[f"interval.{name}"])
        self.interval_steps, self.records = found.state["interval_steps"], found.state["records"]
        self.step, self.tokens = found.step, found.state["tokens"]
        return True

    def _check_same_run(self, state: dict) -> None:
        changed = [
            key
            for key in differences(from_dict(state["config"]), self.config)
            if key not in RESUMABLE_KEYS
        ]
        if changed:
            raise UserError(
                f"{self.folder} holds a run with another configuration ({', '.join(changed)} "
                "differ); give the same options to resume it, or another --run folder"
            )
        if state["tokenizer_sha256"] != self.prepared.tokenizer.sha256:
            raise UserError(f"{self.folder} holds a run with another tokenizer")


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
