"""What a layout holds on each GPU at the peak of a step, by part.

A formula for every tensor that the model keeps for its backward pass (the operators' and autograd
functions' saved tensors), and for the largest that come and go while it runs. The peak is the
largest of a few phases of the backward pass. Gradients are counted whole in each of them, as they
are from a step's second micro-batch on and, in DDP's buckets, always; those of a backward pass that
is not synchronised stand beside the buckets. In the sharded engines they are whole only where a
step has several micro-batches on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from metro_ext.config_schema import ModelConfig, ObjectiveConfig, SyncConfig
from metro_ext.objective import mask_count
from metro_ext.presets import parameter_count
from metro_ext.wire import BITS

FP32, INT64 = 4, 8
# Of the vocabulary head's logits a chunk of rows at a time is held: vocab_head_op.cpp.
CHUNK_ELEMENTS = {"cpu": 8 << 20, "cuda": 256 << 20}
CHUNK_ROWS = {"cpu": (64, 1024), "cuda": (1, math.inf)}
MOST_CHUNKS = 16
SAMPLE_TILE = 256
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
ADAM_MOMENTS = 2  # float32 each, of every parameter
OUTER_COPIES = 2  # float32 each: the anchor and its momentum, of relaxed synchronisation
# fully_shard gathers the next layer while one computes, and frees the last one after it.
GATHERED_LAYERS = 2


@dataclass(frozen=True)
class Layout:
    """How a step is spread: `gpus` GPUs of `sequences` × `accumulation` sequences each.

    engine: ``ddp``, ``zero1`` or ``fsdp2`` (see ``metro_ext.parallel``).
    recompute: ``none``, ``norms``, ``alternate`` or ``all``: what the backward pass computes again.
    sequences: of a micro-batch, each of the model's full length.
    accumulation: micro-batches of a step on one GPU.
    """

    engine: str
    gpus: int
    recompute: str
    sequences: int
    accumulation: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak.

    activations: of the encoders, with what their backward pass needs beside them.
    head: of the heads, with the rounded token table and its gradient.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def layer_parameters(model: ModelConfig, objective: ObjectiveConfig) -> int:
    """Parameters of one layer; all layers of both encoders are alike."""
    main = parameter_count(model, objective).main
    return (main - model.relative_buckets * model.heads) // model.layers


def recomputed_layers(layers: int, policy: str) -> int:
    """How many of an encoder's layers `metro_ext.parallel.recompute_layers` takes."""
    return {"none": 0, "norms": 0, "alternate": math.ceil(layers / 2), "all": layers}[policy]


def outer_copies(sync: SyncConfig | None) -> int:
    """Float32 copies of the weights that relaxed synchronisation holds; 0 without it.

    Anchor and momentum, and with a wire that rounds what it has yet to send.
    """
    if sync is None or sync.mode != "relaxed":
        return 0
    return OUTER_COPIES + (sync.wire in BITS)


def saved_bytes(
    model: ModelConfig, objective: ObjectiveConfig, layout: Layout, sync: SyncConfig | None = None
) -> float:
    """Host memory for the copy of a GPU's part that a save in the background is written from.

    Weights, AdamW's moments and, of relaxed ranks, all but the anchor.
    """
    whole = FP32 * parameter_count(model, objective).total
    if layout.engine != "ddp":
        return (1 + ADAM_MOMENTS) * whole / layout.gpus
    return (1 + ADAM_MOMENTS + max(0, outer_copies(sync) - 1)) * whole


def peak_memory(
    model: ModelConfig,
    objective: ObjectiveConfig,
    precision: str,
    layout: Layout,
    device: str = "cuda",
    sync: SyncConfig | None = None,
) -> Memory:
    """Peak bytes on one GPU; `precision` is ``run.precision``, `device` ``cuda`` or ``cpu``.

    What an outer step of `sync` needs for a moment, when a step's activations are gone, is left
    out; with a wire that rounds it is two float32 copies of the weights.
    """
    states = _states(model, objective, layout, sync)
    phases = _phases(model, objective, precision, layout, device)
    found = [
        Memory(states.weights, gradients, states.optimizer, activations, head)
        for part, gradients in zip(phases, (states.early, states.late), strict=True)
        for activations, head in part
    ]
    return max(found, key=lambda memory: memory.total)


