"""How long a layout's step takes: a roofline of products, memory traffic and exchanged bytes.

Nothing here is measured: the rates are data sheets' and published ones, and the efficiencies are
assumptions. `ASSUMPTIONS` names each with its reason, and the planner prints them all.
"""

from __future__ import annotations

from dataclasses import dataclass

from metro_ext.config_schema import ModelConfig, ObjectiveConfig, SyncConfig
from metro_ext.objective import mask_count
from metro_ext.plan_memory import ELEMENT_BYTES, FP32, Layout, layer_parameters, recomputed_layers
from metro_ext.presets import parameter_count
from metro_ext.wire import value_bytes


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of eight, from data sheets; rates are a GPU's.

    memory: bytes that torch finds on it.
    matrix: dense bf16 tensor-core FLOP/s.
    single: float32 FLOP/s, without tensor cores, as torch multiplies by default.
    attention_forward, attention_backward: FLOP/s of FlashAttention, head size 64, 512 tokens.
    traffic: bytes/s of its memory.
    link: bytes/s a direction between the GPUs of a node (NVLink).
    network: bytes/s a direction to other nodes, one adapter a GPU.
    """

    memory: float
    matrix: float
    single: float
    attention_forward: float
    attention_backward: float
    traffic: float
    link: float
    network: float

    def rate(self, precision: str) -> float:
        """FLOP/s of products in ``run.precision``."""
        return self.matrix if precision == "bf16" else self.single


_HOPPER = {
    "matrix": 989e12,
    "single": 67e12,
    "attention_forward": 333e12,
    "attention_backward": 272e12,
    "link": 450e9,
    "network": 50e9,  # 400 Gbit/s
}
GPUS = {
    # 200 Gbit/s adapters.
    "a100-80g": Gpu(79 * 2**30, 312e12, 19.5e12, 136e12, 79e12, 2.04e12, 300e9, 25e9),
    "h100": Gpu(memory=79 * 2**30, traffic=3.35e12, **_HOPPER),
    "h200": Gpu(memory=139 * 2**30, traffic=4.8e12, **_HOPPER),
}

GPUS_PER_NODE = 8
MATRIX_EFFICIENCY = 0.6
NARROW_EFFICIENCY = 0.45
NARROW_HIDDEN = 1024
TRAFFIC_EFFICIENCY = 0.8
NETWORK_EFFICIENCY = 0.7
OVERLAP = 0.8
LAUNCH_SECONDS = 5e-6
LAYER_LAUNCHES = 60
FIXED_LAUNCHES = 400
RESERVED_BYTES = 3 * 2**30
FRAGMENTATION = 0.05

ASSUMPTIONS = (
    ("GPUS_PER_NODE", f"{GPUS_PER_NODE}", "DGX and HGX nodes, one network adapter a GPU"),
    ("MATRIX_EFFICIENCY", f"{MATRIX_EFFICIENCY}", "of the data sheet's dense bf16 rate, what "
     "large products reach under sustained power"),
    ("NARROW_EFFICIENCY", f"{NARROW_EFFICIENCY}", f"the same up to a width of {NARROW_HIDDEN}, "
     "where a product's inner loop is too short to hide its ends"),
    ("attention rates", "a GPU's", "published for FlashAttention without bias, head size 64, "
     "512 tokens; these kernels have not yet run on a GPU"),
    ("TRAFFIC_EFFICIENCY", f"{TRAFFIC_EFFICIENCY}", "of the data sheet's memory bandwidth, what "
     "streaming kernels reach"),
    ("NETWORK_EFFICIENCY", f"{NETWORK_EFFICIENCY}", "of the slowest link's rate, what ring "
     "collectives of large buffers reach"),
    ("OVERLAP", f"{OVERLAP}", "share of the compute beside which an exchange can hide: the first "
     "bucket and the last gather cannot"),
    ("LAUNCH_SECONDS", f"{LAUNCH_SECONDS:g}", "a kernel's launch from Python without CUDA graphs; "
     "a micro-batch takes the longer of kernels and launches"),
    ("LAYER_LAUNCHES", f"{LAYER_LAUNCHES}", "kernels of a layer, forward and backward, with the "
     "casts of weights and the sums of gradients"),
    ("FIXED_LAUNCHES", f"{FIXED_LAUNCHES}", "kernels of embeddings, heads, corruption and loss"),
    ("RESERVED_BYTES", f"{RESERVED_BYTES / 2**30:g} GiB", "CUDA context, NCCL's buffers and "
     "cuBLAS' workspaces"),
    ("FRAGMENTATION", f"{FRAGMENTATION}", "of the memory, lost to the allocator's blocks"),
)  # fmt: skip


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest GPU, all alike.

    compute: products, memory traffic or launches of all micro-batches, recomputation included.
    exposed: exchange of weights and gradients that no compute hides.
    optimizer: clipping and update.
    """

    compute: float
    exposed: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.optimizer


