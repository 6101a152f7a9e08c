"""Plans a run: ``python -m metro_ext.plan --preset xxl --gpus 256 --gpu h100``.

Gives parameters, FLOPs a token, and, for every engine, the fastest layout that fits with its memory
by part, step time, tokens/s and days. Options of the run (``--model.layers=48``, ``--config``) are
those of ``metro_ext.train``. Memory follows from the operators' own bookkeeping; times rest on
assumptions, which are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from metro_ext.command_line import run
from metro_ext.config import load_config
from metro_ext.config_schema import Config
from metro_ext.errors import UserError
from metro_ext.plan_memory import Layout, Memory, peak_memory, saved_bytes
from metro_ext.plan_time import (
    ASSUMPTIONS,
    GPUS,
    Gpu,
    StepTime,
    exchange_rate,
    executed_flops,
    outer_bytes,
    step_time,
    usable_memory,
)
from metro_ext.presets import flops_per_token, parameter_count

ENGINES = ("ddp", "zero1", "fsdp2")
RECOMPUTE = ("none", "norms", "alternate", "all")
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Plan:
    """A layout with what it holds and takes."""

    layout: Layout
    memory: Memory
    time: StepTime


def sized(config: Config) -> Config:
    """The configuration with its vocabulary's size: that of the tokenizer it would train."""
    if config.model.vocab_size:
        return config
    model = dataclasses.replace(config.model, vocab_size=config.data.vocab_size)
    return dataclasses.replace(config, model=model)


