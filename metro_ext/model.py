"""The two encoders of METRO and their heads.

One encoder is post-LayerNorm with learned absolute positions and T5-style relative position
buckets, one table a network, shared by its layers: the architecture of MPNet, so that the main
encoder exports as a stock ``MPNetModel``. Both encoders run on packed sequences: hidden states are
[T, H] for the T tokens of a batch, ``cu_seqlens`` says where sequences begin, and nothing is
computed on padding between them.

Parameters are float32; the dtype of the token table (``Encoder.table``) is what the matrix products
and activations use. Dropout draws from the seed it is given: the same (seed, draw) gives the same
mask wherever it runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metro_ext.config_schema import ModelConfig
from metro_ext.ops import (
    Normed,
    TokenTable,
    attention,
    bias_gelu,
    bias_gelu_linear,
    linear,
    normed,
    relative_bias,
)

PAD_ID = 1  # fixed by MPNet, as is the first position
FIRST_POSITION = 2
# Each layer draws three times (attention, two residual dropouts); the encoders' draws lie apart.
DRAWS_PER_LAYER = 3
# Its matrix products; the draws of those in low precision are numbered apart.
PRODUCTS = ("qkv", "attention_out", "ffn_in", "ffn_out")
AUXILIARY_DRAWS = 1 << 20


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a batch lie, and what its random draws depend on.

    positions: int64 [T], position in the sequence + 2; 1 at padding.
    cu_seqlens: int32 [S + 1], first token of each sequence and T; repeats are empty sequences.
    max_seqlen: no sequence is longer.
    seed: int64 [], the key of every draw in this batch.
    """

    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    seed: Tensor


class LayerNorm(nn.Module):
    """Weight and shift of a fused ``metro.layer_norm``."""

    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.eps = eps

    def forward(self, x: Tensor, **fused: Any) -> Normed:
        return normed(x, self.weight, self.bias, eps=self.eps, **fused)


class Embeddings(nn.Module):
    """LayerNorm(token + position): [T] ids -> [T, H]."""

    def __init__(self, config: ModelConfig, share: "Embeddings | None" = None):
        super().__init__()
        shares = config.share_embeddings
        self.token: nn.Parameter
        self.position: nn.Parameter
        self.norm: LayerNorm
        if share is not None and shares != "none":
            self.token = share.token
        else:
            self.token = nn.Parameter(torch.empty(config.vocab_size, config.hidden))
        if share is not None and shares == "all":
            self.position, self.norm = share.position, share.norm
        else:
            positions = config.sequence_length + FIRST_POSITION
            self.position = nn.Parameter(torch.empty(positions, config.hidden))
            self.norm = LayerNorm(config.hidden, config.layer_norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor, table: TokenTable) -> Normed:
        rows = table.rows(tokens)
        positional = F.embedding(positions, self.position).to(rows.dtype)
        return self.norm(rows, residual=positional)


