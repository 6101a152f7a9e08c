"""Pretraining: ``python -m metro_ext.train [--config FILE.toml] [--section.key=value ...]``.

Without arguments it trains a tiny METRO model on a text that ships in the package, in about two
minutes on two CPU cores. The same command on the same ``--run`` folder resumes; the resumed run is
bit for bit the unbroken one.
"""

import argparse
import contextlib
import itertools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from metro_ext import checkpoint
from metro_ext.atomic import atomic_write
from metro_ext.batches import BatchSource, evaluation_batches, micro_batch_index, prefetch
from metro_ext.command_line import run
from metro_ext.config import differences, from_dict, help_text, load_config, to_dict, to_toml
from metro_ext.config_schema import Config
from metro_ext.errors import UserError
from metro_ext.hardware import keep_freed_memory, peak_flops
from metro_ext.held_out import evaluate, interval_figures, pack
from metro_ext.model import PAD_ID, PretrainingModel
from metro_ext.monitor import Monitor
from metro_ext.objective import Objective, mask_count
from metro_ext.ops import _C, METRICS
from metro_ext.optim import AdamW, learning_rate
from metro_ext.plot import plot_run
from metro_ext.prepare import TOKENIZER_FILE, Prepared, prepare, unigram_nats
from metro_ext.presets import flops_per_token, parameter_count

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.toml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Keys that change what a run reports or how long it is, not what a step computes.
RESUMABLE_KEYS = {
    "run.dir", "run.steps", "run.log_interval", "run.eval_interval", "run.eval_batches",
    "run.checkpoint_interval", "run.keep_checkpoints", "run.tensorboard",
}  # fmt: skip