def usable_memory(gpu: Gpu) -> float:
    """Bytes that a plan may fill."""
    return gpu.memory * (1 - FRAGMENTATION) - RESERVED_BYTES


def executed_flops(
    model: ModelConfig, objective: ObjectiveConfig, tokens: int, recompute: str
) -> dict[str, float]:
    """FLOPs of one micro-batch of `tokens`, full sequences, by the rate that they run at.

    Beyond the useful ones (`metro_ext.presets.flops_per_token`) these are the attention scores that
    the operator's backward pass computes again, and recomputed layers.
    """
    hidden, length = model.hidden, model.sequence_length
    aux = model.aux_layers if objective.name != "mlm" else 0
    layers = model.layers + aux
    again = recomputed_layers(model.layers, recompute) + recomputed_layers(aux, recompute)
    layer = 2 * tokens * (4 * hidden * hidden + 2 * hidden * model.ffn)
    product = 2 * tokens * length * hidden  # scores, or values weighted by them
    rows = mask_count(tokens, objective.mask_fraction)
    full, masked = {"metro": (1, 2), "electra": (1, 1), "clm-all": (1, 1), "mlm": (0, 1)}[
        objective.name
    ]  # heads on all tokens and on masked ones
    vocabulary_rows = masked * rows + (tokens if objective.name == "clm-all" else 0)
    transforms = 2 * (masked * rows + full * tokens) * hidden * hidden
    logits = 2 * vocabulary_rows * hidden * model.vocab_size
    return {
        "matrix": (3 * layers + again) * layer + 3 * transforms + 3 * logits,
        "attention_forward": (layers + again) * 2 * product,
        "attention_backward": layers * 5 * product,
    }


def outer_bytes(model: ModelConfig, objective: ObjectiveConfig, gpus: int, wire: str) -> float:
    """What a GPU sends in an outer step of relaxed synchronisation: a reduction and a gather."""
    count = parameter_count(model, objective).total
    return 2 * value_bytes(wire) * count * (gpus - 1) / gpus


def step_time(
    model: ModelConfig,
    objective: ObjectiveConfig,
    precision: str,
    layout: Layout,
    gpu: Gpu,
    sync: SyncConfig | None = None,
) -> StepTime:
    """The step of a layout; `precision` is ``run.precision``.

    Of relaxed synchronisation a step has its share of an outer one, which nothing hides.
    """
    count = parameter_count(model, objective).total
    micro = _micro_batch(model, objective, precision, layout, gpu)
    compute = layout.accumulation * micro
    if sync is not None and sync.mode == "relaxed":
        sent = outer_bytes(model, objective, layout.gpus, sync.wire) / sync.interval
        exposed = sent / exchange_rate(layout.gpus, gpu)
    else:
        exposed = _exposed(model, objective, precision, layout, gpu, micro)
    # Norm and clipping read and write gradients (12 bytes a parameter); Adam reads weight,
    # gradient and moments and writes all but the gradient (28).
    own = count if layout.engine == "ddp" else count / layout.gpus
    optimizer = own * (12 + 28) / (gpu.traffic * TRAFFIC_EFFICIENCY)
    return StepTime(compute, exposed, optimizer)


