"""A trained run, ready to use: ``metro_ext.load(RUN)``."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metro_ext import mpnet
from metro_ext.checkpoint import CHECKPOINTS, load_checkpoint
from metro_ext.config import from_dict
from metro_ext.config_schema import Config, ModelConfig
from metro_ext.errors import UserError
from metro_ext.model import Encoder, PretrainingModel
from metro_ext.text_encoder import EncodedTexts, TextEncoder
from metro_ext.tokenizer import TOKENIZER_FILE, Tokenizer


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
    def main(self) -> Encoder:
        """The main encoder."""
        return self.model.main

    @property
    def texts(self) -> TextEncoder:
        """The main encoder with the tokenizer."""
        return TextEncoder(self.main, self.tokenizer)

    def encode(self, texts: str | list[str], allow_mask: bool = False) -> EncodedTexts:
        """Token ids of texts, packed: each becomes ``<s> … </s>``, cut at the model's length."""
        rows = self.texts.rows([texts] if isinstance(texts, str) else texts, allow_mask)
        return EncodedTexts.pack(rows, self.config.model.sequence_length)

    @torch.no_grad()
    def hidden_states(self, texts: str | list[str]) -> list[Tensor]:
        """The main encoder's last hidden states, float32 [tokens, H] for each text."""
        if not isinstance(texts, str) and not texts:
            return []
        packed = self.encode(texts)
        hidden = self.main(packed.tokens, packed.packing, self.main.table(torch.float32))
        return list(hidden.split(packed.lengths))

    def embed(self, texts: str | list[str]) -> Tensor:
        """Mean-pooled vectors of unit length, float32 [texts, H]."""
        return self.texts.embed(texts)


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
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    if tokenizer.sha256 != found.state["tokenizer_sha256"]:
        raise UserError(f"{folder / TOKENIZER_FILE} is not the tokenizer that the run used")
    model = PretrainingModel(config.model, config.objective.name, config.run.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found.tensors[f"model.{name}"])
    return Pretrained(model.eval(), tokenizer, config, found.step)


def load_text_encoder(path: str | os.PathLike) -> TextEncoder:
    """The main encoder of a run, or the one of a checkpoint that this package exported.

    Raises:
        UserError: the folder holds neither, or a tokenizer or weights of another size.
    """
    folder = Path(path)
    if not (folder / mpnet.CONFIG).is_file():
        return load(folder).texts
    tensors, document = mpnet.read_checkpoint(folder)
    if not (folder / TOKENIZER_FILE).is_file():
        raise UserError(f"{folder}: expected the sentencepiece model {TOKENIZER_FILE}, found none")
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    mpnet.check_tokenizer(tokenizer, document, folder / TOKENIZER_FILE)
    shape = mpnet.shape_of(document, folder / mpnet.CONFIG)
    config = ModelConfig(**shape)
    encoder = Encoder(config, config.layers, 0.0, 0, None)
    mpnet.load_encoder(encoder, tensors, folder / mpnet.WEIGHTS)
    return TextEncoder(encoder.eval(), tokenizer)
