"""Products of the layers in fewer bits: which they are, that they train, who cannot have them."""

import dataclasses
import sys

import pytest
import torch
from test_sharding import micro_batch, objective_of

from metro_ext.config import Config, ModelConfig, ProductsConfig, RunConfig
from metro_ext.distributed import World
from metro_ext.errors import UserError
from metro_ext.model import PRODUCTS, PretrainingModel
from metro_ext.ops import linear
from metro_ext.optim import AdamW
from metro_ext.parallel import engine
from metro_ext.products import Fp8Product, lower_products

CPU = torch.device("cpu")
MODEL = ModelConfig(
    layers=3, hidden=32, ffn=64, heads=2, aux_layers=3, vocab_size=60, sequence_length=32
)
EMULATED = ("mxfp4-emulated", "nvfp4-emulated")


def configured(run: dict | None = None, **products) -> Config:
    return Config(
        model=MODEL,
        run=RunConfig(**{"tokens_per_batch": 64, "precision": "bf16", **(run or {})}),
        products=ProductsConfig(**products),
    )


def losses(config: Config, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of training on one micro-batch again and again; and the weights that it ends with."""
    spread = engine(config, objective_of(config, torch.bfloat16), CPU, World())
    spread.model.train()
    optimizer = AdamW(spread, config.optim)
    tokens, packing = micro_batch(MODEL, 1)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = spread.run(spread.model, tokens, packing)
        out.loss.backward()
        optimizer.step(2e-3)
        found.append(float(out.loss.detach()))
    return found, dict(spread.named_parameters())


def test_ends_keep_their_precision_and_the_rest_the_named_products():
    config = configured(format="mxfp4-emulated", skip=1, linears=("qkv", "ffn_out"))
    with torch.device("meta"):
        model = PretrainingModel(dataclasses.replace(MODEL, layers=5), "metro", 1)
    lower_products(model, config, CPU)
    for encoder, lowered in ((model.main, [1, 2, 3]), (model.auxiliary, [1])):
        for number, layer in enumerate(encoder.layers):
            expected = {"qkv", "ffn_out"} if number in lowered else set()
            assert set(layer.products) == expected
    model = PretrainingModel(MODEL, "mlm", 1)
    lower_products(model, configured(), CPU)
    assert not any(layer.products for layer in model.main.layers)


@pytest.mark.parametrize("format_", EMULATED)
def test_emulated_products_train(format_):
    """15 steps on one batch: down by much, near to bf16, and not on it."""
    plain, _ = losses(configured(), 15)
    lowered, _ = losses(
        configured(format=format_, stochastic_rounding=True, hadamard=True, skip=0), 15
    )
    assert lowered != plain and lowered[-1] < 0.9 * lowered[0]
    assert lowered[-1] == pytest.approx(plain[-1], rel=0.1)


def test_recomputed_layers_draw_the_same_numbers():
    options = {"format": "nvfp4-emulated", "stochastic_rounding": True, "hadamard": True}
    kept = losses(configured(**options), 3)
    again = losses(configured({"recompute": "all"}, **options), 3)
    assert kept[0] == again[0]
    assert all(torch.equal(value, again[1][name]) for name, value in kept[1].items())


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_fp8_products_are_near_whole_ones_both_ways(recipe):
    """E4M3 has three bits of mantissa, E5M2 two: a product of normal numbers within 10 %."""
    pytest.importorskip("torchao.float8", reason="torchao is not installed")
    product = Fp8Product(ProductsConfig(format="fp8", recipe=recipe, emulate=True), CPU)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(32, 64, generator=generator).requires_grad_()
    grad = torch.randn(48, 32, generator=generator).bfloat16()

    def both_ways(multiply):
        out = multiply(x, weight)
        return out, *torch.autograd.grad(out, (x, weight), grad)

    found = both_ways(lambda x, weight: product(x, weight, torch.tensor(1), 0))
    for one, exact in zip(found, both_ways(linear), strict=True):
        assert one.dtype == exact.dtype
        error = float((one.float() - exact.float()).norm().detach() / exact.float().norm().detach())
        assert error < 0.1 and (error > 0 or recipe == "rowwise_with_gw_hp")


def test_fp8_products_train():
    pytest.importorskip("torchao.float8", reason="torchao is not installed")
    plain, _ = losses(configured(), 10)
    lowered, _ = losses(configured(format="fp8", emulate=True, skip=0), 10)
    assert lowered != plain
    assert lowered[-1] == pytest.approx(plain[-1], rel=0.05)


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"needs torchao: pip install 'metro-ext\[fp8\]'"):
        losses(configured(format="fp8"), 1)


@pytest.mark.parametrize(
    "recipe, capability, least",
    [("tensorwise", (8, 0), "8.9"), ("rowwise", (8, 9), "9.0")],
)
def test_a_gpu_without_such_products_is_told(monkeypatch, recipe, capability, least):
    pytest.importorskip("torchao.float8", reason="torchao is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = ProductsConfig(format="fp8", recipe=recipe)
    with pytest.raises(UserError, match=rf"{least} or later, found {capability[0]}\.") as caught:
        Fp8Product(config, torch.device("cuda"))
    assert "--products.emulate=true" in str(caught.value)
    Fp8Product(dataclasses.replace(config, emulate=True), torch.device("cuda"))


def test_mistakes_get_a_sentence():
    config = configured(format="nvfp4-emulated", linears=("qkv", "head"))
    with pytest.raises(UserError, match=f"some of {', '.join(PRODUCTS)}, found 'head'"):
        losses(config, 1)
    config = dataclasses.replace(configured(format="fp8"), model=dataclasses.replace(MODEL, ffn=72))
    with pytest.raises(UserError, match=r"model\.ffn to be a multiple of 16, found 72"):
        engine(config, objective_of(config, torch.bfloat16), CPU, World())
