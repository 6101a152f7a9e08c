import pytest
import torch

from metro_ext.config_schema import ModelConfig, OptimConfig
from metro_ext.model import PretrainingModel
from metro_ext.optim import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    parameter_groups,
)

CONFIG = ModelConfig(
    layers=1, hidden=16, ffn=32, heads=2, aux_layers=1, vocab_size=40, sequence_length=16
)


def test_rate_rises_and_falls_linearly():
    config = OptimConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(step, 10, config) for step in range(1, 11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])


def test_warm_up_longer_than_the_run():
    config = OptimConfig(lr=1.0, warmup_steps=100)
    assert learning_rate(5, 5, config) == 1.0


def test_no_warm_up():
    assert learning_rate(1, 4, OptimConfig(lr=1.0, warmup_steps=0)) == pytest.approx(4 / 5)


def test_only_matrices_decay_and_shared_parameters_come_once():
    model = PretrainingModel(CONFIG, "metro", seed=0)
    decayed, kept = parameter_groups(model, 0.01)
    everything = [id(p) for p in decayed["params"] + kept["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))
    assert all(p.dim() == 2 for p in decayed["params"])
    bias_tables = {id(model.main.relative_bias), id(model.auxiliary.relative_bias)}
    assert bias_tables <= {id(p) for p in kept["params"]}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.01, 0.0)


def steps(model, optimizer, count):
    for step in range(count):
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_state_round_trip_continues_bit_for_bit():
    unbroken = PretrainingModel(CONFIG, "metro", seed=0)
    optimizer = make_optimizer(unbroken, OptimConfig())
    steps(unbroken, optimizer, 2)
    saved = {k: v.clone() for k, v in optimizer_tensors(unbroken, optimizer).items()}
    weights = {k: v.detach().clone() for k, v in unbroken.named_parameters()}
    steps(unbroken, optimizer, 2)

    resumed = PretrainingModel(CONFIG, "metro", seed=1)
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            parameter.copy_(weights[name])
    optimizer = make_optimizer(resumed, OptimConfig())
    load_optimizer_tensors(resumed, optimizer, saved)
    steps(resumed, optimizer, 2)
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