class Layer(nn.Module):
    """One post-LayerNorm block: attention, then the feed-forward network.

    products: how to multiply those of `PRODUCTS` that are not in run.precision, set by
        `metro_ext.products`: from x, weight, seed and draw.
    recompute_norms: the matrix products keep no output of a norm for the backward pass, but have it
        computed again. Costs a pass over [T, H] for each, saves two of [T, H] a layer.
    """

    def __init__(self, config: ModelConfig, dropout: float, draw: int):
        super().__init__()
        hidden, ffn = config.hidden, config.ffn
        self.heads, self.dropout, self.draw = config.heads, dropout, draw
        self.products: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {}
        self.recompute_norms = False
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.attention_out = nn.Linear(hidden, hidden)
        self.attention_norm = LayerNorm(hidden, config.layer_norm_eps)
        self.ffn_in = nn.Linear(hidden, ffn)
        self.ffn_out = nn.Linear(ffn, hidden)
        self.ffn_norm = LayerNorm(hidden, config.layer_norm_eps)

    def forward(self, x: Normed, packing: Packing, bias: Tensor, training: bool) -> Normed:
        """x [T, H] -> [T, H]; bias float32 [heads, 2 L - 1]."""
        p = self.dropout if training else 0.0
        seed = packing.seed if p > 0 else None
        tokens, hidden = x.out.shape
        qkv = self._multiply("qkv", self._operand(x), self.qkv.weight, packing, self.qkv.bias)
        mixed = attention(
            qkv.view(tokens, 3, self.heads, hidden // self.heads),
            packing.cu_seqlens,
            bias,
            packing.max_seqlen,
            seed=seed,
            p=p,
            draw=self.draw,
        ).view(tokens, hidden)
        x = self.attention_norm(
            self._multiply("attention_out", mixed, self.attention_out.weight, packing),
            bias=self.attention_out.bias,
            residual=x.out,
            seed=seed,
            p=p,
            draw=self.draw + 1,
        )
        # The bias of ffn_in is added by the fused operator.
        inner = self._multiply("ffn_in", self._operand(x), self.ffn_in.weight, packing)
        return self.ffn_norm(
            self._ffn_out(inner, packing),
            bias=self.ffn_out.bias,
            residual=x.out,
            seed=seed,
            p=p,
            draw=self.draw + 2,
        )

    def _multiply(
        self,
        name: str,
        x: Tensor | Normed,
        weight: Tensor,
        packing: Packing,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x·weightᵀ + bias: the layer's product of that name."""
        product = self.products.get(name)
        if product is None:
            return linear(x, weight, bias)
        x = x.out if isinstance(x, Normed) else x
        draw = len(PRODUCTS) * self.draw + PRODUCTS.index(name)
        out = product(x, weight, packing.seed, draw)
        return out if bias is None else out + bias.to(out.dtype)

    def _ffn_out(self, inner: Tensor, packing: Packing) -> Tensor:
        if "ffn_out" not in self.products:
            return bias_gelu_linear(inner, self.ffn_in.bias, self.ffn_out.weight)
        gelu = bias_gelu(inner, self.ffn_in.bias)
        return self._multiply("ffn_out", gelu, self.ffn_out.weight, packing)

    def _operand(self, x: Normed) -> Normed | Tensor:
        return x if self.recompute_norms else x.out


class Encoder(nn.Module):
    """Embeddings, layers and the relative bias of one network: [T] ids -> [T, H]."""

    def __init__(
        self, config: ModelConfig, layers: int, dropout: float, draw: int, share: Embeddings | None
    ):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config, share)
        self.relative_bias = nn.Parameter(torch.empty(config.relative_buckets, config.heads))
        self.layers = nn.ModuleList(
            Layer(config, dropout, draw + DRAWS_PER_LAYER * i) for i in range(layers)
        )

    def table(self, dtype: torch.dtype) -> TokenTable:
        """The token table for one step; encoders that share it should share the object."""
        return TokenTable(self.embeddings.token, dtype)

    def forward(self, tokens: Tensor, packing: Packing, table: TokenTable) -> Tensor:
        """Hidden states [T, H] of int64 tokens [T], in the dtype of the table."""
        x = self.embeddings(tokens, packing.positions, table)
        bias = relative_bias(
            self.relative_bias, packing.max_seqlen, self.config.relative_max_distance
        )
        for layer in self.layers:
            x = layer(x, packing, bias, self.training)
        return x.out


class Transform(nn.Module):
    """LayerNorm(GELU(dense)): what stands before every head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden, config.hidden)
        self.norm = LayerNorm(config.hidden, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(bias_gelu(linear(x, self.dense.weight), self.dense.bias)).out


class LanguageModelHead(nn.Module):
    """Transform and the bias of a vocabulary projection whose matrix is the token table."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class ReplacedTokenHead(nn.Module):
    """Transform and a projection to one logit, which starts at zero."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.transform = Transform(config)
        self.weight = nn.Parameter(torch.zeros(config.hidden))
        self.bias = nn.Parameter(torch.zeros(1))


class PretrainingModel(nn.Module):
    """The networks that an objective needs.

    auxiliary, auxiliary_head: the generator (None for ``mlm``).
    main: the encoder that the run is for.
    rtd_head: replaced token detection (None for ``mlm`` and ``clm-all``).
    main_head: vocabulary head of the main encoder (None for ``electra``).

    Args:
        config: ``vocab_size`` must be set.
        objective: ``metro``, ``electra``, ``clm-all`` or ``mlm``.
        seed: of the initialisation; on the meta device there is none.
    """

    def __init__(self, config: ModelConfig, objective: str, seed: int):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("PretrainingModel: config.vocab_size must be set")
        self.config, self.objective = config, objective
        self.main = Encoder(config, config.layers, config.dropout, 0, None)
        self.auxiliary: Encoder | None = None
        self.auxiliary_head: LanguageModelHead | None = None
        self.rtd_head: ReplacedTokenHead | None = None
        self.main_head: LanguageModelHead | None = None
        if objective != "mlm":
            self.auxiliary = Encoder(
                config, config.aux_layers, config.aux_dropout, AUXILIARY_DRAWS, self.main.embeddings
            )
            self.auxiliary_head = LanguageModelHead(config)
        if objective in ("metro", "electra"):
            self.rtd_head = ReplacedTokenHead(config)
        if objective != "electra":
            self.main_head = LanguageModelHead(config)
        if not self.main.relative_bias.is_meta:
            initialise(self, seed)


@torch.no_grad()
def initialise(model: PretrainingModel, seed: int) -> None:
    """Gives every parameter its `start_value`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(start_value(model.config, name, parameter.shape, seed))


def start_value(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """Where training starts: float32 of `shape`, on the CPU, for the parameter of that name.

    Normal(0, init_std) matrices, zero biases, the relative bias as configured. Every parameter is
    drawn from a generator of its own, keyed by (seed, its name), so that the networks that two
    objectives share start alike, and so do the shards of a model that is never whole.
    """
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    if name.endswith("relative_bias"):
        return relative_bias_start(config)
    std = config.init_std
    if config.depth_scaled_init and name.endswith(("attention_out.weight", "ffn_out.weight")):
        depth = config.aux_layers if name.startswith("auxiliary") else config.layers
        std /= math.sqrt(2 * depth)
    generator = torch.Generator().manual_seed(_name_seed(seed, name))
    value = torch.empty(shape).normal_(0.0, std, generator=generator)
    if name.endswith(("embeddings.token", "embeddings.position")):
        value[PAD_ID] = 0
    return value


def _name_seed(seed: int, name: str) -> int:
    """FNV-1a of the name, mixed with the seed: 63 bits."""
    value = 0xCBF29CE484222325 ^ seed
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value >> 1


# The local prior, in units of the attention scores: what a head's first glance costs at the token
# itself (a [MASK] tells nothing) and on the side that the head looks away from.
SELF_PENALTY = 2.0
OTHER_SIDE_PENALTY = 4.0


def relative_bias_start(config: ModelConfig) -> Tensor:
    """The table [buckets, heads] that training starts from.

    ``zero`` is the paper's. ``local`` is a prior that ends the long plateau of small models at the
    unigram distribution, where attention to neighbours has yet to be found: heads in pairs, one of
    which looks at the next token to the left and one at the next to the right, with a slope that
    halves from pair to pair. A quarter of the heads start flat.
    """
    table = torch.zeros(config.relative_buckets, config.heads)
    if config.relative_bias_init == "zero":
        return table
    half = config.relative_buckets // 2
    bucket = torch.arange(config.relative_buckets)
    distance, is_right = bucket % half, bucket >= half
    for head in range(math.ceil(0.75 * config.heads)):
        slope = 0.5 ** (head // 2)
        column = -slope * (distance - 1).clamp_min(0).float()
        column[distance == 0] = -SELF_PENALTY
        away = (is_right if head % 2 == 0 else ~is_right) & (distance > 0)
        column[away] -= OTHER_SIDE_PENALTY
        table[:, head] = column
    return table
