import pytest
import torch

from metro_ext.config_schema import ModelConfig, OptimConfig
from metro_ext.model import PretrainingModel
from metro_ext.optim import AdamW, decays, learning_rate

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


def set_gradients(model, seed):
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_equals_torchs_adamw():
    config = OptimConfig(weight_decay=0.1)
    model, peer = (PretrainingModel(CONFIG, "metro", seed=0) for _ in range(2))
    optimizer = AdamW(model, config)
    groups = [
        {"params": [p for name, p in peer.named_parameters() if decays(name, p) == decay]}
        for decay in (True, False)
    ]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.0
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6, fused=True)
    for step in range(3):
        set_gradients(model, step)
        set_gradients(peer, step)
        optimizer.step(0.01)
        reference.step()
    for a, b in zip(model.parameters(), peer.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_matrices_decay():
    model = PretrainingModel(CONFIG, "metro", seed=0)
    optimizer = AdamW(model, OptimConfig())
    decayed = {name for name, p in optimizer.parameters.items() if decays(name, p)}
    assert "main.layers.0.qkv.weight" in decayed and "main.embeddings.token" in decayed
    assert not any(name.endswith(("bias", "norm.weight")) for name in decayed)
    assert len(optimizer.parameters) == len(list(model.parameters()))  # shared ones once


def test_a_parameter_without_gradient_stays():
    model = PretrainingModel(CONFIG, "metro", seed=0)
    before = model.rtd_head.bias.clone(), model.main_head.bias.clone()
    optimizer = AdamW(model, OptimConfig())
    set_gradients(model, 0)
    model.rtd_head.bias.grad = None
    optimizer.step(0.1)
    assert torch.equal(before[0], model.rtd_head.bias)
    assert not torch.equal(before[1], model.main_head.bias)


def test_state_round_trip_continues_bit_for_bit():
    unbroken = PretrainingModel(CONFIG, "metro", seed=0)
    optimizer = AdamW(unbroken, OptimConfig())
    for step in range(2):
        set_gradients(unbroken, step)
        optimizer.step(0.01)
    saved = {name: value.clone() for name, value in optimizer.tensors().items()}
    resumed = PretrainingModel(CONFIG, "metro", seed=1)
    resumed.load_state_dict(unbroken.state_dict())
    other = AdamW(resumed, OptimConfig())
    other.load_tensors(saved)
    for model, one in ((unbroken, optimizer), (resumed, other)):
        set_gradients(model, 5)
        one.step(0.01)
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
