"""A pretrained encoder with the question-answering head of MPNet: two logits a token."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metro_ext import mpnet
from metro_ext.finetune.heads import checked_loss, copy_of_main
from metro_ext.model import FIRST_POSITION, Packing
from metro_ext.pretrained import Pretrained
from metro_ext.tokenizer import Tokenizer


class SpanModel(nn.Module):
    """out(state): the logits of an answer's first and last token.

    Args:
        pretrained: its main encoder is copied, so that several seeds start alike.
        seed: of the head's initialisation, normal(0, init_std).
    """

    def __init__(self, pretrained: Pretrained, seed: int):
        super().__init__()
        config = pretrained.config.model
        self.encoder = copy_of_main(pretrained)
        self.out = nn.Linear(config.hidden, 2)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.out.weight.normal_(0.0, config.init_std, generator=generator)
            self.out.bias.zero_()

    def forward(self, tokens: Tensor, packing: Packing, dtype: torch.dtype) -> Tensor:
        """Logits float32 [T, 2] of packed sequences."""
        hidden = self.encoder(tokens, packing, self.encoder.table(dtype))
        return self.out(hidden.float())

    def loss(
        self,
        tokens: Tensor,
        packing: Packing,
        spans: list[tuple[int, int]],
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> Tensor:
        """Mean cross-entropy of the first and the last token, each over its own sequence.

        spans: their places in the sequences; (0, 0), which is ``<s>``, where there is no answer.
        generator: not used, as the head has no dropout.
        """
        return span_loss(self(tokens, packing, dtype), packing, spans)


def span_loss(logits: Tensor, packing: Packing, spans: list[tuple[int, int]]) -> Tensor:
    """`SpanModel.loss` of logits [T, 2]."""
    lengths = packing.cu_seqlens.diff().long()
    sequence = torch.arange(len(lengths), device=logits.device).repeat_interleave(lengths)
    shape = (len(lengths), packing.max_seqlen, 2)
    padded = logits.new_full(shape, float("-inf"))
    padded = padded.index_put((sequence, packing.positions - FIRST_POSITION), logits)
    target = torch.tensor(spans, device=logits.device)
    first, last = (F.cross_entropy(padded[:, :, i], target[:, i]) for i in (0, 1))
    return checked_loss((first + last) / 2)


def export_span_model(model: SpanModel, tokenizer: Tokenizer, out: Path) -> None:
    """As ``MPNetForQuestionAnswering`` (metro_ext.hf's class for other bucket settings)."""
    config = model.encoder.config
    name = mpnet.architecture(config, "ForQuestionAnswering")
    document = mpnet.mpnet_config(config, config.layers, name)
    tensors = {f"mpnet.{k}": v for k, v in mpnet.encoder_tensors(model.encoder).items()}
    tensors |= {"qa_outputs.weight": model.out.weight, "qa_outputs.bias": model.out.bias}
    mpnet.write_checkpoint(out, tensors, document, tokenizer)