class Trainer:
    """One run: model, optimizer, data and records, from a configuration.

    Args:
        config: as given by the user.
        prepared: tokenizer, corpora, and the configuration with its vocabulary size filled in.
    """

    def __init__(self, config: Config, prepared: Prepared):
        self.config, self.prepared = prepared.config, prepared
        self.folder = Path(config.run.dir)
        self.device = choose_device(config.run.device)
        self.dtype = DTYPES[config.run.precision]
        run_config, model_config = self.config.run, self.config.model
        self.model = PretrainingModel(model_config, self.config.objective.name, run_config.seed).to(
            self.device
        )
        self.optimizer = AdamW(self.model, self.config.optim)
        special = torch.tensor(prepared.tokenizer.special_ids, device=self.device)
        self.objective = Objective(
            self.config.objective, special, prepared.tokenizer.mask_id, self.dtype
        )
        self.step_objective = (
            torch.compile(self.objective, dynamic=False) if run_config.compile else self.objective
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
        self.interval_metrics = torch.zeros(len(METRICS), dtype=torch.float64)
        self.interval_loss = 0.0
        self.interval_steps = 0

    def train(self, monitor: Monitor) -> None:
        """Trains from the current step to the last."""
        config = self.config.run
        accumulation, first = config.accumulation, self.step
        self.model.train()
        indices = (
            micro_batch_index(step, micro, rank=0, accumulation=accumulation)
            for step in range(first, config.steps)
            for micro in range(accumulation)
        )
        with contextlib.closing(prefetch(self.source, indices, depth=2 * accumulation)) as batches:
            for step in range(first + 1, config.steps + 1):
                grad_norm, rate = self._optimizer_step(
                    step, [next(batches) for _ in range(accumulation)]
                )
                self.step = step
                last = step == config.steps
                if step % config.log_interval == 0 or last:
                    self._log(monitor, grad_norm, rate)
                monitor.tick(step)
                if _due(step, config.eval_interval) or last:
                    with monitor.untimed():
                        monitor.log_evaluation(step, self.evaluate())
                if _due(step, config.checkpoint_interval) or last:
                    with monitor.untimed():
                        monitor.sync()
                        self.save()

    def _optimizer_step(self, step: int, batches: list) -> tuple[float, float]:
        """One update from its micro-batches; returns (gradient norm, learning rate)."""
        rate = learning_rate(step, self.config.run.steps, self.config.optim)
        denominators = self._denominators(batches) if len(batches) > 1 else None
        self.optimizer.zero_grad()
        loss_sum = 0.0
        for batch in batches:
            tokens, packing = pack(batch, self.device)
            out = self.step_objective(self.model, tokens, packing, denominators)
            out.loss.backward()
            loss_sum += float(out.loss.detach())
            self.interval_metrics += out.metrics.detach().double().cpu()
            self.tokens += tokens.numel()
        clip = self.config.optim.clip_norm or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip))
        if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
            raise UserError(
                f"step {step}: expected a finite loss and gradient, found loss {loss_sum} and "
                f"gradient norm {grad_norm}; try a lower optim.lr or a longer warm-up (checkpoints "
                f"up to step {step - 1} are in {self.folder / CHECKPOINTS})"
            )
        self.optimizer.step(rate)
        self.interval_loss += loss_sum
        self.interval_steps += 1
        return grad_norm, rate

    def _denominators(self, batches: list) -> Tensor:
        """float32 [3]: the counts of MLM, RTD and CLM terms over a step's micro-batches."""
        special = torch.tensor(self.prepared.tokenizer.special_ids)
        masked = tokens = 0
        for batch in batches:
            maskable = int((~torch.isin(batch.tokens, special)).sum())
            count = mask_count(batch.tokens.numel(), self.config.objective.mask_fraction)
            masked += min(count, maskable)
            tokens += int((batch.tokens != PAD_ID).sum())
        clm = tokens if self.model.objective == "clm-all" else masked
        return torch.tensor([masked, tokens, clm], dtype=torch.float32, device=self.device)

    def _log(self, monitor: Monitor, grad_norm: float, rate: float) -> None:
        figures = interval_figures(self.interval_metrics)
        figures |= {
            "loss": self.interval_loss / self.interval_steps,
            "grad_norm": grad_norm,
            "lr": rate,
            "tokens": self.tokens,
        }
        monitor.log(self.step, figures)
        self.interval_metrics.zero_()
        self.interval_loss, self.interval_steps = 0.0, 0

    def evaluate(self) -> dict[str, float | None]:
        """Figures on the held-out corpus."""
        batches = evaluation_batches(
            self.prepared.valid,
            self.config.run.tokens_per_batch,
            self.config.model.sequence_length,
        )
        limited = itertools.islice(batches, self.config.run.eval_batches)
        return evaluate(self.model, self.objective, limited, self.device, self.unigram_nats)

    def save(self) -> None:
        """A checkpoint of the current step; older ones than the last k go."""
        tensors = {f"model.{name}": value for name, value in self.model.named_parameters()}
        optimizer = self.optimizer.tensors()
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
        tensors["interval.metrics"] = self.interval_metrics
        state = {
            "config": to_dict(self.config),
            "tokens": self.tokens,
            "interval_loss": self.interval_loss,
            "interval_steps": self.interval_steps,
            "tokenizer_sha256": self.prepared.tokenizer.sha256,
        }
        checkpoint.save_checkpoint(self.folder / CHECKPOINTS, self.step, tensors, state)
        checkpoint.prune(self.folder / CHECKPOINTS, self.config.run.keep_checkpoints)

    def resume(self) -> bool:
        """Loads the newest whole checkpoint, if there is any.

        Raises:
            UserError: it belongs to another configuration, or none is whole.
        """
        folder = self.folder / CHECKPOINTS
        checkpoint.clean_leftovers(folder)
        if not checkpoint.checkpoint_steps(folder):
            return False
        found = checkpoint.load_checkpoint(folder)
        for sentence in found.damaged:
            print(f"warning: damaged checkpoint passed over: {sentence}", file=sys.stderr)
        self._check_same_run(found.state)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(found.tensors[f"model.{name}"])
        prefix = "optimizer."
        optimizer = {
            name.removeprefix(prefix): value
            for name, value in found.tensors.items()
            if name.startswith(prefix)
        }
        self.optimizer.load_tensors(optimizer)
        self.interval_metrics = found.tensors["interval.metrics"]
        self.interval_loss = found.state["interval_loss"]
        self.interval_steps = found.state["interval_steps"]
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