@dataclass(frozen=True)
class _States:
    """Bytes of weights, of optimizer state, and of gradients before and after the main encoder's
    backward pass."""

    weights: float
    optimizer: float
    early: float
    late: float


def _states(
    model: ModelConfig, objective: ObjectiveConfig, layout: Layout, sync: SyncConfig | None
) -> _States:
    count = parameter_count(model, objective)
    whole = FP32 * count.total
    if layout.engine == "ddp":
        copies = outer_copies(sync)
        apart = layout.gpus > 1 and (layout.accumulation > 1 or copies > 0)
        gradients = 2 * whole if apart else whole
        return _States(whole, (ADAM_MOMENTS + copies) * whole, gradients, gradients)
    layer = FP32 * layer_parameters(model, objective)
    layers = model.layers + (model.aux_layers if count.aux else 0)
    root = whole - layers * layer  # embeddings, heads: gathered for the whole of a step
    shard = whole / layout.gpus
    gathered = whole if layout.engine == "zero1" else root + min(GATHERED_LAYERS, layers) * layer
    # Until a step's last micro-batch gradients stay whole: they are not exchanged before. In it, as
    # without accumulation, a layer's gradient is whole until it is reduced into the rank's part.
    # The root's own are the last; they come as the head's part and are reduced when all is done.
    reduced = layers * layer / layout.gpus
    if layout.accumulation > 1:
        early, late = whole, reduced + root + layer * (layers - model.layers)
    else:
        early, late = layer, reduced + layer
    return _States(shard + gathered, ADAM_MOMENTS * shard, early, late)