def _micro_batch(
    model: ModelConfig, objective: ObjectiveConfig, precision: str, layout: Layout, gpu: Gpu
) -> float:
    """Seconds of one micro-batch's forward and backward pass."""
    tokens = layout.sequences * model.sequence_length
    flops = executed_flops(model, objective, tokens, layout.recompute)
    narrow = model.hidden <= NARROW_HIDDEN
    efficiency = NARROW_EFFICIENCY if narrow else MATRIX_EFFICIENCY
    rate = gpu.rate(precision) * efficiency
    products = flops["matrix"] / rate
    if precision == "bf16":
        products += flops["attention_forward"] / gpu.attention_forward
        products += flops["attention_backward"] / gpu.attention_backward
    else:
        products += (flops["attention_forward"] + flops["attention_backward"]) / rate
    aux = model.aux_layers if objective.name != "mlm" else 0
    layers = model.layers + aux
    again = recomputed_layers(model.layers, layout.recompute)
    again += recomputed_layers(aux, layout.recompute)
    # Passes over activations outside products: forward, two norms (read two, write two) and the
    # GELU (read and write F); backward, as many again twice.
    forward = ELEMENT_BYTES[precision] * tokens * (8 * model.hidden + 2 * model.ffn)
    traffic = (3 * layers + again) * forward
    if layout.recompute == "norms":  # two a layer: the sum is read, it and the output are written
        traffic += 2 * layers * 3 * ELEMENT_BYTES[precision] * tokens * model.hidden
    # Weights are rounded for the forward and for the backward pass (read 4, write 2 bytes each),
    # gradients written in bf16, read, and added in float32 (2 + 2 + 4 + 4 + 4).
    per_parameter = 2 * 6 + 16 if precision == "bf16" else 8 + 4
    traffic += per_parameter * parameter_count(model, objective).total
    kernels = products + traffic / (gpu.traffic * TRAFFIC_EFFICIENCY)
    launches = LAYER_LAUNCHES * (layers + again / 3) + FIXED_LAUNCHES
    return max(kernels, launches * LAUNCH_SECONDS)


def exchange_rate(gpus: int, gpu: Gpu) -> float:
    """Bytes/s at which a ring collective's buffer passes a GPU (NCCL's "bus bandwidth").

    Inside a node it is NVLink's. Between nodes the ring enters and leaves each node through all of
    its adapters, so that their rates add, up to NVLink's.
    """
    rate = gpu.link
    if gpus > GPUS_PER_NODE:
        rate = min(gpu.link, GPUS_PER_NODE * gpu.network)
    return rate * NETWORK_EFFICIENCY


def _exposed(
    model: ModelConfig,
    objective: ObjectiveConfig,
    precision: str,
    layout: Layout,
    gpu: Gpu,
    micro: float,
) -> float:
    """Seconds of exchange that stay visible in a step.

    Gradients travel in float32, gathered weights in `precision` (all but vectors, which are few).
    """
    if layout.gpus == 1:
        return 0.0
    count = parameter_count(model, objective)
    rate = exchange_rate(layout.gpus, gpu)
    element = count.total * (layout.gpus - 1) / layout.gpus / rate  # seconds a byte of each
    reduction, gather = FP32 * element, ELEMENT_BYTES[precision] * element
    last_backward = OVERLAP * micro * 2 / 3
    if layout.engine == "ddp":  # an all-reduce is a reduction and a gather
        return max(0.0, 2 * reduction - last_backward)
    layers = model.layers + (model.aux_layers if count.aux else 0)
    inside = layers * layer_parameters(model, objective) / count.total
    # The root is gathered before the first layer and reduced after the last: neither is hidden.
    if layout.engine == "zero1":
        layers_gather = max(0.0, inside * gather - OVERLAP * micro / 3)
        layers_reduction = max(0.0, inside * reduction - last_backward)
        return (1 - inside) * (gather + reduction) + layers_gather + layers_reduction
    # Each micro-batch gathers the root once and the layers twice; the last one also reduces.
    own = max(0.0, 2 * inside * gather - OVERLAP * micro)
    last = max(0.0, inside * (2 * gather + reduction) - OVERLAP * micro)
    root = (1 - inside) * (layout.accumulation * gather + reduction)
    return root + (layout.accumulation - 1) * own + last
