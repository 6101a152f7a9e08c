"""Texts to packed token ids, hidden states and sentence vectors, by one encoder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metro_ext.model import FIRST_POSITION, Encoder, Packing
from metro_ext.tokenizer import Tokenizer

TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class EncodedTexts:
    """Texts packed one after another: tokens int64 [T], where they lie, and their lengths."""

    tokens: Tensor
    packing: Packing
    lengths: list[int]

    @classmethod
    def pack(
        cls,
        ids: list[list[int]],
        max_seqlen: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> "EncodedTexts":
        """Rows of ids without padding between them; ``seed`` is that of the encoder's dropout."""
        lengths = [len(one) for one in ids]
        positions = np.concatenate([np.arange(n) for n in lengths]) + FIRST_POSITION
        packing = Packing(
            torch.from_numpy(positions).to(device),
            torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32).to(device),
            max_seqlen,
            torch.tensor(seed, device=device),
        )
        return cls(torch.tensor([i for one in ids for i in one]).to(device), packing, lengths)


def by_tokens(rows: Sequence[list[int]], limit: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Places of rows, in order, whose tokens add up to at most ``limit`` (or one longer row)."""
    waiting: list[int] = []
    size = 0
    for place, row in enumerate(rows):
        if waiting and size + len(row) > limit:
            yield waiting
            waiting, size = [], 0
        waiting.append(place)
        size += len(row)
    if waiting:
        yield waiting


def sentence_vectors(hidden: Tensor, packing: Packing) -> Tensor:
    """The mean of each sequence's hidden states, at unit length: [T, H] -> float32 [S, H].

    Mean pooling over all tokens, ``<s>`` and ``</s>`` among them, as Sentence-BERT has it (Reimers
    and Gurevych, arXiv 1908.10084); the dot product of two such vectors is their cosine.
    """
    lengths = packing.cu_seqlens.diff().long()
    means = torch.segment_reduce(hidden.float(), "mean", lengths=lengths, axis=0)
    return torch.nn.functional.normalize(means, dim=1)


@dataclass(frozen=True)
class TextEncoder:
    """An encoder in evaluation mode and its tokenizer."""

    encoder: Encoder
    tokenizer: Tokenizer

    @property
    def length(self) -> int:
        """The most tokens of a text."""
        return self.encoder.config.sequence_length

    def rows(self, texts: Sequence[str], allow_mask: bool = False) -> list[list[int]]:
        """``<s> … </s>`` of each text, cut at the model's length."""
        bos, eos, most = self.tokenizer.bos_id, self.tokenizer.eos_id, self.length - 2
        encoded = (self.tokenizer.encode(text, allow_mask=allow_mask) for text in texts)
        return [[bos, *ids[:most], eos] for ids in encoded]

    @torch.no_grad()
    def embed(self, texts: str | Sequence[str], dtype: torch.dtype = torch.float32) -> Tensor:
        """`sentence_vectors` of texts: float32 [texts, H], on the CPU.

        Args:
            dtype: of the matrix products.
        """
        rows = self.rows([texts] if isinstance(texts, str) else texts)
        device = self.encoder.relative_bias.device
        table = self.encoder.table(dtype)
        found = [torch.empty(0, self.encoder.config.hidden)]
        for places in by_tokens(rows):
            packed = EncodedTexts.pack([rows[i] for i in places], self.length, device=device)
            hidden = self.encoder(packed.tokens, packed.packing, table)
            found.append(sentence_vectors(hidden, packed.packing).cpu())
        return torch.cat(found)