def _phases(
    model: ModelConfig, objective: ObjectiveConfig, precision: str, layout: Layout, device: str
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(activations, head) in bytes: of the phases before and after the main encoder is done.

    Before: in its heads and in its last layer. After: in the auxiliary head, in the auxiliary
    encoder's last layer and in the token table's gradient.
    """
    element = ELEMENT_BYTES[precision]
    tokens = layout.sequences * model.sequence_length
    rows = mask_count(tokens, objective.mask_fraction)
    stream = element * tokens * model.hidden  # one [T, H]
    table = element * model.vocab_size * model.hidden
    rounded = table if precision != "fp32" else 0  # the table's copy in the products' dtype

    main = _encoder(model, model.layers, layout, element)
    ids = INT64 * tokens * 5  # tokens, positions, masked, corrupted, targets
    chunk = _head_chunk(rows, model.vocab_size, element, device)
    full_chunk = _head_chunk(tokens, model.vocab_size, element, device)
    top = _top_layer(model, model.layers, layout, element)
    masked_head = 4 * element * rows * model.hidden + (2 * INT64 + 6 * FP32) * rows
    full_head = 3 * stream + 6 * FP32 * tokens  # RTD's, or a vocabulary head on every token
    # Where products are not in float32, the table's copy and its gradient are one block, in which
    # the gradient is widened at the end.
    tables = rounded + table
    root = 0.0
    if layout.engine != "ddp":  # the root's gradients are copied into one buffer to be reduced
        layers = model.layers + (model.aux_layers if objective.name != "mlm" else 0)
        count = parameter_count(model, objective).total
        root = FP32 * (count - layers * layer_parameters(model, objective))
    table_phase = (2 * stream + ids, tables + root)
    if objective.name == "mlm":
        early = [
            (main + ids + stream, tables + masked_head + chunk),
            (main + ids + top, tables),
        ]
        return early, [table_phase]
    aux = _encoder(model, model.aux_layers, layout, element)
    aux_top = _top_layer(model, model.aux_layers, layout, element)
    main_heads = {
        "metro": masked_head + full_head,
        "electra": full_head,
        "clm-all": full_head,
    }[objective.name]
    main_chunk = {"metro": chunk, "electra": 0, "clm-all": full_chunk}[objective.name]
    # One process takes the auxiliary model backward before the main one runs.
    alone = layout.engine == "ddp" and layout.gpus == 1
    both = (0 if alone else aux) + main + ids
    heads = (0 if alone else masked_head) + main_heads
    early = [
        (both, tables + heads + main_chunk + stream),
        (both, tables + heads + 3 * stream),
        (both + top, tables + heads - main_heads),
    ]
    # In the other engines the main encoder's lookups keep their rows for the table.
    held = 0 if alone else stream
    late = [
        (aux + ids + stream, held + tables + masked_head + (chunk if alone else 0)),
        (aux + ids + stream + aux_top, tables),
        table_phase,
    ]
    return early, late


def _head_chunk(rows: int, vocab_size: int, element: int, device: str) -> float:
    """Bytes of the logits that a vocabulary head holds at a time, on the CPU with its scratch."""
    least, most = CHUNK_ROWS[device]
    fitting = min(max(CHUNK_ELEMENTS[device] // vocab_size, least), most)
    chunks = math.ceil(rows / max(fitting, math.ceil(rows / MOST_CHUNKS)))
    chunk = math.ceil(rows / chunks)
    # There the gradient of 4 to 16 sample tiles, 2 MiB if that many, is packed in 4 bytes a number.
    fitting = min(max((2 << 20) // (SAMPLE_TILE * chunk * element), 4), 16)
    tiles = min(fitting, math.ceil(vocab_size / SAMPLE_TILE))
    packed = tiles * SAMPLE_TILE * FP32 * chunk if device == "cpu" else 0
    return element * vocab_size * chunk + packed


def _encoder(model: ModelConfig, layers: int, layout: Layout, element: int) -> float:
    """Bytes that an encoder's forward pass keeps: the first norm's sum, every layer's input, the
    output, and what is inside the layers."""
    tokens = layout.sequences * model.sequence_length
    stream = element * tokens * model.hidden
    kept = layers - recomputed_layers(layers, layout.recompute)
    inputs = 0 if layout.recompute == "norms" else layers  # else they are the norms' outputs
    inner = _layer_inner(model, tokens, element, layout.recompute)
    return (2 + inputs) * stream + 2 * FP32 * tokens + kept * inner


def _top_layer(model: ModelConfig, layers: int, layout: Layout, element: int) -> float:
    """Bytes of the last layer's backward pass beside what the forward passes kept.

    At its largest, in the feed-forward's, the layer's output and the sum before it are gone.
    """
    tokens = layout.sequences * model.sequence_length
    # Of every second layer the first is recomputed: the last one is where their number is odd.
    again = layout.recompute == "all" or (layout.recompute == "alternate" and layers % 2 == 1)
    inner = _layer_inner(model, tokens, element, layout.recompute) if again else 0.0
    gone = 2 * element * tokens * model.hidden
    return inner + _layer_backward(model, tokens, element) - gone


def _layer_inner(model: ModelConfig, tokens: int, element: int, policy: str) -> float:
    """Bytes that a layer keeps beside its output, which is the next one's input.

    Queries, keys and values 3 H, attention's output H, two sums before norms 2 H, the first norm's
    output H unless it is computed again, the feed-forward input F; float32: log-sum-exp a head,
    mean and deviation a norm.
    """
    width = (6 if policy == "norms" else 7) * model.hidden + model.ffn
    activations = element * tokens * width
    return activations + FP32 * tokens * (model.heads + 4)


def _layer_backward(model: ModelConfig, tokens: int, element: int) -> float:
    """Bytes that come and go in a layer's backward pass, at its largest: the feed-forward's.

    A gradient [T, F] (that before the GELU is written over the one after it), two [T, H] (of the
    product and of the residual), one weight's gradient [H, F] in float32 and the weight rounded for
    the product.
    """
    matrix = model.hidden * model.ffn
    rounded = element * matrix if element != FP32 else 0
    gradients = element * tokens * (model.ffn + 2 * model.hidden)
    return gradients + FP32 * matrix + rounded
