"""What the sharded engines exchange, and a model of XXL's depth on two ranks against one process.

The functions `gathers` and `xxl_step` run on the ranks.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_distributed import free_port
from training_runs import ENVIRONMENT

from metro_ext.config import Config, ModelConfig, load_config
from metro_ext.distributed import World, connect, disconnect  # noqa: F401  (on the ranks)
from metro_ext.model import PAD_ID, Packing, PretrainingModel
from metro_ext.objective import Objective
from metro_ext.optim import AdamW, decays
from metro_ext.parallel import Local, Sharded, engine
from metro_ext.plan import plans
from metro_ext.plan_time import GPUS, usable_memory
from metro_ext.presets import PRESETS, parameter_count

CPU = torch.device("cpu")
RANKS = 2
CLIP = 0.05  # far below the norm, so that clipping shows
TINY = ModelConfig(
    layers=2, hidden=24, ffn=40, heads=3, aux_layers=1, vocab_size=61, sequence_length=16
)


def narrow_xxl() -> Config:
    """The preset xxl at 1/64 of its width, with all of its 64 + 8 layers."""
    config = load_config(["--parallel=fsdp2", "--run.recompute=all"], preset="xxl")
    full = config.model
    model = dataclasses.replace(
        full, hidden=full.hidden // 64, ffn=full.ffn // 64, heads=5,
        vocab_size=config.data.vocab_size // 64, sequence_length=32,
    )  # fmt: skip
    run = dataclasses.replace(config.run, precision="fp32", tokens_per_batch=64)
    return dataclasses.replace(config, model=model, run=run)


def micro_batch(model: ModelConfig, number: int) -> tuple[torch.Tensor, Packing]:
    """Two full sequences."""
    length = model.sequence_length
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(5, model.vocab_size, (2 * length,), generator=generator)
    positions = torch.arange(2 * length) % length + PAD_ID + 1
    bounds = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    return tokens, Packing(positions, bounds, length, torch.tensor(number))


def objective_of(config: Config, dtype: torch.dtype) -> Objective:
    return Objective(config.objective, torch.arange(5), 4, dtype)


def take_step(spread: Local, config: Config, micro_batches: list[int]) -> tuple[float, float]:
    """(this rank's part of the loss, the gradient norm over all) of a clipped update."""
    spread.model.train()
    optimizer = AdamW(spread, config.optim)
    loss = 0.0
    denominators = torch.full((3,), 40.0)  # the same for every micro-batch of the step
    for number in micro_batches:
        with spread.accumulating(last=number == micro_batches[-1]):
            tokens, packing = micro_batch(config.model, number)
            out = spread.run(spread.model, tokens, packing, denominators)
            out.loss.backward()
        loss += float(out.loss.detach())
    norm, *_ = spread.clip(CLIP)
    optimizer.step(1e-3)
    return loss, float(norm)


PROGRAM = """
import sys, test_sharding as t
world, output = t.connect("gloo", 120), t.Path(sys.argv[1])
t.gathers(world, output)
t.xxl_step(world, output)
t.disconnect()
"""


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory) -> Path:
    """What the two functions wrote, run by two gloo ranks."""
    output = tmp_path_factory.mktemp("ranks")
    folder = Path(__file__).parent
    group = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = os.pathsep.join([str(folder), str(folder.parent)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(output)], stderr=subprocess.PIPE, text=True,
            env={**ENVIRONMENT, **group, "RANK": str(rank), "PYTHONPATH": path},
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return output


def gathers(world: World, output: Path) -> None:
    """Three bf16 steps of each sharded engine, with weights that travel whole and rounded."""
    config = dataclasses.replace(load_config(), model=TINY)
    for keep in (False, True):
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            with torch.device("meta"):
                model = PretrainingModel(TINY, "metro", 1)
            counted = dataclasses.replace(world, traffic=type(world.traffic)())
            objective = objective_of(config, torch.bfloat16)
            spread = Sharded(model, objective, CPU, 1, dtype, keep, counted)
            losses = [take_step(spread, config, [world.rank, 2 + world.rank]) for _ in range(3)]
            parts = {name: value.clone() for name, value in spread.named_parameters()}
            found[dtype] = losses, parts, counted.traffic.sent
        whole, rounded = found.values()
        assert whole[0] == rounded[0]
        assert all(torch.equal(value, rounded[1][name]) for name, value in whole[1].items())
        if world.is_first:
            line = {"whole": whole[2], "rounded": rounded[2]}
            with (output / f"keep-{keep}.json").open("w") as file:
                json.dump(line, file)


def padded(shape: torch.Size) -> int:
    """Elements of a parameter whose rows are filled up to a multiple of the ranks."""
    return math.ceil(shape[0] / RANKS) * RANKS * math.prod(shape[1:])


def test_rounded_matrices_give_the_bits_of_whole_ones_at_fewer_bytes(on_ranks):
    """Counted by hand: 2 ranks send half of what is gathered, and half of what is reduced."""
    with torch.device("meta"):
        parameters = dict(PretrainingModel(TINY, "metro", 1).named_parameters())
    matrices = sum(padded(p.shape) for name, p in parameters.items() if decays(name, p))
    every = sum(padded(p.shape) for p in parameters.values())
    in_layers = sum(padded(p.shape) for name, p in parameters.items() if ".layers." in name)
    layer_matrices = sum(
        padded(p.shape) for name, p in parameters.items() if ".layers." in name and decays(name, p)
    )
    for keep in (False, True):
        sent = json.loads((on_ranks / f"keep-{keep}.json").read_text())
        # Once a step, or in each of two micro-batches: the root, and a layer on both its ways.
        gathered = every if keep else 2 * (every + in_layers)
        narrow = matrices if keep else 2 * (matrices + layer_matrices)
        assert sent["whole"] == 3 * 4 * (gathered + every) // 2
        # A buffer ends at a multiple of four bytes.
        saved = sent["whole"] - sent["rounded"]
        assert saved == pytest.approx(3 * 2 * narrow // 2, abs=3 * 4 * 14)


def xxl_step(world: World, output: Path) -> None:
    """A step of the narrow XXL, saved whole; each rank checks that it holds half."""
    config = narrow_xxl()
    spread = engine(config, objective_of(config, torch.float32), CPU, world)
    held = sum(part.numel() for _, part in spread.named_parameters())
    total = parameter_count(config.model, config.objective).total
    assert held <= total / RANKS + len(spread.model.main.layers) * config.model.hidden
    loss, norm = take_step(spread, config, [world.rank])
    whole = {
        name: spread.spread(name, part).full_tensor() for name, part in spread.named_parameters()
    }
    loss = float(world.sum(torch.tensor(loss, dtype=torch.float64)))
    if world.is_first:
        figures = torch.tensor([loss, norm], dtype=torch.float64)
        save_file({**whole, "figures": figures}, output / "whole.safetensors")


def test_xxl_is_planned_and_a_narrow_one_trains_as_on_one_process(on_ranks):
    full = load_config(preset="xxl")
    full = dataclasses.replace(
        full, model=dataclasses.replace(full.model, vocab_size=full.data.vocab_size)
    )
    with torch.device("meta"):  # all of it, in no memory
        network = PretrainingModel(full.model, "metro", 1)
    assert all(p.is_meta for p in network.parameters())
    assert sum(p.numel() for p in network.main.parameters()) == pytest.approx(5.4e9, rel=0.03)
    best = next(p for p in plans(full, 256, GPUS["h100"]) if p.layout.engine == "fsdp2")
    assert best.memory.total < usable_memory(GPUS["h100"])

    config = narrow_xxl()
    assert (len(network.main.layers), len(network.auxiliary.layers)) == (
        config.model.layers,
        config.model.aux_layers,
    )
    alone = dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, mode="ddp"),
        run=dataclasses.replace(config.run, recompute="none"),
    )  # fmt: skip
    spread = engine(alone, objective_of(alone, torch.float32), CPU, World())
    loss, norm = take_step(spread, alone, [0, 1])
    found = load_file(on_ranks / "whole.safetensors")
    figures = found.pop("figures").tolist()
    assert figures == pytest.approx([loss, norm], rel=1e-5) and norm > 10 * CLIP
    for name, value in spread.named_parameters():
        # The first AdamW step moves a weight by up to the rate, 1e-3.
        torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("preset", ["xl", "xxl"])
def test_residual_projections_start_smaller_by_depth(preset):
    """Standard deviations over all layers, of 190 000 weights or more: within 1 %."""
    assert PRESETS[preset]["model"]["depth_scaled_init"]
    model = dataclasses.replace(
        load_config(preset=preset).model, hidden=64, ffn=256, heads=2, vocab_size=300,
        sequence_length=16,
    )  # fmt: skip
    layers = PretrainingModel(model, "mlm", 1).main.layers
    scaled = model.init_std / math.sqrt(2 * model.layers)
    for name, expected in (
        ("attention_out", scaled), ("ffn_out", scaled), ("qkv", model.init_std),
    ):  # fmt: skip
        weights = [getattr(layer, name).weight.detach().flatten() for layer in layers]
        assert float(torch.cat(weights).std()) == pytest.approx(expected, rel=0.01)
