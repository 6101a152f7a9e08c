"""A pretrained encoder with the classification head of MPNet and RoBERTa."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metro_ext import mpnet
from metro_ext.errors import UserError
from metro_ext.finetune.examples import Example, Row
from metro_ext.model import Encoder, Packing
from metro_ext.pretrained import Pretrained
from metro_ext.tokenizer import Tokenizer


def copy_of_main(pretrained: Pretrained) -> Encoder:
    """The run's main encoder, to train on: a copy, so that several seeds start alike."""
    config = pretrained.config.model
    encoder = Encoder(config, config.layers, config.dropout, 0, None)
    encoder.load_state_dict(pretrained.main.state_dict())
    return encoder


class Classifier(nn.Module):
    """out(dropout(tanh(dense(dropout(state of <s>))))): one output for regression.

    Args:
        pretrained: its main encoder is copied, so that several seeds start alike.
        labels: outputs, at least 1.
        seed: of the head's initialisation, normal(0, init_std).
    """

    def __init__(self, pretrained: Pretrained, labels: int, seed: int):
        super().__init__()
        config = pretrained.config.model
        self.encoder = copy_of_main(pretrained)
        self.dense = nn.Linear(config.hidden, config.hidden)
        self.out = nn.Linear(config.hidden, labels)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.dense, self.out):
                layer.weight.normal_(0.0, config.init_std, generator=generator)
                layer.bias.zero_()

    def forward(
        self, tokens: Tensor, packing: Packing, dtype: torch.dtype, generator: torch.Generator
    ) -> Tensor:
        """Logits float32 [S, labels] of packed sequences; ``generator``: of the head's dropout."""
        hidden = self.encoder(tokens, packing, self.encoder.table(dtype))
        first = hidden[packing.cu_seqlens[:-1].long()].float()
        inner = torch.tanh(self.dense(self._drop(first, generator)))
        return self.out(self._drop(inner, generator))

    def loss(
        self,
        tokens: Tensor,
        packing: Packing,
        labels: list,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> Tensor:
        """`loss_of` the logits."""
        return loss_of(self(tokens, packing, dtype, generator), labels)

    def _drop(self, x: Tensor, generator: torch.Generator) -> Tensor:
        p = self.encoder.config.dropout
        if not self.training or p == 0:
            return x
        kept = torch.rand(x.shape, generator=generator).to(x.device) >= p
        return x * kept / (1 - p)


def export_classifier(
    model: Classifier, tokenizer: Tokenizer, labels: tuple[str, ...], out: Path
) -> None:
    """As ``MPNetForSequenceClassification`` (metro_ext.hf's class for other bucket settings)."""
    config = model.encoder.config
    names = labels or ("score",)
    document = mpnet.mpnet_config(
        config,
        config.layers,
        mpnet.architecture(config, "ForSequenceClassification"),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type="single_label_classification" if labels else "regression",
    )
    tensors = {f"mpnet.{k}": v for k, v in mpnet.encoder_tensors(model.encoder).items()}
    for ours, theirs in (("dense", "dense"), ("out", "out_proj")):
        for kind in ("weight", "bias"):
            tensors[f"classifier.{theirs}.{kind}"] = getattr(getattr(model, ours), kind)
    mpnet.write_checkpoint(out, tensors, document, tokenizer)


def encode(tokenizer: Tokenizer, examples: list[Example], limit: int) -> list[Row]:
    """<s> text </s> or <s> text </s></s> pair </s>; the longer of the two is cut to fit."""
    encoded: list[Row] = []
    last, ids = None, []  # neighbours often share a long text: a passage and its questions
    for example in examples:
        if example.text != last:
            last, ids = example.text, tokenizer.encode(example.text)
        pair = None if example.pair is None else tokenizer.encode(example.pair)
        encoded.append(joined(tokenizer, ids, pair, limit))
    return encoded


def joined(tokenizer: Tokenizer, one: Row, two: Row | None, limit: int) -> Row:
    """The row of one text or two, given as ids, of at most ``limit`` tokens."""
    bos, end = tokenizer.bos_id, tokenizer.eos_id
    if two is None:
        return [bos, *one[: limit - 2], end]
    room = max(0, limit - 4)
    shorter = min(len(one), len(two), room // 2)
    if len(one) <= len(two):
        one = one[: max(shorter, room - len(two))]
        two = two[: room - len(one)]
    else:
        two = two[: max(shorter, room - len(one))]
        one = one[: room - len(two)]
    return [bos, *one, end, end, *two, end]


def loss_of(logits: Tensor, labels: list) -> Tensor:
    """Cross-entropy, or the squared error where there is one output."""
    if logits.shape[1] == 1:
        target = torch.tensor(labels, dtype=torch.float32, device=logits.device)
        return checked_loss(F.mse_loss(logits[:, 0], target))
    return checked_loss(F.cross_entropy(logits, torch.tensor(labels, device=logits.device)))


def checked_loss(loss: Tensor) -> Tensor:
    """The loss, or UserError if it is not finite."""
    if not math.isfinite(loss.item()):
        raise UserError(f"expected a finite loss, found {loss.item()}; try a lower --lr")
    return loss
