"""A trained run, ready to use: ``metro_ext.load(RUN)``."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metro_ext.checkpoint import CHECKPOINTS, load_checkpoint
from metro_ext.config import from_dict
from metro_ext.config_schema import Config
from metro_ext.errors import UserError
from metro_ext.model import FIRST_POSITION, Packing, PretrainingModel
from metro_ext.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pretrained:
    """A run's networks in evaluation mode, with its tokenizer.

    model: the whole pretraining model; ``model.main`` is the encoder to use.
    tokenizer: as trained.
    config: of the run.
    step: of the checkpoint.
    """

    model: PretrainingModel
    tokenizer: Tokenizer
    config: Config
    step: int

    @property
    def main(self) -> torch.nn.Module:
        """The main encoder."""
        return self.model.main

    def encode(self, texts: str | list[str], allow_mask: bool = False) -> "EncodedTexts":
        """Token ids of texts, packed: each becomes ``<s> … </s>``, cut at the model's length."""
        limit = self.config.model.sequence_length
        ids = []
        for text in [texts] if isinstance(texts, str) else texts:
            pieces = self.tokenizer.encode(text, allow_mask=allow_mask)[: limit - 2]
            ids.append([self.tokenizer.bos_id, *pieces, self.tokenizer.eos_id])
        return EncodedTexts.pack(ids, limit)

    @torch.no_grad()
    def hidden_states(self, texts: str | list[str]) -> list[Tensor]:
        """The main encoder's last hidden states, float32 [tokens, H] for each text."""
        if not isinstance(texts, str) and not texts:
            return []
        packed = self.encode(texts)
        hidden = self.main(packed.tokens, packed.packing, self.main.table(torch.float32))
        return list(hidden.split(packed.lengths))


@dataclass(frozen=True)
class EncodedTexts:
    """Texts packed one after another: tokens int64 [T], where they lie, and their lengths."""

    tokens: Tensor
    packing: Packing
    lengths: list[int]

    @classmethod
    def pack(cls, ids: list[list[int]], max_seqlen: int) -> "EncodedTexts":
        lengths = [len(one) for one in ids]
        positions = np.concatenate([np.arange(n) for n in lengths]) + FIRST_POSITION
        packing = Packing(
            torch.from_numpy(positions),
            torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
            max_seqlen,
            torch.zeros((), dtype=torch.int64),
        )
        return cls(torch.tensor([i for one in ids for i in one]), packing, lengths)


def load(run: str | os.PathLike) -> Pretrained:
    """The newest whole checkpoint of a run folder, on the CPU, in float32.

    Raises:
        UserError: the folder holds no run, or no whole checkpoint.
    """
    folder = Path(run)
    if not (folder / CHECKPOINTS).is_dir():
        raise UserError(f"{folder}: expected the folder of a run with checkpoints, found none")
    found = load_checkpoint(folder / CHECKPOINTS)
    config = from_dict(found.state["config"])
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    if tokenizer.sha256 != found.state["tokenizer_sha256"]:
        raise UserError(f"{folder / 'tokenizer.model'} is not the tokenizer that the run used")
    model = PretrainingModel(config.model, config.objective.name, config.run.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found.tensors[f"model.{name}"])
    return Pretrained(model.eval(), tokenizer, config, found.step)
