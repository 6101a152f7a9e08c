"""Pretraining: ``python -m metro_ext.train [--config FILE.toml] [--section.key=value ...]``.

Without arguments it trains a tiny METRO model on a text that ships in the package, in about two
minutes on two CPU cores. The same command on the same ``--run`` folder resumes; the resumed run is
bit for bit the unbroken one. ``torchrun --nproc-per-node N -m metro_ext.train ...`` shares the
micro-batches of a step (``run.accumulation``) among N processes; the update stays the same.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from metro_ext import checkpoint
from metro_ext.atomic import atomic_write
from metro_ext.command_line import USER_ERROR, run
from metro_ext.config import help_text, load_config, to_toml
from metro_ext.config_schema import Config, ParallelConfig
from metro_ext.distributed import AgreedError, World, connect, disconnect, launched_rank
from metro_ext.errors import UserError
from metro_ext.guards import StopRequest
from metro_ext.hardware import keep_freed_memory, peak_flops
from metro_ext.monitor import Monitor, Silent
from metro_ext.plot import plot_run
from metro_ext.prepare import TOKENIZER_FILE, prepare
from metro_ext.presets import flops_per_token, parameter_count
from metro_ext.trainer import Trainer

CONFIG_FILE = "config.toml"


def pretrain(
    config: Config, say: Callable = print, world: World | None = None
) -> dict[str, float | None]:
    """Runs, or resumes, a configuration to its end; returns the last evaluation's figures.

    SIGTERM ends it after the current step with a checkpoint, and without figures. Every rank of
    `world` must call it; rank 0 alone speaks, records and saves.
    """
    world = world or World()
    if not world.is_first:
        say = _say_nothing
    folder = Path(config.run.dir)
    with contextlib.ExitStack() as stack:
        # One lock a run: that of rank 0.
        lock = checkpoint.RunLock(folder) if world.is_first else contextlib.nullcontext()
        world.together(lambda: stack.enter_context(lock))
        prepared = world.in_turn(lambda: prepare(config, say))
        trainer = world.together(lambda: Trainer(prepared, world))
        resumed = world.together(trainer.resume)
        monitor = world.together(lambda: _records(trainer) if world.is_first else Silent())
        _introduce(trainer, resumed, say)
        stop = stack.enter_context(StopRequest())
        with monitor:
            if not trainer.train(monitor, stop):
                say(f"stopped after step {trainer.step}, as asked by SIGTERM, and saved; the same "
                    "command goes on")  # fmt: skip
                return {}
        figures = trainer.evaluate()
        if world.is_first:
            _conclude(folder, figures, plot_run(folder), say)
    return figures


def _say_nothing(_: str) -> None:
    """What ranks other than the first print."""


def _records(trainer: Trainer) -> Monitor:
    """Writes the run's configuration and tokenizer into its folder and opens its records."""
    config, folder = trainer.config, trainer.folder
    with atomic_write(folder / CONFIG_FILE, "w") as file:
        file.write(to_toml(config))
    if not (folder / TOKENIZER_FILE).exists():
        trainer.prepared.tokenizer.save(folder / TOKENIZER_FILE)
    return Monitor(
        folder,
        config.run.steps,
        resumed_step=trainer.step,
        resumed_tokens=trainer.tokens,
        checksums=trainer.records,
        flops_per_token=flops_per_token(config.model, config.objective),
        peak_flops=peak_flops(trainer.device, trainer.dtype) * trainer.world.size,
        tensorboard=config.run.tensorboard,
    )


def _introduce(trainer: Trainer, resumed: bool, say) -> None:
    config, train = trainer.config, trainer.prepared.train
    count = parameter_count(config.model, config.objective)
    where, ranks = str(trainer.device), trainer.world.size
    if trainer.world.distributed:
        where = f"{ranks} x {trainer.device.type} ({config.parallel.mode})"
    say(
        f"{config.objective.name}, preset {config.preset}: {count.total / 1e6:.1f} M parameters, "
        f"vocabulary {config.model.vocab_size}, {config.run.precision} on {where}; "
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


def main(argv: Sequence[str] | None = None) -> int:
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

    def configure() -> Config:
        return load_config(rest, known.config, known_options=("--config", "--print-config"))

    if known.print_config:
        print(to_toml(configure()), end="")
        return 0
    return _on_every_rank(configure)


def _meet(parallel: ParallelConfig) -> World:
    """Joins the other ranks. What keeps them apart is told by each, by rank 0 as the error."""
    try:
        return connect(parallel.backend, parallel.timeout)
    except UserError as error:
        if launched_rank() > 0:
            print(f"rank {launched_rank()}: {error}", file=sys.stderr)
        raise AgreedError(str(error)) from None


def _on_every_rank(configure: Callable[[], Config]) -> int:
    """Joins the other processes and trains; the exit code. Rank 0 alone tells of shared errors."""
    try:
        parallel = ParallelConfig()
        with contextlib.suppress(UserError):  # told below, by all ranks together
            parallel = configure().parallel
        world = _meet(parallel)
        config = world.together(configure)
        keep_freed_memory()
        pretrain(config, world=world)
    except AgreedError as error:
        if launched_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    finally:
        disconnect()
    return 0


if __name__ == "__main__":
    run(main)