def layouts(config: Config, gpus: int) -> Iterator[Layout]:
    """Every engine, recomputation and micro-batch size that keeps the step's batch.

    Raises:
        UserError: the GPUs cannot share the batch's sequences.
    """
    batch = config.run.tokens_per_batch * config.run.accumulation
    sequences, rest = divmod(batch, config.model.sequence_length)
    if gpus < 1:
        raise UserError(f"--gpus must be at least 1, found {gpus}")
    if rest or sequences % gpus:
        raise UserError(
            f"--gpus must divide the {batch / config.model.sequence_length:g} sequences of a step "
            f"(run.tokens_per_batch x run.accumulation / model.sequence_length), found {gpus}"
        )
    own = sequences // gpus
    for engine in _engines(config):
        for recompute in RECOMPUTE:
            for micro in range(1, own + 1):
                if own % micro == 0:
                    yield Layout(engine, gpus, recompute, micro, own // micro)


def _engines(config: Config) -> tuple[str, ...]:
    """Ranks that train apart have no weights in common to shard."""
    return ENGINES[:1] if config.sync.mode == "relaxed" else ENGINES


def plans(config: Config, gpus: int, gpu: Gpu) -> list[Plan]:
    """All layouts of a configuration, the fastest first; of equals the one that holds least."""
    found = []
    for layout in layouts(config, gpus):
        settings = config.model, config.objective, config.run.precision, layout
        memory = peak_memory(*settings, sync=config.sync)
        found.append(Plan(layout, memory, step_time(*settings, gpu, config.sync)))
    return sorted(found, key=lambda plan: (plan.time.total, plan.memory.total))


def options(config: Config, layout: Layout) -> str:
    """The options of ``metro_ext.train`` that stand for a layout."""
    micro = layout.sequences * config.model.sequence_length
    return (
        f"--parallel {layout.engine} --run.recompute={layout.recompute} "
        f"--run.tokens_per_batch={micro} --run.accumulation={layout.accumulation * layout.gpus}"
    )


def report(config: Config, gpus: int, gpu_name: str, tokens: float | None = None) -> str:
    """The plan as text.

    Args:
        config: of the run, with its vocabulary's size (`sized`).
        gpus: their number; it divides the sequences of a step.
        gpu_name: a key of ``GPUS``.
        tokens: of the whole run; None: those of ``run.steps`` steps.

    Raises:
        UserError: the GPUs cannot share the batch, or no layout fits.
    """
    gpu = GPUS[gpu_name]
    batch = config.run.tokens_per_batch * config.run.accumulation
    total = batch * config.run.steps if tokens is None else tokens
    found = plans(config, gpus, gpu)
    fitting = [plan for plan in found if plan.memory.total <= usable_memory(gpu)]
    if not fitting:
        least = min(found, key=lambda plan: plan.memory.total)
        raise UserError(
            f"no layout fits {gpus} x {gpu_name}: the smallest ({options(config, least.layout)}) "
            f"needs {_gib(least.memory.total)} of {_gib(usable_memory(gpu))}; give more --gpus"
        )
    count = parameter_count(config.model, config.objective)
    flops = flops_per_token(config.model, config.objective)
    lines = [
        f"preset {config.preset}, objective {config.objective.name}, {config.run.precision}, "
        f"{gpus} x {gpu_name}",
        f"parameters {count.total / 1e6:.1f} M (main model {count.main_model / 1e6:.1f} M, "
        f"auxiliary {count.aux / 1e6:.1f} M, embeddings {count.embeddings / 1e6:.1f} M, "
        f"heads {count.heads / 1e6:.1f} M)",
        f"useful FLOPs {flops / 1e9:.3f} G a token, {flops * total:.3g} for {total:.3g} tokens",
        f"batch {batch} tokens a step, {total / batch:.0f} steps",
        f"memory for a plan {_gib(usable_memory(gpu))} of {_gib(gpu.memory)} a GPU; "
        f"collectives {exchange_rate(gpus, gpu) / 1e9:.0f} GB/s",
        "",
        _table(config, fitting, found, total),
        "",
        f"fastest that fits: {options(config, fitting[0].layout)}",
        *_detail(config, fitting[0], total, gpu),
        "",
        "assumptions (times are estimates from these, not measurements)",
        *(f"  {name} = {value}: {reason}" for name, value, reason in ASSUMPTIONS),
        f"  {gpu_name} = {_sheet(gpu)}: SXM, data sheets; memory as torch finds it",
    ]
    return "\n".join(lines)


def _table(config: Config, fitting: list[Plan], found: list[Plan], total: float) -> str:
    """Each engine's fastest layout that fits, or the smallest of one that does not."""
    lines = [
        "GiB a GPU  recompute  micro-batch  weights  gradients  optimizer  activations   head  "
        "total   step s  Mtokens/s    days"
    ]
    for engine in _engines(config):
        plan = next((plan for plan in fitting if plan.layout.engine == engine), None)
        fits = plan is not None
        if plan is None:
            same = [plan for plan in found if plan.layout.engine == engine]
            plan = min(same, key=lambda plan: plan.memory.total)
        memory, layout = plan.memory, plan.layout
        shape = f"{layout.sequences} x {layout.accumulation}"
        line = (
            f"{engine:<9}  {layout.recompute:<9}  {shape:>11}"
            f"  {memory.weights / 2**30:7.2f}  {memory.gradients / 2**30:9.2f}"
            f"  {memory.optimizer / 2**30:9.2f}  {memory.activations / 2**30:11.2f}"
            f"  {memory.head / 2**30:5.2f}  {memory.total / 2**30:5.1f}"
        )
        rate = _rate(config, plan)
        times = f"  {plan.time.total:7.3f}  {rate / 1e6:9.3f}  {total / rate / SECONDS_A_DAY:6.1f}"
        lines.append(line + (times if fits else "  does not fit"))
    return "\n".join(lines)


def _detail(config: Config, plan: Plan, total: float, gpu: Gpu) -> list[str]:
    time, layout, rate = plan.time, plan.layout, _rate(config, plan)
    peak = gpu.rate(config.run.precision)
    useful = flops_per_token(config.model, config.objective) * rate / layout.gpus
    tokens = layout.sequences * config.model.sequence_length
    executed = executed_flops(config.model, config.objective, tokens, layout.recompute)
    executed_rate = sum(executed.values()) / tokens * rate / layout.gpus
    host = saved_bytes(config.model, config.objective, layout, config.sync)
    lines = [
        f"  step {time.total:.3f} s: compute {time.compute:.3f}, exchange not hidden "
        f"{time.exposed:.3f}, optimizer {time.optimizer:.3f}",
        f"  {rate:.0f} tokens/s ({rate / layout.gpus:.0f} a GPU), model FLOPs utilisation "
        f"{useful / peak:.1%}, hardware utilisation {executed_rate / peak:.1%}",
        f"  {total / rate / SECONDS_A_DAY:.1f} days, "
        f"{total / rate / SECONDS_A_DAY * 24 * layout.gpus:.0f} GPU hours",
    ]
    if config.run.async_save:
        lines.append(f"  host memory for saves in the background {_gib(host)} a GPU")
    if config.sync.mode == "relaxed":
        sync = config.sync
        sent = outer_bytes(config.model, config.objective, layout.gpus, sync.wire)
        every_step = outer_bytes(config.model, config.objective, layout.gpus, "fp32")
        lines.append(
            f"  relaxed synchronisation in {sync.wire}: a GPU sends {sent / 1e9:.3g} GB every "
            f"{sync.interval} steps (ddp: {every_step / 1e9:.3g} GB every step)"
        )
    return lines


def _rate(config: Config, plan: Plan) -> float:
    """Tokens a second."""
    return config.run.tokens_per_batch * config.run.accumulation / plan.time.total


def _sheet(gpu: Gpu) -> str:
    return (
        f"{_gib(gpu.memory)} at {gpu.traffic / 1e12:g} TB/s, TFLOP/s: bf16 {gpu.matrix / 1e12:g}, "
        f"fp32 {gpu.single / 1e12:g}, "
        f"attention {gpu.attention_forward / 1e12:g} forward and {gpu.attention_backward / 1e12:g} "
        f"backward, NVLink {gpu.link / 1e9:g} GB/s, network {gpu.network / 1e9:g} GB/s"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every option of metro_ext.train is taken too",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the run")
    parser.add_argument("--gpu", choices=tuple(GPUS), required=True)
    parser.add_argument(
        "--tokens", type=float, metavar="N", help="of the whole run (default: run.steps steps)"
    )
    parser.add_argument("--config", metavar="FILE.toml", help="configuration to start from")
    known, rest = parser.parse_known_args(argv)
    if known.tokens is not None and not 0 < known.tokens < float("inf"):
        raise UserError(f"--tokens must be above 0, found {known.tokens:g}")
    own = ("--gpus", "--gpu", "--tokens", "--config")
    config = sized(load_config(rest, known.config, known_options=own))
    print(report(config, known.gpus, known.gpu, known.tokens))


if __name__ == "__main__":
    run(main)
