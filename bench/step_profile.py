"""Where the time of our training step goes on the CPU, beside the floor of each part.

    python bench/step_profile.py [--precision bf16] [shape options of bench/step.py] [--output FILE]

Steps run under torch's profiler; each operator's own time is booked to a part of the step, and a
part's floor is its useful matrix products at the best rate that this run measured (as
``bench/step.py`` has it); a part without products has none. ``ours`` is a part's time in a step.
The profiler costs about a microsecond an operator, some thousand of them a step; the whole step's
time without it is reported too.
"""

import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/step_profile.py`

from bench.harness import Case, emit
from bench.step import ceiling_shapes, parse
from bench.step_worker import DTYPES, OURS, configs, make_step
from bench.timing import MatrixCeiling, Stopwatch
from metro_ext.command_line import run
from metro_ext.config_schema import ModelConfig
from metro_ext.errors import UserError
from metro_ext.objective import mask_count

# The first part whose word is in an operator's name has its time.
PARTS = {
    "vocabulary heads": ("metro::vocab_head",),
    "attention": ("metro::attention", "metro_attention"),
    "layer_norm": ("metro::layer_norm", "metro_layer_norm"),
    "bias_gelu": ("metro::bias_gelu",),
    "corruption, RTD head, loss": ("metro::",),
    "products of the layers": ("aten::mm", "aten::addmm", "mkldnn::", "aten::linear"),
    "AdamW": ("adam",),
    "gradient norm and clipping": ("norm", "aten::_foreach_mul", "aten::clamp"),
    "conversions and copies": ("aten::copy_", "aten::_to_copy", "aten::clone"),
    "lookups": ("index", "embedding", "gather"),
}
REST = "the rest"


def part_of(operator: str) -> str:
    for part, words in PARTS.items():
        if any(word in operator for word in words):
            return part
    return REST


def products(model: ModelConfig, tokens: int, masked: int) -> dict[str, float]:
    """FLOPs of a step's useful products by part; they add up to `flops_per_token` of ``metro``."""
    hidden, layers = model.hidden, model.layers + model.aux_layers
    linear = layers * tokens * 2 * (4 * hidden * hidden + 2 * hidden * model.ffn)
    transforms = 2 * hidden * hidden * (tokens + 2 * masked)  # before the RTD and the two MLM heads
    return {
        "products of the layers": 3.0 * (linear + transforms),
        "attention": 3.0 * layers * tokens * 4 * model.sequence_length * hidden,
        "vocabulary heads": 3.0 * 2 * masked * 2 * hidden * model.vocab_size,
        "corruption, RTD head, loss": 3.0 * tokens * 2 * hidden,
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if options.device != "cpu":
        raise UserError("--device: expected cpu, found cuda; there, use Nsight Systems")
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = torch.device("cpu"), DTYPES[options.precision]
    shapes = ceiling_shapes(options).values()
    ceilings = [MatrixCeiling(m, n, k, dtype, device) for m, n, k in shapes]
    step, watch = make_step(OURS, options), Stopwatch(device)
    for _ in range(options.warmup):
        step()
    seconds, rates = [], []
    for _ in range(options.steps):
        seconds.append(watch.time(step))
        rates.append([ceiling.flops / ceiling() for ceiling in ceilings])
    rate = max(statistics.median(column) for column in zip(*rates, strict=True))
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(options.steps):
            step()
    spent: Counter[str] = Counter()
    for event in record.key_averages():
        spent[part_of(event.key)] += event.self_cpu_time_total / 1e6 / options.steps
    model, objective, _ = configs(options)
    flops = products(model, options.tokens, mask_count(options.tokens, objective.mask_fraction))
    whole = statistics.median(seconds)
    shape = (
        f"{model.layers} x {model.hidden}, auxiliary {model.aux_layers} layers, "
        f"{options.tokens // options.seq} x {options.seq}, {options.precision}"
    )
    cases = [
        Case(
            name=part,
            ours=time,
            floor_seconds=flops[part] / rate if part in flops else None,
            figures={"share_of_step": time / sum(spent.values())},
        )
        for part, time in spent.most_common()
    ]
    total = Case(
        name=f"the whole step, {shape}", ours=whole, floor_seconds=sum(flops.values()) / rate,
        figures={"profiled_seconds": sum(spent.values())},
    )  # fmt: skip
    emit(
        "step_profile",
        [total, *cases],
        ceilings={f"{options.precision} product FLOP/s": rate},
        threads=options.threads,
        output=options.output,
    )


if __name__ == "__main__":
    run(main)
