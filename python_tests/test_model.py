import dataclasses

import pytest
import reference_model
import torch
from op_checks import relative_error

from metro_ext.config_schema import ModelConfig
from metro_ext.model import Packing, PretrainingModel, relative_bias_start

CONFIG = ModelConfig(
    layers=2, hidden=32, ffn=64, heads=2, aux_layers=1, vocab_size=50, sequence_length=40
)
LENGTHS = [40, 1, 17, 3]


def make_model(objective="metro", **changes) -> PretrainingModel:
    return PretrainingModel(dataclasses.replace(CONFIG, **changes), objective, seed=3)


def excite(model):
    """Weights far from their small initial values, so that every term matters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def packed(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 50, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) + 2 for n in lengths])
    borders = torch.tensor([0, *lengths, 0, 0]).cumsum(0).to(torch.int32)  # two empty sequences
    return tokens, Packing(positions, borders, 40, torch.tensor(9))


def run(encoder, tokens, packing, dtype):
    return encoder(tokens, packing, encoder.table(dtype))


def test_encoder_equals_the_reference():
    model = excite(make_model()).eval()
    tokens, packing = packed()
    for encoder in (model.main, model.auxiliary):
        out = run(encoder, tokens, packing, torch.float32)
        expected = torch.cat([reference_model.encode(encoder, s) for s in tokens.split(LENGTHS)])
        assert relative_error(out, expected) < 1e-5
        assert relative_error(run(encoder, tokens, packing, torch.bfloat16), expected) < 3e-2


def test_gradients_equal_the_reference():
    model = excite(make_model()).eval()
    tokens, packing = packed()
    weight = torch.randn(len(tokens), 32, generator=torch.Generator().manual_seed(2))
    (run(model.main, tokens, packing, torch.float32) * weight).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.main.named_parameters()}
    model.zero_grad()
    out = torch.cat([reference_model.encode(model.main, s) for s in tokens.split(LENGTHS)])
    (out * weight).sum().backward()
    for name, parameter in model.main.named_parameters():
        assert relative_error(ours[name], parameter.grad) < 3e-5, name


def test_documents_are_kept_apart():
    model = excite(make_model()).eval()
    tokens, packing = packed()
    changed = tokens.clone()
    changed[:40] = 7
    before = run(model.main, tokens, packing, torch.float32)[40:]
    assert torch.equal(before, run(model.main, changed, packing, torch.float32)[40:])


@pytest.mark.parametrize("share", ["token", "all", "none"])
def test_sharing(share):
    model = make_model(share_embeddings=share)
    main, auxiliary = model.main.embeddings, model.auxiliary.embeddings
    assert (auxiliary.token is main.token) == (share != "none")
    assert (auxiliary.position is main.position) == (share == "all")
    assert (auxiliary.norm is main.norm) == (share == "all")


def test_initialisation():
    model = make_model(hidden=64, vocab_size=2000, depth_scaled_init=True, layers=8)
    assert model.main.embeddings.token.std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.count_nonzero(model.main.embeddings.token[1]) == 0
    assert torch.count_nonzero(model.main.embeddings.position[1]) == 0
    assert model.main.layers[0].ffn_out.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert model.main.layers[0].ffn_in.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.count_nonzero(model.rtd_head.weight) == 0
    biases = [p for name, p in model.named_parameters() if name.endswith("bias") and p.dim() == 1]
    assert biases and all(torch.count_nonzero(b) == 0 for b in biases)


def test_initialisation_depends_on_seed_and_name_alone():
    metro, electra = make_model("metro"), make_model("electra")
    shared = dict(electra.named_parameters())
    assert all(
        torch.equal(p, shared[name]) for name, p in metro.named_parameters() if name in shared
    )
    other = PretrainingModel(CONFIG, "metro", seed=4)
    assert not torch.equal(metro.main.layers[0].qkv.weight, other.main.layers[0].qkv.weight)
    layers = metro.main.layers
    assert not torch.equal(layers[0].qkv.weight, layers[1].qkv.weight)


def test_relative_bias_start():
    local = relative_bias_start(dataclasses.replace(CONFIG, heads=4, hidden=32))
    assert torch.count_nonzero(local[:, 3]) == 0
    # Bucket 3 is three tokens to the left, 16 + 3 to the right; head 0 looks left, head 1 right.
    assert local[3, 0] == local[16 + 3, 1] == -2.0
    assert local[16 + 3, 0] == local[3, 1] == -2.0 - 4.0
    assert local[0, 0] == -2.0 and local[1, 0] == 0.0 and local[3, 2] == -1.0
    zero = relative_bias_start(dataclasses.replace(CONFIG, relative_bias_init="zero"))
    assert torch.count_nonzero(zero) == 0


def test_dropout_acts_in_training_only_and_depends_on_the_seed():
    model = excite(make_model())
    tokens, packing = packed()
    evaluated = run(model.eval().main, tokens, packing, torch.float32)
    model.train()
    first = run(model.main, tokens, packing, torch.float32)
    assert not torch.equal(first, evaluated)
    assert torch.equal(first, run(model.main, tokens, packing, torch.float32))
    other = dataclasses.replace(packing, seed=torch.tensor(10))
    assert not torch.equal(first, run(model.main, tokens, other, torch.float32))
    # The auxiliary model has no dropout.
    assert torch.equal(
        run(model.auxiliary, tokens, packing, torch.float32),
        run(model.auxiliary, tokens, other, torch.float32),
    )


@pytest.mark.parametrize(
    "objective, present",
    [
        ("metro", {"auxiliary", "auxiliary_head", "rtd_head", "main_head"}),
        ("electra", {"auxiliary", "auxiliary_head", "rtd_head"}),
        ("clm-all", {"auxiliary", "auxiliary_head", "main_head"}),
        ("mlm", {"main_head"}),
    ],
)
def test_networks_of_each_objective(objective, present):
    model = make_model(objective)
    parts = {"auxiliary", "auxiliary_head", "rtd_head", "main_head"}
    assert {name for name in parts if getattr(model, name) is not None} == present
