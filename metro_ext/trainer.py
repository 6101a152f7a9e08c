"""The training loop of one rank: batches in, optimizer steps, records and checkpoints out.

The micro-batches of a step are numbered over all ranks, and everything random about one follows its
number. N ranks that share `run.accumulation` micro-batches therefore make the update of one process
that takes them in turn, up to the rounding of a sum; unless they train apart for a while
(`metro_ext.relaxed`).
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from metro_ext import checkpoint, relaxed
from metro_ext.batches import EvaluationSource, micro_batch_index, prefetch, training_source
from metro_ext.boards import require_boards
from metro_ext.checkpoint import CHECKPOINTS
from metro_ext.config import to_dict
from metro_ext.config_schema import Config
from metro_ext.cuda_graph import GraphedStep, wanted
from metro_ext.distributed import AgreedError, World
from metro_ext.errors import UserError
from metro_ext.guards import StopRequest, Watchdog
from metro_ext.hardware import DTYPES, choose_device
from metro_ext.health import Health
from metro_ext.held_out import evaluate
from metro_ext.model import PAD_ID
from metro_ext.monitor import Monitor, Silent
from metro_ext.objective import Objective, mask_count
from metro_ext.optim import AdamW, learning_rate
from metro_ext.parallel import check_mode, engine
from metro_ext.prepare import Prepared, unigram_nats
from metro_ext.same_run import check_same_run
from metro_ext.saver import Saver
from metro_ext.tally import Tally
from metro_ext.train_step import StepInputs, TrainStep
from metro_ext.training_state import TrainingState

FAULTS = "faults"  # what a run that ended on skipped steps leaves for metro_ext.replay


def choose_machine(config: Config, world: World) -> tuple[torch.device, bool]:
    """The device of this rank, and whether its step becomes a CUDA graph.

    All that a run can be refused for before its data are looked at is refused here.

    Raises:
        UserError: a device or a board (`metro_ext.boards`) is missing, the ranks cannot share the
            micro-batches of a step, the parallel mode has no launcher, run.graph asks for a graph
            where there can be none, or run.compile and a schedule meet.
    """
    device = choose_device(config.run.device, world.local_rank)
    if config.run.accumulation % world.size:
        raise UserError(
            "run.accumulation, the micro-batches of a step, must be a multiple of the number "
            f"of ranks, found {config.run.accumulation} for {world.size} ranks"
        )
    check_mode(config, world)
    if world.is_first:
        require_boards(config.run)
    compiled = config.run.compile
    if compiled and config.objective.has_schedule:
        raise UserError(
            "objective.sampling_temperature_end and objective.mlm_weight_end go with "
            "run.compile=false: a compiled step has them as constants"
        )
    return device, wanted(config.run.graph, device, world.distributed, compiled=compiled)


class Trainer:
    """One run: model, optimizer, data and records, from a configuration.

    Args:
        prepared: tokenizer, corpora, and the configuration with its vocabulary size filled in.
        world: this rank among all.

    Raises:
        UserError: as `choose_machine` has it, settings of sync.mode do not go together, or a
            corpus is too small for a batch.
    """

    def __init__(self, prepared: Prepared, world: World):
        self.config, self.prepared, self.world = prepared.config, prepared, world
        run_config, model_config = self.config.run, self.config.model
        self.folder = Path(run_config.dir)
        self.device, self.graphed = choose_machine(self.config, world)
        self.dtype = DTYPES[run_config.precision]
        self.accumulation = run_config.accumulation // world.size  # of this rank
        is_relaxed = self.config.sync.mode == "relaxed"
        if is_relaxed:
            relaxed.check(self.config)
        special = torch.tensor(prepared.tokenizer.special_ids, device=self.device)
        self.objective = Objective(
            self.config.objective, special, prepared.tokenizer.mask_id, self.dtype
        )
        self.engine = engine(self.config, self.objective, self.device, world)
        self.model = self.engine.model
        self.optimizer = AdamW(self.engine, self.config.optim)
        self.outer: relaxed.OuterOptimizer | None = None
        if is_relaxed:
            parameters = dict(self.engine.named_parameters())
            self.outer = relaxed.OuterOptimizer(
                parameters, self.config.sync, run_config.steps, world
            )
        self.source = training_source(
            prepared.train,
            run_config.tokens_per_batch,
            model_config.sequence_length,
            run_config.seed,
        )
        self.held_out = EvaluationSource(
            prepared.valid, run_config.tokens_per_batch, model_config.sequence_length
        )
        self.unigram_nats = unigram_nats(prepared.train)
        self.saver = Saver(
            self.folder / CHECKPOINTS,
            world,
            run_config.keep_checkpoints,
            run_config.async_save,
            self.config.parallel.timeout,
        )
        self.step = 0
        self.tokens = 0
        # Of the interval that the next line reports; part of a checkpoint, so that a resumed run
        # writes the same line.
        warm_up = self.config.optim.warmup_steps
        self.tally = Tally(self.device, run_config.max_skipped, warm_up)
        self.state = TrainingState(
            self.engine, self.optimizer, self.outer, self.tally, world, self.saver
        )
        self.interval_steps = 0
        # Bytes that a rank has sent in steps: since the beginning, and in the interval.
        self.sent_bytes = self.interval_sent_bytes = 0
        self.records: dict[str, str] = {}  # checksums of the records at the last checkpoint
        settings = self.config.objective
        at_1 = settings.sampling_temperature == 1.0 and settings.sampling_temperature_end == 0.0
        self.health = Health(warm_up, at_1)

    def train(self, monitor: Monitor | Silent, stop: StopRequest | None = None) -> bool:
        """Trains from the current step to the last.

        Args:
            stop: asks to save and return after the current step; with several ranks on CUDA, at
                the next one that is reported, with relaxed ones at the next outer step. It is
                enough that one rank was asked.

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
            with monitor.waiting_for_data():
                upcoming = list(itertools.islice(batches, self.accumulation))
            inputs = StepInputs(upcoming, self.device)
            inputs.counts.copy_(self.terms(upcoming))
            if self.outer is None or self.outer.exchanged(first + 1):
                self.world.sum(inputs.counts)
            take_step = self._prepared_step(inputs)
            for step in range(first + 1, config.steps + 1):
                watchdog.alive()
                current = upcoming
                with monitor.waiting_for_data():
                    upcoming = list(itertools.islice(batches, self.accumulation))
                rate = learning_rate(step, config.steps, self.config.optim)
                inputs.fill(step, current, self.terms(upcoming), rate)
                inputs.stop.fill_(stop.asked)
                self.objective.set_step(step, config.steps)
                with self._counting_bytes():
                    take_step()
                self.step = step
                self.tokens += config.tokens_per_batch * config.accumulation
                self.interval_steps += 1
                if not self._report(monitor, rate, stop, watchdog):
                    return False
        return True

    def _report(
        self, monitor: Monitor | Silent, rate: float, stop: StopRequest, watchdog: Watchdog
    ) -> bool:
        """Logs, evaluates and saves, where the step is due; whether the run goes on."""
        config, step = self.config.run, self.step
        last = step == config.steps
        log_due = step % config.log_interval == 0 or last
        evaluation_due = _due(step, config.eval_interval) or last
        checkpoint_due = _due(step, config.checkpoint_interval) or last
        # On the CPU there is nothing to wait for.
        reads = self.device.type == "cpu" or log_due or evaluation_due or checkpoint_due
        if self.outer is not None:
            with self._counting_bytes():
                self._come_together(self.outer, step, log_due, stop.asked)
            reads = self.outer.due(step)
        elif reads:
            self._check_finite()
        # Several processes have to come to the same answer at the same step.
        asked = stop.asked and (reads or self.outer is None)  # outer steps alone can be saved
        if self.world.distributed:
            asked = reads and self.tally.stop.item() > 0
        if log_due:
            self._log(monitor, rate)
        monitor.tick(step)
        if evaluation_due:
            with monitor.untimed(), self._saved_on_failure(monitor):
                monitor.log_evaluation(step, self.evaluate())
            watchdog.alive()
        if checkpoint_due or asked:
            with monitor.untimed():
                self.records = monitor.sync()
                self.save()
            watchdog.alive()
        return last or not asked

    @contextlib.contextmanager
    def _saved_on_failure(self, monitor: Monitor | Silent) -> Iterator[None]:
        """A step whose evaluation fails (on a damaged shard, say) is saved all the same."""
        try:
            yield
        except UserError:
            self.records = monitor.sync()
            self.save()
            raise

    def _prepared_step(self, inputs: StepInputs) -> Callable[[], None]:
        step = TrainStep(
            self.config, self.engine, self.optimizer, self.world, inputs, self.tally, self.outer
        )
        if not self.graphed:
            return step
        return GraphedStep(step, self.device, lambda: self.objective.constants)

    @contextlib.contextmanager
    def _counting_bytes(self) -> Iterator[None]:
        before = self.world.traffic.sent
        yield
        sent = self.world.traffic.sent - before
        self.sent_bytes += sent
        self.interval_sent_bytes += sent

    def _come_together(
        self, outer: relaxed.OuterOptimizer, step: int, log_due: bool, asked: bool
    ) -> None:
        """What relaxed ranks exchange after a step: nothing, an outer step, or their figures.

        The figures of all are then in the first rank's tally: the losses and sums added up, of
        norms and of counts of faults the mean.
        """
        if not (log_due or outer.due(step)):
            return
        self._check_finite()
        if outer.due(step):
            outer.step(step)
        tally = self.tally
        parts = tally.sums, tally.norms.double(), tally.skipped[:1], tally.spikes[:1]
        flag = torch.full_like(tally.skipped[:1], float(asked))
        both = self.world.sum(torch.cat([*parts, flag]))
        sums, norms, skipped, spikes, stop = both.split([*map(len, parts), 1])
        tally.norms.copy_(norms / self.world.size)
        share = 1 / self.world.size if self.world.is_first else 0
        tally.sums.copy_(sums if self.world.is_first else torch.zeros_like(sums))
        tally.skipped[:1] = skipped * share
        tally.spikes[:1] = spikes * share
        tally.stop.copy_(stop[0])

    def _check_finite(self) -> None:
        """Waits for the steps so far.

        Raises:
            AgreedError: too many steps in a row had no finite loss and gradient; what it takes to
                repeat the first of them is on disk.
        """
        skipped = self.tally.skipped[None]
        if self.outer is not None:  # otherwise all ranks have the same
            skipped = self.world.stack(self.tally.skipped)
        over = [rank for rank, one in enumerate(skipped.tolist()) if one[1] >= self.tally.limit]
        if not over:
            return
        rank = over[0]
        _, in_row, last, loss, norm = skipped[rank].tolist()
        first = int(last - in_row + 1)
        with contextlib.suppress(UserError):  # a full disk must not hide the fault
            found = {"loss": repr(loss), "grad_norm": repr(norm)}
            self._save_fault(first, int(last), rank, found)
        raise AgreedError(
            f"step {first} and the {in_row - 1:.0f} after it: expected a finite loss and gradient, "
            f"found loss {loss} and gradient norm {norm}; look into it with python -m "
            f"metro_ext.replay {self.folder}, try a lower optim.lr or a longer warm-up in a new "
            "run, or go on past these batches with a larger --run.max_skipped (checkpoints are in "
            f"{self.folder / CHECKPOINTS})"
        )

    def _save_fault(self, first: int, last: int, rank: int, found: dict[str, str]) -> None:
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
        timeout = self.config.parallel.timeout
        self.state.save_weights(self.folder / FAULTS, first - 1, state, rank, timeout)

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

    def _log(self, monitor: Monitor | Silent, rate: float) -> None:
        figures, warnings = self.tally.report(self.interval_steps, self.model.auxiliary is not None)
        figures |= {"lr": rate, "tokens": self.tokens}
        if self.config.objective.has_schedule:
            figures["sampling_temperature"], figures["mlm_weight"] = self.objective.constants
        if self.world.distributed:
            figures["sent_bytes"] = self.sent_bytes
            figures["sent_bytes_per_step"] = self.interval_sent_bytes / self.interval_steps
        monitor.log(self.step, figures)
        for sentence in warnings + self.health.warnings(self.step, figures):
            monitor.warn(sentence)
        self.tally.clear()
        self.interval_steps = self.interval_sent_bytes = 0

    def evaluate(self) -> dict[str, float | None]:
        """Figures on the held-out corpus; every rank computes them all, so that none can differ."""
        count = min(self.config.run.eval_batches, len(self.held_out))
        batches = map(self.held_out.batch, range(count))
        self.objective.set_step(self.step, self.config.run.steps)
        figures = evaluate(self.model, self.engine.run, batches, self.device, self.unigram_nats)
        return figures | ({"sent_bytes": self.sent_bytes} if self.world.distributed else {})

    def save(self) -> None:
        """A checkpoint of the current step, of every rank's part; the oldest goes.

        With run.async_save it is written while training goes on, and what went wrong is raised at
        the next save or at the end.

        Raises:
            UserError: it, or the one before, could not be written.
        """
        state = {
            "config": to_dict(self.config),
            "tokens": self.tokens,
            "interval_steps": self.interval_steps,
            "sent_bytes": self.sent_bytes,
            "interval_sent_bytes": self.interval_sent_bytes,
            "ranks": self.world.size,
            "records": self.records,
            "tokenizer_sha256": self.prepared.tokenizer.sha256,
            "corpora": {name: corpus.sha256 for name, corpus in self.prepared.corpora()},
        }
        self.state.save(self.step, state)

    def resume(self) -> bool:
        """Loads the newest whole checkpoint, if there is any, of any number of ranks.

        Raises:
            UserError: it belongs to another configuration or other text, it is past the last step
                of the run, or none is whole.
        """
        step, damaged = self.saver.newest()
        for sentence in damaged if self.world.is_first else ():
            print(f"warning: damaged checkpoint passed over: {sentence}", file=sys.stderr)
        if step is None:
            return False
        state = checkpoint.read_state(self.saver.folder, step)
        check_same_run(self.folder, state, self.config, self.world, self.prepared)
        if step > self.config.run.steps:
            raise UserError(
                f"{self.folder} holds a run of {step} steps, expected no more than "
                f"run.steps = {self.config.run.steps}; give --steps {step} or more"
            )
        self.state.load(step)
        self.interval_steps, self.records = state["interval_steps"], state["records"]
        self.sent_bytes = state.get("sent_bytes", 0)
        self.interval_sent_bytes = state.get("interval_sent_bytes", 0)
        self.step, self.tokens = step, state["tokens"]
        return True


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
