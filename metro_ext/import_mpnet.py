"""An MPNet checkpoint as a run that pretraining goes on from.

    python -m metro_ext.import_mpnet CHECKPOINT RUN [--tokenizer FILE.model] [--section.key=value]

A checkpoint that was exported with ``--training-state`` gives the run as it was: the next step is
bit for bit the one that it would have made. Any other gives the main encoder, at step 0; the
auxiliary network and the heads start from the run's seed. Its tokenizer must be a sentencepiece
model with as many entries as the checkpoint.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from metro_ext import mpnet
from metro_ext.atomic import atomic_write
from metro_ext.checkpoint import CHECKPOINTS, load_checkpoint, save_checkpoint
from metro_ext.command_line import run
from metro_ext.config import from_dict, load_config, to_dict, to_toml
from metro_ext.config_schema import Config
from metro_ext.errors import UserError
from metro_ext.export import TRAINING_STATE
from metro_ext.model import PretrainingModel
from metro_ext.optim import AdamW
from metro_ext.tally import Tally
from metro_ext.tokenizer import TOKENIZER_FILE, Tokenizer


def import_run(source: Path, folder: Path) -> Config:
    """The exported run itself, into a new folder; returns its configuration."""
    found = load_checkpoint(source / TRAINING_STATE)
    tokenizer = Tokenizer.load(source / TOKENIZER_FILE)
    if tokenizer.sha256 != found.state["tokenizer_sha256"]:
        raise UserError(f"{source / TOKENIZER_FILE} is not the tokenizer that the run used")
    name = f"step-{found.step:08d}"
    target = folder / CHECKPOINTS / name
    shutil.copytree(source / TRAINING_STATE / name, target, dirs_exist_ok=True)
    tokenizer.save(folder / TOKENIZER_FILE)
    return from_dict(found.state["config"])


def import_encoder(
    source: Path, folder: Path, tokenizer_file: Path, options: Sequence[str]
) -> Config:
    """A new run at step 0 whose main encoder is the checkpoint's; returns its configuration."""
    tensors, document = mpnet.read_checkpoint(source)
    if not tokenizer_file.is_file():
        raise UserError(
            f"{source}: expected the sentencepiece model {tokenizer_file.name}, found none; name "
            "one with --tokenizer FILE.model"
        )
    tokenizer = Tokenizer.load(tokenizer_file)
    mpnet.check_tokenizer(tokenizer, document, tokenizer_file)
    shape = mpnet.shape_of(document, source / mpnet.CONFIG)
    shape_options = [f"--model.{key}={value}" for key, value in shape.items()]
    config = load_config([*shape_options, f"--run={folder}", *options])
    model = PretrainingModel(config.model, config.objective.name, config.run.seed)
    mpnet.load_encoder(model.main, tensors, source / mpnet.WEIGHTS)
    write_start(folder, config, model, tokenizer)
    return config


def write_start(
    folder: Path, config: Config, model: PretrainingModel, tokenizer: Tokenizer
) -> None:
    """A run that has not made a step yet: its checkpoint and its tokenizer."""
    optimizer = AdamW(model, config.optim)
    whole: dict[str, Tensor] = {f"model.{name}": value for name, value in model.named_parameters()}
    whole |= {f"optimizer.{name}": value for name, value in optimizer.tensors().items()}
    tally = Tally(torch.device("cpu"))
    whole |= {f"interval.{name}": value for name, value in tally.tensors().items()}
    state = {"config": to_dict(config), "tokens": 0, "interval_steps": 0, "records": {},
             "tokenizer_sha256": tokenizer.sha256}  # fmt: skip
    save_checkpoint(folder / CHECKPOINTS, 0, whole, state)
    tokenizer.save(folder / TOKENIZER_FILE)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.import_mpnet",
        description="Make a run from an MPNet checkpoint, to go on pretraining.",
        epilog="other options are those of python -m metro_ext.train",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder to make")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE.model")
    known, options = parser.parse_known_args(argv)
    if (known.run / CHECKPOINTS).exists():
        raise UserError(f"{known.run}: it holds a run already: remove it or name another")
    if (known.checkpoint / TRAINING_STATE).is_dir() and not known.tokenizer:
        if options:
            raise UserError(
                f"{known.checkpoint} holds a whole run, whose options are kept; found {options[0]}"
            )
        config = import_run(known.checkpoint, known.run)
    else:
        tokenizer = known.tokenizer or known.checkpoint / TOKENIZER_FILE
        config = import_encoder(known.checkpoint, known.run, tokenizer, options)
    with atomic_write(known.run / "config.toml", "w") as file:
        file.write(to_toml(config))
    print(
        f"{known.run}: go on with python -m metro_ext.train --config {known.run}/config.toml "
        f"--run {known.run}"
    )


if __name__ == "__main__":
    run(main)
