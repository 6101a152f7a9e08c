"""Sizes against published counts, and the formulas against PyTorch modules and its flop counter."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from metro_ext.config import ModelConfig, ObjectiveConfig, load_config
from metro_ext.errors import UserError
from metro_ext.presets import PRESETS, flops_per_token, parameter_count

METRO = ObjectiveConfig()


def sized(preset: str) -> ModelConfig:
    config = load_config(preset=preset)
    return dataclasses.replace(config.model, vocab_size=config.data.vocab_size)


@pytest.mark.parametrize(
    ("preset", "published"),
    [("base", 110e6), ("base++", 184e6), ("large++", 434e6), ("xl", 1.6e9), ("xxl", 5.4e9)],
)
def test_published_sizes(preset, published):
    assert parameter_count(sized(preset), METRO).main_model == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_make_sense(preset):
    config = load_config(preset=preset)
    assert config.model.ffn == 4 * config.model.hidden
    assert config.model.head_size == 64
    assert config.optim.warmup_steps < config.run.steps
    local = preset in ("tiny", "small")
    assert config.model.relative_bias_init == ("local" if local else "zero")
    if not local:
        assert config.run.tokens_per_batch * config.run.accumulation == 2048 * 512
        assert config.model.sequence_length == 512


def test_preset_names_ignore_case():
    assert load_config(preset="Base++") == load_config(["--preset", "BASE++"])


class Encoder(nn.Module):
    """The documented architecture in torch modules, dense attention, embeddings given."""

    def __init__(self, config, layers):
        super().__init__()
        h, f = config.hidden, config.ffn
        self.heads = config.heads
        self.bias = nn.Embedding(config.relative_buckets, config.heads)
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "qkv": nn.Linear(h, 3 * h), "out": nn.Linear(h, h), "norm1": nn.LayerNorm(h),
                "up": nn.Linear(h, f), "down": nn.Linear(f, h), "norm2": nn.LayerNorm(h),
            })
            for _ in range(layers)
        )  # fmt: skip

    def forward(self, x):
        batch, length, hidden = x.shape
        for layer in self.layers:
            qkv = layer["qkv"](x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            scores = torch.matmul(qkv[0], qkv[1].transpose(-1, -2)).softmax(-1)
            mixed = torch.matmul(scores, qkv[2]).transpose(1, 2).reshape(batch, length, hidden)
            x = layer["norm1"](x + layer["out"](mixed))
            x = layer["norm2"](x + layer["down"](layer["up"](x)))
        return x


class Embedding(nn.Module):
    def __init__(self, config, donor=None, share="none"):
        super().__init__()
        h = config.hidden
        token, rest = share in ("token", "all"), share == "all"
        self.token = donor.token if token and donor else nn.Embedding(config.vocab_size, h)
        position = nn.Embedding(config.sequence_length + 2, h)
        self.position = donor.position if rest and donor else position
        self.norm = donor.norm if rest and donor else nn.LayerNorm(h)

    def forward(self, ids):
        positions = torch.arange(2, ids.shape[1] + 2)
        return self.norm(self.token(ids) + self.position(positions))


def body(h):
    return nn.Sequential(nn.Linear(h, h), nn.LayerNorm(h))


class Whole(nn.Module):
    """Both encoders and the heads that the objective needs."""

    def __init__(self, config, objective):
        super().__init__()
        h, v, name = config.hidden, config.vocab_size, objective.name
        self.embed = Embedding(config)
        self.main = Encoder(config, config.layers)
        self.mlm, self.mlm_bias = body(h), nn.Parameter(torch.zeros(v))
        self.name, self.fraction = name, objective.mask_fraction
        if name == "mlm":
            return
        self.aux_embed = Embedding(config, self.embed, config.share_embeddings)
        self.aux = Encoder(config, config.aux_layers)
        if name != "clm-all":
            self.rtd = nn.Sequential(body(h), nn.Linear(h, 1))
        if name != "electra":
            self.clm, self.clm_bias = body(h), nn.Parameter(torch.zeros(v))

    def forward(self, ids):
        rows = round(self.fraction * ids.numel())
        main = self.main(self.embed(ids)).flatten(0, 1)
        if self.name == "mlm":
            return (self.mlm(main[:rows]) @ self.embed.token.weight.T + self.mlm_bias).sum()
        aux = self.aux(self.aux_embed(ids)).flatten(0, 1)[:rows]
        loss = (self.mlm(aux) @ self.aux_embed.token.weight.T + self.mlm_bias).sum()
        if self.name != "clm-all":
            loss = loss + self.rtd(main).sum()
        if self.name != "electra":
            picked = main if self.name == "clm-all" else main[:rows]
            loss = loss + (self.clm(picked) @ self.embed.token.weight.T + self.clm_bias).sum()
        return loss


@pytest.mark.parametrize("share", ["token", "all", "none"])
@pytest.mark.parametrize("name", ["metro", "electra", "clm-all", "mlm"])
def test_counts_equal_those_of_the_modules(name, share):
    config = ModelConfig(
        layers=3, hidden=24, ffn=40, heads=3, aux_layers=2, vocab_size=50, sequence_length=20,
        share_embeddings=share,
    )  # fmt: skip
    objective = ObjectiveConfig(name=name, mask_fraction=0.15)
    model, counted = Whole(config, objective), parameter_count(config, objective)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.main_model == sum(
        p.numel() for part in (model.embed, model.main) for p in part.parameters()
    )
    ids = torch.zeros(10, 12, dtype=torch.int64)  # 120 tokens, 18 masked
    with FlopCounterMode(display=False) as counter:
        model(ids).backward()
    expected = counter.get_total_flops() / ids.numel()
    assert flops_per_token(config, objective, sequence_length=12) == pytest.approx(expected, 1e-12)


def test_the_vocabulary_must_be_known():
    with pytest.raises(UserError, match=r"model\.vocab_size"):
        parameter_count(ModelConfig(), METRO)
    with pytest.raises(UserError, match=r"model\.vocab_size"):
        flops_per_token(ModelConfig(), METRO)
