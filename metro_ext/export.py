"""A trained run as a checkpoint of Hugging Face's MPNet: ``python -m metro_ext.export RUN OUT``.

``AutoModel``, ``AutoTokenizer`` and ``pipeline("feature-extraction")`` load it with no code of
ours. ``--network auxiliary`` writes the generator with its head, for ``pipeline("fill-mask")``;
``--training-state`` adds what MPNet has no place for (the other networks, heads, the optimizer), so
that ``python -m metro_ext.import_mpnet`` can go on as if the run had never left. ``--sentence``
adds mean pooling for sentence-transformers, ``--onnx`` the same network for ONNX's runtimes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from metro_ext import mpnet
from metro_ext.atomic import atomic_write
from metro_ext.checkpoint import CHECKPOINTS, load_checkpoint, save_checkpoint
from metro_ext.command_line import run
from metro_ext.errors import UserError
from metro_ext.onnx_export import write_onnx
from metro_ext.pretrained import Pretrained, load
from metro_ext.sentence_files import write_sentence_files

TRAINING_STATE = "training-state"
CLASSES = {"mpnet": "MPNet", "metro": "MetroMPNet"}


def export_main(pretrained: Pretrained, out: Path, classes: str = "mpnet") -> None:
    """The main encoder as ``MPNetModel``; classes: "mpnet", or "metro" for `metro_ext.hf`'s."""
    name = f"{CLASSES[classes]}Model"
    mpnet.write_encoder(out, pretrained.main, pretrained.tokenizer, name)


def export_masked_lm(pretrained: Pretrained, out: Path, classes: str = "mpnet") -> None:
    """The network that was trained to fill masks, as ``MPNetForMaskedLM``.

    That is the auxiliary one, or the main one of an ``mlm`` run.
    """
    model, config = pretrained.model, pretrained.config.model
    encoder = model.main if model.auxiliary is None else model.auxiliary
    head = model.main_head if model.auxiliary is None else model.auxiliary_head
    assert head is not None  # every objective has one or the other
    document = mpnet.mpnet_config(config, len(encoder.layers), f"{CLASSES[classes]}ForMaskedLM")
    tensors = {f"mpnet.{name}": value for name, value in mpnet.encoder_tensors(encoder).items()}
    tensors |= mpnet.language_model_tensors(head)
    mpnet.write_checkpoint(out, tensors, document, pretrained.tokenizer)


def copy_training_state(run_folder: Path, out: Path) -> None:
    """The run's newest whole checkpoint into a folder beside the weights.

    Its tensors are in one safetensors file, whatever number of ranks wrote the run's.
    """
    found = load_checkpoint(run_folder / CHECKPOINTS)
    save_checkpoint(out / TRAINING_STATE, found.step, found.tensors, found.state)


def write_model_card(pretrained: Pretrained, out: Path, network: str) -> None:
    """``metro.json``: where the weights come from."""
    config = pretrained.config
    origin = {"network": network, "objective": config.objective.name, "step": pretrained.step,
              "preset": config.preset, "tokenizer_sha256": pretrained.tokenizer.sha256}  # fmt: skip
    with atomic_write(out / "metro.json", "w") as file:
        file.write(json.dumps(origin, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.export",
        description="Write a run as a checkpoint that Hugging Face transformers loads.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a pretraining run")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--network", choices=("main", "auxiliary"), default="main")
    classes = "metro: the classes of metro_ext.hf, for other bucket settings"
    parser.add_argument("--classes", choices=CLASSES, default="mpnet", help=classes)
    state = "add all that metro_ext.import_mpnet needs to go on"
    parser.add_argument("--training-state", action="store_true", help=state)
    sentence = "with mean pooling, for sentence-transformers (main network)"
    parser.add_argument("--sentence", action="store_true", help=sentence)
    onnx = "OUT/onnx/model.onnx too, checked with onnxruntime (extra onnx)"
    parser.add_argument("--onnx", action="store_true", help=onnx)
    options = parser.parse_args(argv)
    if options.sentence and options.network != "main":
        parser.error("--sentence is for the main network")
    if (options.out / mpnet.CONFIG).exists():
        raise UserError(f"{options.out}: it holds a model already: remove it or name another")
    pretrained = load(options.run)
    write = export_main if options.network == "main" else export_masked_lm
    write(pretrained, options.out, options.classes)
    write_model_card(pretrained, options.out, options.network)
    if options.training_state:
        copy_training_state(options.run, options.out)
    if options.sentence:
        shape = pretrained.config.model
        write_sentence_files(options.out, shape.hidden, shape.sequence_length)
    if options.onnx:
        difference = write_onnx(options.out)
        print(f"ONNX agrees with transformers to {difference:.1e}")
    print(f"{options.out}: {options.network} network of {options.run}, step {pretrained.step}")


if __name__ == "__main__":
    run(main)
