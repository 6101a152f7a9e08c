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
from metro_ext.batches import BatchSource, evaluation_batches, micro_batch_index, prefetch
from metro_ext.config import differences, from_dict, to_dict
from metro_ext.cuda_graph import GraphedStep, wanted
from metro_ext.distributed import AgreedError, World
from metro_ext.errors import UserError
from metro_ext.hardware import choose_device
from metro_ext.held_out import evaluate, interval_figures
from metro_ext.model import PAD_ID
from metro_ext.monitor import Monitor
from metro_ext.objective import Objective, mask_count
from metro_ext.optim import AdamW, learning_rate
from metro_ext.parallel import DTYPES, engine
from metro_ext.prepare import Prepared, unigram_nats
from metro_ext.train_step import StepInputs, Tally, TrainStep

CHECKPOINTS = "checkpoints"
# Keys that change what a run reports, how long it is or who computes it, not what a step computes.
RESUMABLE_KEYS = {
    "run.dir", "run.steps", "run.log_interval", "run.eval_interval", "run.eval_batches",
    "run.checkpoint_interval", "run.keep_checkpoints", "run.tensorboard", "run.recompute",
    "run.graph", "parallel.mode", "parallel.backend", "parallel.timeout",
}  # fmt: skip


class Trainer:
    """One run: model, optimizer, data and records, from a configuration.

    Args:
        prepared: tokenizer, corpora, and the configuration with its vocabulary size filled in.
        world: this rank among all.

    Raises:
        UserError: a device is missing, the ranks cannot share the micro-batches of a step,
            run.graph asks for a graph where there can be none, or settings do not go together.
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
        self.accumulation = run_config.accumulation // world.size  # of this rank
        is_relaxed = self.config.sync.mode == "relaxed"
        if is_relaxed:
            relaxed.check(self.config)
        special = torch.tensor(prepared.tokenizer.special_ids, device=self.device)
        objective = Objective(
            self.config.objective, special, prepared.tokenizer.mask_id, self.dtype
        )
        self.engine = engine(self.config, objective, self.device, world)
        self.model = self.engine.model
        self.optimizer = AdamW(self.engine, self.config.optim)
        self.outer = None
        if is_relaxed:
            parameters = dict(self.engine.named_parameters())
            self.outer = relaxed.OuterOptimizer(
                parameters, self.config.sync, run_config.steps, world
            )
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
        self.tally = Tally(self.device)
        self.interval_steps = 0
        # Bytes that a rank has sent in steps: since the beginning, and in the interval.
        self.sent_bytes = self.interval_sent_bytes = 0

    def train(self, monitor: Monitor) -> None:
        """Trains from the current step to the last."""
        config, first = self.config.run, self.step
        self.model.train()
        indices = (
            micro_batch_index(step, micro, self.world.rank, self.world.size, self.accumulation)
            for step in range(first, config.steps)
            for micro in range(self.accumulation)
        )
        depth = 2 * self.accumulation
        with contextlib.closing(prefetch(self.source, indices, depth)) as batches:
            upcoming = list(itertools.islice(batches, self.accumulation))
            inputs = StepInputs(upcoming, self.device)
            inputs.counts.copy_(self._counts(upcoming))
            if self.outer is None or self.outer.exchanged(first + 1):
                self.world.sum(inputs.counts)
            take_step = self._prepared_step(inputs)
            for step in range(first + 1, config.steps + 1):
                current, upcoming = upcoming, list(itertools.islice(batches, self.accumulation))
                rate = learning_rate(step, config.steps, self.config.optim)
                inputs.fill(step, current, self._counts(upcoming), rate)
                with self._counting_bytes():
                    take_step()
                self.step = step
                self.tokens += config.tokens_per_batch * config.accumulation
                self.interval_steps += 1
                last = step == config.steps
                log_due = step % config.log_interval == 0 or last
                evaluation_due = _due(step, config.eval_interval) or last
                checkpoint_due = _due(step, config.checkpoint_interval) or last
                if self.outer is not None:
                    with self._counting_bytes():
                        self._come_together(step, log_due)
                # On the CPU there is nothing to wait for.
                elif self.device.type == "cpu" or log_due or evaluation_due or checkpoint_due:
                    self._check_finite()
                if log_due:
                    self._log(monitor, rate)
                monitor.tick(step)
                if evaluation_due:
                    with monitor.untimed():
                        monitor.log_evaluation(step, self.evaluate())
                if checkpoint_due:
                    with monitor.untimed():
                        monitor.sync()
                        self.save()

    def _prepared_step(self, inputs: StepInputs) -> Callable[[], None]:
        step = TrainStep(
            self.config, self.engine, self.optimizer, self.world, inputs, self.tally, self.outer
        )
        return GraphedStep(step, self.device) if self.graphed else step

    @contextlib.contextmanager
    def _counting_bytes(self) -> Iterator[None]:
        before = self.world.traffic.sent
        yield
        sent = self.world.traffic.sent - before
        self.sent_bytes += sent
        self.interval_sent_bytes += sent

    def _come_together(self, step: int, log_due: bool) -> None:
        """What relaxed ranks exchange after a step: nothing, an outer step, or their figures.

        The figures of all are then in the first rank's tally.
        """
        if not (log_due or self.outer.due(step)):
            return
        self._check_finite()
        if self.outer.due(step):
            self.outer.step(step)
        tally = self.tally
        both = self.world.sum(torch.cat([tally.sums, tally.norm.double()[None]]))
        tally.sums.copy_(both[:-1] if self.world.is_first else torch.zeros_like(tally.sums))
        tally.norm.copy_(both[-1] / self.world.size)

    def _check_finite(self) -> None:
        """Waits for the steps so far.

        Raises:
            AgreedError: the loss or the gradient of one of them was not finite; none has been
                applied since.
        """
        failures = self.tally.failure[None]
        if self.outer is not None:  # otherwise all ranks have the same
            failures = self.world.gather(self.tally.failure)
        step, loss, grad_norm = min((f for f in failures.tolist() if f[0]), default=(0, 0, 0))
        if step:
            raise AgreedError(
                f"step {step:.0f}: expected a finite loss and gradient, found loss {loss} and "
                f"gradient norm {grad_norm}; try a lower optim.lr or a longer warm-up (checkpoints "
                f"up to step {step - 1:.0f} are in {self.folder / CHECKPOINTS})"
            )

    def _counts(self, batches: list) -> Tensor:
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
        loss, metrics = self._interval()
        figures = interval_figures(metrics)
        figures |= {
            "loss": loss / self.interval_steps,
            "grad_norm": float(self.tally.norm),
            "lr": rate,
            "tokens": self.tokens,
        }
        if self.world.distributed:
            figures["sent_bytes"] = self.sent_bytes
            figures["sent_bytes_per_step"] = self.interval_sent_bytes / self.interval_steps
        monitor.log(self.step, figures)
        self.tally.sums.zero_()
        self.interval_steps = self.interval_sent_bytes = 0

    def _interval(self) -> tuple[float, Tensor]:
        """(loss, metrics float64 [12] on the CPU), summed over the steps of the interval."""
        sums = self.tally.sums.cpu()
        return float(sums[0]), sums[1:].clone()

    def evaluate(self) -> dict[str, float | None]:
        """Figures on the held-out corpus; every rank computes them all, so that none can differ."""
        batches = evaluation_batches(
            self.prepared.valid,
            self.config.run.tokens_per_batch,
            self.config.model.sequence_length,
        )
        limited = itertools.islice(batches, self.config.run.eval_batches)
        figures = evaluate(self.model, self.engine.run, limited, self.device, self.unigram_nats)
        return figures | ({"sent_bytes": self.sent_bytes} if self.world.distributed else {})

    def save(self) -> None:
        """A checkpoint of the current step, written by rank 0; older ones than the last k go."""
        tensors = {}
        for key, name, part in self._parts():
            whole = self._whole(key, name, part)
            if self.world.is_first:  # the others only take part in gathering
                tensors[key] = whole.cpu() if self.world.distributed else whole
        loss, tensors["interval.metrics"] = self._interval()
        state = {
            "config": to_dict(self.config),
            "tokens": self.tokens,
            "interval_loss": loss,
            "interval_steps": self.interval_steps,
            "sent_bytes": self.sent_bytes,
            "interval_sent_bytes": self.interval_sent_bytes,
            "ranks": self.world.size,
            "tokenizer_sha256": self.prepared.tokenizer.sha256,
        }
        self.world.together(lambda: self._write(tensors, state) if self.world.is_first else None)

    def _parts(self) -> list[tuple[str, str, Tensor]]:
        """(key in a checkpoint, parameter, this rank's part) of all that training changes."""
        parameters = self.engine.named_parameters()
        found = [(f"model.{name}", name, value.detach()) for name, value in parameters]
        for key, value in self.optimizer.tensors().items():  # exp_avg.main.layers.0...
            found.append((f"optimizer.{key}", key.split(".", 1)[1], value))
        if self.outer is not None:
            for name, value in self.outer.tensors().items():
                found.append((f"outer.{name}", name, value))
        return found

    def _is_own(self, key: str) -> bool:
        """Whether every rank has a tensor of its own under a key of `_parts`."""
        return self.outer is not None and key.startswith("optimizer.")

    def _whole(self, key: str, name: str, part: Tensor) -> Tensor:
        return self.world.gather(part) if self._is_own(key) else self.engine.whole(name, part)

    def _part(self, key: str, name: str, whole: Tensor) -> Tensor:
        return whole[self.world.rank] if self._is_own(key) else self.engine.part(name, whole)

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
                part.copy_(self._part(key, name, found.tensors[key]))
        if self.outer is not None:
            self.outer.restart()
        if self.outer is None or self.world.is_first:
            self.tally.sums[1:].copy_(found.tensors["interval.metrics"])
            self.tally.sums[0] = found.state["interval_loss"]
        self.interval_steps = found.state["interval_steps"]
        self.sent_bytes = found.state.get("sent_bytes", 0)
        self.interval_sent_bytes = found.state.get("interval_sent_bytes", 0)
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
        if self.outer is not None and state["ranks"] != self.world.size:
            raise UserError(
                f"{self.folder} holds a run of {state['ranks']} ranks that train apart "
                f"(sync.mode=relaxed); resume it on as many, found {self.world.size}"
            )
        if state["tokenizer_sha256"] != self.prepared.tokenizer.sha256:
            raise UserError(f"{self.folder} holds a run with another tokenizer")


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
