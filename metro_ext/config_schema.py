"""The keys of a configuration: frozen dataclasses whose fields carry help, bounds and choices.

The metadata of a field serves the check, `--help` and `--print-config` alike, so that they cannot
disagree. `metro_ext.config` reads configurations from files and command lines.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from dataclasses import dataclass, field
from typing import Any

from metro_ext.errors import UserError

OBJECTIVES = ("metro", "electra", "clm-all", "mlm")


def _option(default: Any, help_line: str, **bounds: Any) -> Any:
    """A field with its help line; bounds: minimum, maximum, above, below (exclusive), choices."""
    return field(default=default, metadata={"help": help_line, **bounds})


@dataclass(frozen=True)
class _Section:
    """A group of keys: every field is checked when the object is made."""

    SECTION: typing.ClassVar[str]

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = checked(f"{self.SECTION}.{spec.name}", getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)  # an int given for a float becomes a float


@dataclass(frozen=True)
class ModelConfig(_Section):
    """Shape and initialisation of the two encoders; the auxiliary one is as wide as the main."""

    SECTION = "model"
    layers: int = _option(2, "layers of the main encoder", minimum=1)
    hidden: int = _option(128, "width of both encoders", minimum=1)
    ffn: int = _option(512, "inner width of the feed-forward blocks", minimum=1)
    heads: int = _option(2, "attention heads; must divide hidden", minimum=1)
    aux_layers: int = _option(2, "layers of the auxiliary encoder", minimum=1)
    vocab_size: int = _option(0, "vocabulary entries; 0 takes the tokenizer's", minimum=0)
    sequence_length: int = _option(128, "longest sequence, in tokens", minimum=4)
    relative_buckets: int = _option(32, "relative position buckets; even", minimum=4)
    relative_max_distance: int = _option(
        128, "distance in tokens from which on all share the last bucket", minimum=2
    )
    relative_bias_init: str = _option(
        "local", "start of the relative bias: a local prior or zeros", choices=("local", "zero")
    )
    share_embeddings: str = _option(
        "token",
        "shared by both encoders: token table, all (token, position, norm), none",
        choices=("token", "all", "none"),
    )
    dropout: float = _option(0.1, "dropout of the main encoder", minimum=0.0, below=1.0)
    aux_dropout: float = _option(0.0, "dropout of the auxiliary encoder", minimum=0.0, below=1.0)
    # 1e-5 and not BERT's 1e-12, which float32 cannot tell from zero beside a variance near 1.
    layer_norm_eps: float = _option(1e-5, "added to the variance in LayerNorm", above=0.0)
    init_std: float = _option(0.02, "standard deviation of the normal initialisation", above=0.0)
    depth_scaled_init: bool = _option(False, "divide residual projections' init by sqrt(2 layers)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % self.heads:
            raise UserError(
                f"model.heads must divide model.hidden, found {self.heads} heads and "
                f"hidden {self.hidden}"
            )
        if self.head_size % 8 or self.head_size > 128:  # the attention kernels' tiles
            raise UserError(
                "model.hidden over model.heads, the size of a head, must be a multiple of 8 up to "
                f"128, found {self.hidden} / {self.heads} = {self.head_size}"
            )
        if self.relative_buckets % 2:
            raise UserError(
                "model.relative_buckets must be even (half of them look back, half ahead), "
                f"found {self.relative_buckets}"
            )
        # A quarter of the buckets is exact distances; the logarithmic ones begin there.
        if self.relative_max_distance <= self.relative_buckets // 4:
            raise UserError(
                "model.relative_max_distance must be above a quarter of model.relative_buckets, "
                f"found {self.relative_max_distance} for {self.relative_buckets} buckets"
            )

    @property
    def aux_hidden(self) -> int:
        """Width of the auxiliary encoder: the main one's (the paper's full-width generator)."""
        return self.hidden

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class ObjectiveConfig(_Section):
    """What is learnt, and how the input is corrupted."""

    SECTION = "objective"
    name: str = _option("metro", "what the main encoder learns", choices=OBJECTIVES)
    rtd_weight: float = _option(50.0, "weight of replaced token detection", minimum=0.0)
    clm_weight: float = _option(1.0, "weight of corrective language modelling", minimum=0.0)
    mlm_weight: float = _option(1.0, "weight of masked language modelling", minimum=0.0)
    mask_fraction: float = _option(0.15, "share of the tokens to predict", above=0.0, below=1.0)
    mask_token_fraction: float = _option(
        0.8, "of these, the share shown as [MASK]", minimum=0.0, maximum=1.0
    )
    random_token_fraction: float = _option(
        0.1, "of these, the share shown as a random token; the rest is kept", minimum=0, maximum=1
    )
    sampling_temperature: float = _option(
        1.0, "temperature of the auxiliary model's samples", above=0.0
    )
    sampling_temperature_end: float = _option(
        0.0, "temperature that the samples move to, linearly; 0 stays", minimum=0.0
    )
    mlm_weight_end: float = _option(
        -1.0, "weight that mlm_weight moves to, linearly; below 0 stays", minimum=-1.0
    )
    schedule_steps: int = _option(
        0, "steps that such a move takes; 0 takes the whole run", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.mask_token_fraction + self.random_token_fraction
        if total > 1.0 + 1e-9:
            raise UserError(
                "objective.mask_token_fraction and objective.random_token_fraction must add up "
                f"to 1 or less, found {total:g}"
            )

    @property
    def has_schedule(self) -> bool:
        """Whether temperature or MLM weight change during the run."""
        return self.sampling_temperature_end > 0 or self.mlm_weight_end >= 0


@dataclass(frozen=True)
class OptimConfig(_Section):
    """AdamW and its schedule."""

    SECTION = "optim"
    lr: float = _option(1e-3, "peak learning rate", above=0.0)
    beta1: float = _option(0.9, "decay of Adam's first moment", minimum=0.0, below=1.0)
    beta2: float = _option(0.98, "decay of Adam's second moment", minimum=0.0, below=1.0)
    eps: float = _option(1e-6, "Adam's epsilon", above=0.0)
    weight_decay: float = _option(0.01, "decoupled decay, not on norms and biases", minimum=0.0)
    warmup_steps: int = _option(100, "steps of linear warm-up", minimum=0)
    clip_norm: float = _option(2.0, "largest gradient norm; 0 does not clip", minimum=0.0)
    schedule: str = _option("linear", "decay after the warm-up", choices=("linear",))


@dataclass(frozen=True)
class DataConfig(_Section):
    """Text and vocabulary."""

    SECTION = "data"
    train: tuple[str, ...] = _option(
        (), "training text: corpus folders or text files; PATH=WEIGHT mixes"
    )
    valid: tuple[str, ...] = _option((), "held-out text: a corpus folder, or text files")
    tokenizer: str = _option("", "tokenizer model file; empty trains one on data.train")
    vocab_size: int = _option(
        1024, "entries of a tokenizer trained here", minimum=300, maximum=131072
    )
    cased: bool = _option(False, "a tokenizer trained here tells upper from lower case")


@dataclass(frozen=True)
class RunConfig(_Section):
    """Length, batch, device and record keeping of the run."""

    SECTION = "run"
    dir: str = _option("runs/default", "folder of the run; the same folder resumes it")
    steps: int = _option(1500, "optimizer steps of the whole run", minimum=1)
    tokens_per_batch: int = _option(2048, "tokens a micro-batch", minimum=8)
    accumulation: int = _option(1, "micro-batches a step; the ranks share them", minimum=1)
    precision: str = _option("fp32", "arithmetic of the encoders", choices=("fp32", "bf16"))
    seed: int = _option(1, "decides every draw of the run", minimum=0, maximum=2**63 - 1)
    log_interval: int = _option(50, "steps between two lines of metrics", minimum=1)
    eval_interval: int = _option(
        500, "steps between evaluations; 0 evaluates at the end", minimum=0
    )
    eval_batches: int = _option(20, "micro-batches an evaluation", minimum=1)
    checkpoint_interval: int = _option(
        500, "steps between checkpoints; 0 saves at the end", minimum=0
    )
    keep_checkpoints: int = _option(2, "newest checkpoints that are kept", minimum=1)
    async_save: bool = _option(
        True, "write checkpoints while training goes on, from a copy in host memory"
    )
    device: str = _option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    compile: bool = _option(False, "run the model through torch.compile")
    graph: str = _option(
        "auto",
        "a step as one CUDA graph; auto: on CUDA, for one process without compile",
        choices=("auto", "on", "off"),
    )
    max_skipped: int = _option(
        10, "steps in a row without a finite loss and gradient that end the run", minimum=1
    )
    hang_timeout: int = _option(
        3600, "seconds without a step that end the run with all stacks; 0 never", minimum=0
    )
    tensorboard: bool = _option(False, "write TensorBoard events too (needs tensorboard)")
    wandb: bool = _option(False, "write a Weights & Biases run too, offline (needs wandb)")
    recompute: str = _option(
        "norms",
        "what the backward pass computes again: nothing, outputs of norms, layers",
        choices=("none", "norms", "alternate", "all"),
    )


@dataclass(frozen=True)
class ParallelConfig(_Section):
    """How several processes share a run; without a launcher these keys do nothing."""

    SECTION = "parallel"
    mode: str = _option(
        "ddp", "what each process holds: all, sharded optimizer, sharded all",
        choices=("ddp", "zero1", "fsdp2"),
    )  # fmt: skip
    backend: str = _option(
        "auto", "how processes talk; auto: NCCL on CUDA", choices=("auto", "gloo", "nccl")
    )
    timeout: int = _option(600, "seconds to wait for another process", minimum=1)


@dataclass(frozen=True)
class SyncConfig(_Section):
    """How often the processes of a run agree on its weights (`metro_ext.relaxed`)."""

    SECTION = "sync"
    mode: str = _option(
        "every-step", "when processes exchange what they learn", choices=("every-step", "relaxed")
    )
    interval: int = _option(50, "relaxed: steps between two outer steps", minimum=1)
    warmup_steps: int = _option(50, "relaxed: first steps, synchronised like every-step", minimum=0)
    wire: str = _option(
        "fp32",
        "relaxed: what outer steps send; what int8 and int4 round off is sent later",
        choices=("fp32", "bf16", "int8", "int4"),
    )
    lr: float = _option(0.7, "relaxed: learning rate of the outer steps", above=0.0)
    momentum: float = _option(
        0.9, "relaxed: Nesterov momentum of the outer steps", minimum=0.0, below=1.0
    )
    final_momentum: float = _option(
        0.9, "relaxed: to which it moves by the last step", minimum=0.0, below=1.0
    )


@dataclass(frozen=True)
class ProductsConfig(_Section):
    """Matrix products of the layers in fewer bits than run.precision (`metro_ext.products`)."""

    SECTION = "products"
    format: str = _option(
        "full",
        "full: run.precision; fp8 (needs torchao); emulated four-bit numerics, for study only",
        choices=("full", "fp8", "mxfp4-emulated", "nvfp4-emulated"),
    )
    skip: int = _option(
        1, "first and last layers of each encoder that keep run.precision", minimum=0
    )
    linears: tuple[str, ...] = _option(
        ("qkv", "attention_out", "ffn_in", "ffn_out"), "which products of a layer"
    )
    recipe: str = _option(
        "tensorwise",
        "fp8: torchao's recipe",
        choices=("tensorwise", "rowwise", "rowwise_with_gw_hp"),
    )
    emulate: bool = _option(False, "fp8: torchao's emulation, for a GPU without such products")
    stochastic_rounding: bool = _option(False, "emulated: round gradients stochastically")
    hadamard: bool = _option(
        False, "emulated: random Hadamard transform for the weights' gradients"
    )


@dataclass(frozen=True)
class Config:
    """All of a run; `preset` records the size that its settings started from."""

    preset: str = "tiny"
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    products: ProductsConfig = field(default_factory=ProductsConfig)

    def __post_init__(self) -> None:
        if self.run.tokens_per_batch < self.model.sequence_length:
            raise UserError(
                "run.tokens_per_batch must hold one sequence of model.sequence_length = "
                f"{self.model.sequence_length} tokens, found {self.run.tokens_per_batch}"
            )
        if self.run.tokens_per_batch % self.model.sequence_length:
            raise UserError(
                "run.tokens_per_batch must be a multiple of model.sequence_length = "
                f"{self.model.sequence_length}, found {self.run.tokens_per_batch}"
            )


SECTIONS: dict[str, type[_Section]] = {
    cls.SECTION: cls
    for cls in (
        ModelConfig,
        ObjectiveConfig,
        OptimConfig,
        DataConfig,
        RunConfig,
        ParallelConfig,
        SyncConfig,
        ProductsConfig,
    )
}
FIELDS = {
    f"{section}.{spec.name}": spec
    for section, cls in SECTIONS.items()
    for spec in dataclasses.fields(cls)
}
TYPES = {
    f"{section}.{name}": hint
    for section, cls in SECTIONS.items()
    for name, hint in typing.get_type_hints(cls).items()
    if name != "SECTION"
}
_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple[str, ...]: "a list of strings",
}


def checked(key: str, value: Any) -> Any:
    """The value in its field's type; UserError unless type, bounds and choices hold."""
    expected, rules = TYPES[key], FIELDS[key].metadata
    if expected is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if expected == tuple[str, ...]:
        fits = isinstance(value, list | tuple) and all(type(item) is str for item in value)
        value = tuple(value) if fits else value
    else:
        fits = type(value) is expected
    if fits and expected in (str, tuple[str, ...]) and not _is_unicode("".join(value)):
        raise UserError(f"{key} must be text in UTF-8, found {value!r}")
    if not fits or (expected is float and not math.isfinite(value)):
        raise UserError(f"{key} must be {_TYPE_NAMES[expected]}, found {value!r}")
    if "choices" in rules and value not in rules["choices"]:
        raise UserError(f"{key} must be one of {', '.join(rules['choices'])}, found {value!r}")
    for rule, words, holds in (
        ("minimum", "at least", lambda bound: value >= bound),
        ("maximum", "at most", lambda bound: value <= bound),
        ("above", "above", lambda bound: value > bound),
        ("below", "below", lambda bound: value < bound),
    ):
        if rule in rules and not holds(rules[rule]):
            raise UserError(f"{key} must be {words} {rules[rule]}, found {value}")
    return value


def _is_unicode(text: str) -> bool:
    """False where an argument's bytes were no UTF-8: no configuration file could hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
