"""Pretraining: ``python -m metro_ext.train [--config FILE.toml] [--section.key=value ...]``.

Without arguments it trains a tiny METRO model on a text that ships in the package, in about two
minutes on two CPU cores. The same command on the same ``--run`` folder resumes; the resumed run is
bit for bit the unbroken one. ``torchrun --nproc-per-node N -m metro_ext.train ...`` shares the
micro-batches of a step (``run.accumulation``) among N processes; the update stays the same.
"""

import argparse
import contextlib
import functools
import hashlib
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote

from metro_ext import checkpoint
from metro_ext.atomic import atomic_write
from metro_ext.boards import open_boards
from metro_ext.command_line import USER_ERROR, run
from metro_ext.config import help_text, load_config, to_dict, to_toml
from metro_ext.config_schema import Config, ParallelConfig
from metro_ext.distributed import (
    AgreedError,
    World,
    connect,
    disconnect,
    launched_rank,
    lost_connection,
)
from metro_ext.errors import UserError
from metro_ext.guards import StopRequest
from metro_ext.hardware import exact_reductions, keep_freed_memory, peak_flops, peak_memory
from metro_ext.monitor import Monitor, Silent
from metro_ext.plot import plot_run
from metro_ext.prepare import prepare
from metro_ext.presets import flops_per_token, parameter_count
from metro_ext.trainer import Trainer, choose_machine

CONFIG_FILE = "config.toml"
CONNECTION_LOST = 1
TERMINATED = 128 + signal.SIGTERM  # the shell's convention


def pretrain(
    config: Config, say: Callable = print, world: World | None = None
) -> dict[str, float | None]:
    """Runs, or resumes, a configuration to its end; returns the last evaluation's figures.

    SIGTERM, SIGHUP or SIGINT ends it after the current step with a checkpoint, and without figures.
    Every rank of `world` must call it; rank 0 alone speaks, records and saves.
    """
    world = world or World()
    if not world.is_first:
        say = _say_nothing
    folder = Path(config.run.dir)
    with contextlib.ExitStack() as stack:
        # One lock a run: that of rank 0.
        lock = checkpoint.RunLock(folder) if world.is_first else contextlib.nullcontext()
        world.together(lambda: stack.enter_context(lock))
        world.together(lambda: choose_machine(config, world))
        prepared = world.in_turn(lambda: prepare(config, say))
        trainer = world.together(lambda: Trainer(prepared, world))
        resumed = world.together(trainer.resume)
        monitor = world.together(lambda: _records(trainer) if world.is_first else Silent())
        _introduce(trainer, resumed, say)
        stop = stack.enter_context(StopRequest())
        with monitor, trainer.saver:
            if not trainer.train(monitor, stop):
                say(f"stopped after step {trainer.step}, as asked by {stop.by}, and saved; the "
                    "same command goes on")  # fmt: skip
                return {}
        figures = trainer.evaluate()
        if world.is_first:
            _conclude(config, figures, trainer.step, plot_run(folder), say)
    return figures


def _say_nothing(_: str) -> None:
    """What ranks other than the first print."""


def _records(trainer: Trainer) -> Monitor:
    """Writes the run's configuration into its folder and opens its records."""
    config, folder = trainer.config, trainer.folder
    with atomic_write(folder / CONFIG_FILE, "w") as file:
        file.write(to_toml(config))
    return Monitor(
        folder,
        config.run.steps,
        resumed_step=trainer.step,
        resumed_tokens=trainer.tokens,
        checksums=trainer.records,
        flops_per_token=flops_per_token(config.model, config.objective),
        peak_flops=peak_flops(trainer.device, trainer.dtype) * trainer.world.size,
        peak_memory=functools.partial(peak_memory, trainer.device),
        boards=open_boards(config.run, folder, trainer.step, to_dict(config)),
    )


def _introduce(trainer: Trainer, resumed: bool, say: Callable[[str], None]) -> None:
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
    if len(train.corpora) > 1:
        for line in train.describe():
            say(f"  {line}")
    if trainer.outer is not None:
        sync = config.sync
        say(
            f"relaxed synchronisation: an outer step every {sync.interval} steps, after "
            f"{sync.warmup_steps} that are synchronised"
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


def _conclude(
    config: Config,
    figures: dict[str, float | None],
    steps: int,
    picture: Path,
    say: Callable[[str], None],
) -> None:
    folder = Path(config.run.dir)
    say("\non held-out text")
    for key, label in TABLE:
        if figures.get(key) is not None:
            say(f"  {label:<36} {figures[key]:10.4f}")
    if (sent_bytes := figures.get("sent_bytes")) is not None:
        sent = sent_bytes / 1e6
        say(f"\na rank has sent {sent:.4g} MB in all, {sent / steps:.4g} MB a step")
    say(
        f"\nplot: {picture}\n\ntry next:\n"
        f'  python -m metro_ext.inspect {quote(str(folder))} "it was a dark and [MASK] night"\n'
        f"  python -m metro_ext.report {quote(str(folder))}\n"
        f"  python -m metro_ext.train --config {quote(str(folder / CONFIG_FILE))} "
        f"--steps {2 * config.run.steps}   # go on for longer\n"
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
    signal.signal(signal.SIGTERM, _terminate)
    return _on_every_rank(configure)


def _meet(parallel: ParallelConfig) -> World:
    """Joins the other ranks. What keeps them apart is told by each, by rank 0 as the error."""
    try:
        return connect(parallel.backend, parallel.timeout)
    except UserError as error:
        if launched_rank() > 0:
            print(f"rank {launched_rank()}: {error}", file=sys.stderr)
        raise AgreedError(str(error)) from None


def _check_same_options(world: World, config: Config) -> None:
    """Raises AgreedError unless every rank has rank 0's configuration."""
    everyone = world.gather(hashlib.sha256(to_toml(config).encode()).hexdigest())
    for rank, one in enumerate(everyone):
        if one != everyone[0]:
            raise AgreedError(
                f"rank {rank} was started with other options than rank 0; give all the same"
            )


def _terminate(*_: object) -> None:
    """On SIGTERM: leave in good order, so that the checkpoint in flight is finished."""
    sys.exit(TERMINATED)


def _on_every_rank(configure: Callable[[], Config]) -> int:
    """Joins the other processes and trains; the exit code. Rank 0 alone tells of shared errors."""
    try:
        parallel = ParallelConfig()
        with contextlib.suppress(UserError):  # told below, by all ranks together
            parallel = configure().parallel
        world = _meet(parallel)
        config = world.together(configure)
        _check_same_options(world, config)
        keep_freed_memory()
        exact_reductions()
        pretrain(config, world=world)
    except AgreedError as error:
        if launched_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except RuntimeError as error:
        if not (reason := lost_connection(error)):
            raise
        print(
            f"rank {launched_rank()}: lost another process ({reason}); started again, the run goes "
            "on from its last checkpoint (torchrun --max-restarts N does it by itself)",
            file=sys.stderr,
        )
        return CONNECTION_LOST
    finally:
        disconnect()
    return 0


if __name__ == "__main__":
    run(main)
