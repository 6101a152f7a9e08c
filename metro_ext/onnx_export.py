"""An exported model as ONNX: ``python -m metro_ext.onnx_export FOLDER``, or ``export --onnx``.

FOLDER holds any model that this package wrote for transformers: the encoder, the generator, a
classifier, a question answerer, an encoder of sentences. torch's exporter traces it with batch and
length left open; onnxruntime then has to agree with transformers, on padded batches of other
shapes, before ``FOLDER/onnx/model.onnx`` appears. Needs the extra ``onnx``.
"""

import argparse
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metro_ext import mpnet
from metro_ext.atomic import fsync_folder, temporary_sibling
from metro_ext.command_line import run
from metro_ext.errors import UserError

FOLDER, MODEL = "onnx", "model.onnx"
TOLERANCE = 1e-4  # float32, largest absolute difference; hidden states are of size 1
INPUTS = ("input_ids", "attention_mask")
# Of the classes that are exported, the outputs.
OUTPUTS = {
    "Model": ("last_hidden_state",),
    "ForMaskedLM": ("logits",),
    "ForSequenceClassification": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
}


def _libraries() -> tuple[Any, Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(
            f"ONNX needs onnx, onnxscript, onnxruntime and transformers: "
            f"pip install 'metro-ext[onnx]' ({error})"
        ) from None
    return onnx, onnxruntime, transformers


class _Wrapper(torch.nn.Module):
    """The model with two inputs and a tuple of outputs."""

    def __init__(self, model: torch.nn.Module, outputs: Sequence[str]):
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return tuple(found[name] for name in self.outputs)


def write_onnx(folder: Path) -> float:
    """Writes ``onnx/model.onnx`` into an exported folder; returns the largest difference found.

    Raises:
        UserError: no such model, one that is there already, an absent library, or a result of
            onnxruntime that differs from that of transformers.
    """
    _, _, transformers = _libraries()
    target = folder / FOLDER
    if target.exists():
        raise UserError(f"{target}: it exists already: remove it")
    _, document = mpnet.read_checkpoint(folder)
    (name,) = document["architectures"]
    if document["model_type"] == mpnet.CUSTOM_TYPE:
        import metro_ext.hf  # noqa: F401
    kind = name.removeprefix("Metro").removeprefix("MPNet")
    auto = {"Model": "AutoModel"}.get(kind, f"AutoModel{kind}")
    # Eager attention: its mask is plain arithmetic, which every runtime has.
    model = getattr(transformers, auto).from_pretrained(folder, attn_implementation="eager").eval()
    wrapper = _Wrapper(model, OUTPUTS[kind])
    temporary = temporary_sibling(target)
    try:
        temporary.mkdir()
        _trace(wrapper, temporary / MODEL, document)
        difference = _difference(wrapper, temporary / MODEL, document)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{folder}: onnxruntime differs from transformers by {difference:.1e}, expected at "
                f"most {TOLERANCE:.0e}; nothing was written"
            )
        temporary.rename(target)
        fsync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def _trace(wrapper: _Wrapper, path: Path, document: dict) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    axes = {0: batch, 1: length}
    sample = _sample(document, rows=2, length=6, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own making
        torch.onnx.export(
            wrapper,
            tuple(sample[name] for name in INPUTS),
            path,
            dynamo=True,
            input_names=list(INPUTS),
            output_names=list(wrapper.outputs),
            dynamic_shapes=(axes, axes),
            verbose=False,
        )


def _sample(document: dict, rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Random ids, row after row more padded at the right."""
    generator = torch.Generator().manual_seed(seed)
    pad = document["pad_token_id"]
    ids = torch.randint(pad + 1, document["vocab_size"], (rows, length), generator=generator)
    kept = (length - torch.arange(rows) * (length // rows)).clamp_min(1)
    mask = (torch.arange(length)[None] < kept[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


@torch.no_grad()
def _difference(wrapper: _Wrapper, path: Path, document: dict) -> float:
    """The largest difference of onnxruntime from the model, at places that are not padding."""
    onnx, onnxruntime, _ = _libraries()
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    longest = document["max_position_embeddings"] - 2
    worst = 0.0
    for seed, (rows, length) in enumerate([(1, 1), (1, longest), (3, min(longest, 17))]):
        sample = _sample(document, rows, length, seed)
        found = session.run(None, {name: value.numpy() for name, value in sample.items()})
        for ours, theirs in zip(wrapper(**sample), found, strict=True):
            gap = np.abs(ours.numpy() - theirs)
            if gap.shape[:2] == (rows, length):
                gap = gap[sample["attention_mask"].bool().numpy()]
            worst = max(worst, float(gap.max()))
    return worst


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.onnx_export",
        description="Write FOLDER/onnx/model.onnx beside an exported or fine-tuned model.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(argv)
    difference = write_onnx(options.folder)
    print(f"{options.folder / FOLDER / MODEL}: agrees with transformers to {difference:.1e}")


if __name__ == "__main__":
    run(main)