def choose_device(name: str) -> torch.device:
    """``auto`` takes CUDA where torch has it and this build has kernels for it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch finds no CUDA device; use --run.device=cpu")
    if name == "auto":
        # Until every operator has its CUDA kernel, training runs where they all run.
        has_kernels = "attention" in _C.build_info()["cuda_operators"]
        name = "cuda" if torch.cuda.is_available() and has_kernels else "cpu"
    return torch.device(name)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def pretrain(config: Config, say=print) -> dict[str, float | None]:
    """Runs, or resumes, a configuration to its end; returns the last evaluation's figures."""
    folder = Path(config.run.dir)
    with checkpoint.RunLock(folder):
        prepared = prepare(config, say)
        trainer = Trainer(config, prepared)
        resumed = trainer.resume()
        with atomic_write(folder / CONFIG_FILE, "w") as file:
            file.write(to_toml(prepared.config))
        if not (folder / TOKENIZER_FILE).exists():
            prepared.tokenizer.save(folder / TOKENIZER_FILE)
        _introduce(trainer, resumed, say)
        flops = flops_per_token(trainer.config.model, trainer.config.objective)
        monitor = Monitor(
            folder,
            config.run.steps,
            resumed_step=trainer.step,
            resumed_tokens=trainer.tokens,
            flops_per_token=flops,
            peak_flops=peak_flops(trainer.device, trainer.dtype),
            tensorboard=config.run.tensorboard,
        )
        with monitor:
            trainer.train(monitor)
        figures = trainer.evaluate()
        picture = plot_run(folder)
    _conclude(folder, figures, picture, say)
    return figures


def _introduce(trainer: Trainer, resumed: bool, say) -> None:
    config, train = trainer.config, trainer.prepared.train
    count = parameter_count(config.model, config.objective)
    say(
        f"{config.objective.name}, preset {config.preset}: {count.total / 1e6:.1f} M parameters, "
        f"vocabulary {config.model.vocab_size}, {config.run.precision} on {trainer.device}; "
        f"{len(train) / 1e6:.2f} M tokens of text, {config.run.steps} steps of "
        f"{config.run.tokens_per_batch * config.run.accumulation} tokens; folder {trainer.folder}"
    )
    if resumed:
        say(f"resuming after step {trainer.step}")


TABLE = (
    ("mlm_loss", "auxiliary loss, nats a masked token"),
    ("unigram_loss", "  of a unigram model"),
    ("mlm_perplexity", "auxiliary perplexity"),
    ("unigram_perplexity", "  of a unigram model"),
    ("replaced_share", "masked tokens that were replaced"),
    ("rtd_accuracy", "RTD accuracy"),
    ("rtd_majority", "  of always saying 'original'"),
    ("rtd_auc", "RTD AUC"),
    ("rtd_f1", "RTD F1"),
    ("clm_accuracy", "CLM accuracy"),
)


def _conclude(folder: Path, figures: dict[str, float | None], picture: Path, say) -> None:
    say("\non held-out text")
    for key, label in TABLE:
        if figures.get(key) is not None:
            say(f"  {label:<36} {figures[key]:10.4f}")
    say(
        f"\nplot: {picture}\n\ntry next:\n"
        f'  python -m metro_ext.inspect {folder} "it was a dark and [MASK] night"\n'
        f"  python -m metro_ext.train --run {folder} --steps 4000   # go on for longer\n"
        "  python -m metro_ext.train --preset small --print-config"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.train",
        description="Pretrain a METRO model; without options, a tiny one on a text that ships "
        "with the package.",
        epilog="options of the run:\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.toml", help="configuration to start from")
    parser.add_argument("--print-config", action="store_true", help="print it all and exit")
    known, rest = parser.parse_known_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training on several processes is not built yet; start it without torchrun")
    config = load_config(rest, known.config, known_options=("--config", "--print-config"))
    if known.print_config:
        print(to_toml(config), end="")
        return
    keep_freed_memory()
    pretrain(config)


if __name__ == "__main__":
    run(main)
