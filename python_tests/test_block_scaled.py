"""Emulated four-bit products: against tables of the values, worked blocks, and torchao."""

import itertools

import numpy as np
import philox_reference
import pytest
import torch

from metro_ext.ops.block_scaled import (
    BLOCK,
    HADAMARD,
    Recipe,
    block_scaled_linear,
    hadamard,
    quantise,
    random_words,
    round_e2m1,
)

# Sign aside, the codes 0 to 7 of OCP Microscaling Formats v1.0, table 5: an even code ends in 0.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FORMATS = ("mxfp4", "nvfp4")
SEED = torch.tensor(77)


def nearest(value: float, table=E2M1) -> float:
    """The nearest entry, of two the one with the even code; by search."""
    size = min(abs(value), table[-1])
    code = min(range(len(table)), key=lambda i: (abs(table[i] - size), i % 2))
    return float(np.copysign(table[code], value))


def e4m3_values() -> list[float]:
    """All non-negative values of E4M3 (OCP 8-bit floating point v1.0), in the order of the codes.

    Four exponent bits with bias 7, three of mantissa; the last code of all is NaN.
    """
    return [
        (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent, mantissa in itertools.product(range(16), range(8))
    ][:-1]


def reference(x: np.ndarray, number_format: str) -> np.ndarray:
    """Every element by itself, in float64 with Python's numbers."""
    out = np.empty_like(x, dtype=np.float64)
    size = BLOCK[number_format]
    tensor_scale = np.float32(np.abs(x).max()) / np.float32(6 * 448)
    for row, start in itertools.product(range(x.shape[0]), range(0, x.shape[1], size)):
        block = x[row, start : start + size]
        largest = float(np.abs(block).max())
        if number_format == "mxfp4":
            # The largest power of two not above the largest element, over E2M1's largest, 4.
            power = max(p for p in range(-127, 129) if p == -127 or 2.0**p <= largest)
            scale = 2.0 ** max(-127, power - 2)
        else:
            wanted = float(np.float32(largest) / np.float32(6) / tensor_scale)
            values = e4m3_values()
            scale = max(nearest(wanted, values), values[1]) * float(tensor_scale)
        out[row, start : start + size] = [nearest(float(v) / scale) * scale for v in block]
    return out


def values_of(x: torch.Tensor, number_format: str) -> torch.Tensor:
    values, whole = quantise(x, number_format)
    return values.double() * (1.0 if whole is None else whole.double())


def test_rounds_every_value_and_every_tie_as_the_table():
    ties = [(a + b) / 2 for a, b in itertools.pairwise(E2M1)]
    around = [np.nextafter(np.float32(t), np.float32(to)) for t in ties for to in (0, 9)]
    points = torch.tensor([*E2M1, *ties, *around, 7.0, 1e30], dtype=torch.float32)
    points = torch.cat([points, -points])
    expected = torch.tensor([nearest(float(p)) for p in points])
    assert torch.equal(round_e2m1(points), expected)
    assert torch.equal(torch.signbit(round_e2m1(points)), torch.signbit(points))


def test_an_mxfp4_block_worked_by_hand():
    """Largest 9.0: floor(log2 9) = 3, less 2 is a scale of 2."""
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([9.0, -7.0, 2.4, 0.5, 0.4, 5.0])  # over 2: 4.5 3.5 1.2 0.25 0.2 2.5
    expected = torch.tensor([8.0, -8.0, 2.0, 0.0, 0.0, 4.0])  # ties: 3.5 to 4, 0.25 to 0, 2.5 to 2
    values, whole = quantise(x, "mxfp4")
    assert whole is None
    assert torch.equal(values[0, :6], expected) and not values[0, 6:].any()


def test_an_mxfp4_element_above_six_scales_saturates():
    x = torch.zeros(1, 32)
    x[0, 0] = 15.9  # scale 2; 7.95 is beyond the last value
    assert quantise(x, "mxfp4")[0][0, 0] == 12.0


def test_an_nvfp4_tensor_worked_by_hand():
    """Largest 2688 = 6 · 448, so that the tensor's scale is 1 and blocks scale by E4M3 alone."""
    x = torch.zeros(2, 16)
    x[0, :3] = torch.tensor([2688.0, 448.0, 1000.0])  # scale 448: 6, 1, 2.23 to 2
    x[1, :4] = torch.tensor([6.4, 1.0, 3.3, -0.2])  # scale 6.4 / 6 = 1.067, of 1 and 1.125
    values, whole = quantise(x, "nvfp4")
    assert whole == 1.0
    assert values[0, :3].tolist() == [2688.0, 448.0, 896.0]
    # the latter is nearer; 6.4 / 1.125 = 5.7, 0.89, 2.93, -0.18
    assert values[1, :4].tolist() == [6 * 1.125, 1.125, 3 * 1.125, 0.0]


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("columns", [64, 40, 1])
def test_equals_the_reference_element_by_element(number_format, columns):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(6, columns, generator=generator) * torch.logspace(-6, 4, 6)[:, None]
    expected = torch.from_numpy(reference(x.numpy(), number_format))
    torch.testing.assert_close(values_of(x, number_format), expected, rtol=1e-6, atol=0)


def test_e4m3_scales_are_those_of_the_table():
    table = torch.tensor(e4m3_values(), dtype=torch.float64)
    assert len(table) == 127 and table[-1] == 448 and table[1] == 2.0**-9
    assert torch.equal(table.float().to(torch.float8_e4m3fn).double(), table)


@pytest.mark.parametrize("number_format", FORMATS)
def test_zeros_tiny_numbers_and_what_is_not_finite(number_format):
    assert not quantise(torch.zeros(3, 32), number_format)[0].any()
    tiny = values_of(torch.full((1, 32), 1e-40), number_format)
    assert torch.isfinite(tiny).all() and (tiny >= 0).all() and (tiny < 1e-37).all()
    for wrong in (float("inf"), float("nan")):
        x = torch.ones(2, 32)
        x[1, 3] = wrong
        values = values_of(x, number_format)
        block = BLOCK[number_format]
        assert values[1, :block].isnan().all()
        # NVFP4's scale of the tensor is left at 1: a block's is one of E4M3, within 1/16.
        torch.testing.assert_close(values[0], x[0].double(), rtol=1 / 16, atol=0)


@pytest.mark.parametrize("number_format", FORMATS)
def test_values_are_exact_in_bfloat16(number_format):
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    rounded, whole = quantise(x, number_format)
    exact, _ = quantise(x.float(), number_format)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded.float(), exact)
    assert (whole is None) == (number_format == "mxfp4")


def test_words_are_those_of_the_extension():
    index = np.arange(5, dtype=np.uint64)
    for seed in (0, 77, 2**63 - 1, 123456789012345):
        expected = philox_reference.philox4x32(
            seed, index, 0, philox_reference.counter_word(5, 9), 0
        )
        words = random_words(torch.tensor(seed), 5, 9, 19)
        assert words.tolist() == expected.reshape(-1)[:19].tolist()


@pytest.mark.parametrize("value", [0.2, 0.9, 2.6, -4.5, 5.999])
def test_stochastic_rounding_is_unbiased(value):
    """A mean over n draws of a step of size s stays within 5 standard errors, s / 2 / sqrt(n)."""
    count = 40_000
    uniform = (random_words(SEED, 5, 1, count) >> 8).float() * 2.0**-24
    drawn = round_e2m1(torch.full((count,), value), uniform).double()
    assert set(drawn.abs().tolist()) <= set(E2M1) and len(drawn.unique()) == 2
    assert float(drawn.mean()) == pytest.approx(value, abs=5 * 2.0 / 2 / count**0.5)


def test_stochastic_rounding_leaves_what_is_representable():
    points = torch.tensor([*E2M1, *(-v for v in E2M1)])
    assert torch.equal(round_e2m1(points, torch.full_like(points, 1 - 2.0**-24)), points)


def test_a_hadamard_transform_keeps_products():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(5, 50, generator=generator) for _ in range(2))
    signs = 1.0 - 2.0 * (random_words(SEED, 6, 0, HADAMARD) & 1).float()
    turned_a, turned_b = hadamard(a, signs), hadamard(b, signs)
    assert turned_a.shape == (5, 64)
    torch.testing.assert_close(turned_a @ turned_b.t(), a @ b.t(), rtol=1e-5, atol=1e-5)
    spike = torch.zeros(1, 16)
    spike[0, 5] = 8.0
    assert torch.equal(hadamard(spike, signs).abs(), torch.full((1, 16), 2.0))


def linear_parts(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 48, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(24, 48, generator=generator).requires_grad_()
    grad = torch.randn(40, 24, generator=generator).to(dtype)
    return x, weight, grad


@pytest.mark.parametrize("number_format", FORMATS)
def test_a_layer_multiplies_quantised_operands_both_ways(number_format):
    """Each product has its blocks along what it sums over: 48 inputs, 24 outputs, 40 tokens."""
    x, weight, grad = linear_parts()
    out = block_scaled_linear(x, weight, Recipe(number_format), SEED, 0)
    out.backward(grad)

    def product(a, b):
        return values_of(a.detach(), number_format) @ values_of(b.detach(), number_format).t()

    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(out.double(), product(x, weight), **close)
    torch.testing.assert_close(x.grad.double(), product(grad, weight.t()), **close)
    torch.testing.assert_close(weight.grad.double(), product(grad.t(), x.t()), **close)


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("turned", [False, True])
def test_random_gradients_average_to_the_true_ones(number_format, turned):
    """An error that is noise alone shrinks by 8 in the mean of 64 draws; a bias would stay."""
    x, weight, grad = linear_parts()
    recipe = Recipe(number_format, stochastic_rounding=True, hadamard=turned)
    found = []
    for draw in range(64):
        inputs = [x, weight]
        out = block_scaled_linear(x, weight, recipe, SEED, draw)
        found.append(torch.autograd.grad(out, inputs, grad))
    again = torch.autograd.grad(block_scaled_linear(x, weight, recipe, SEED, 0), inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
    assert not torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][1], found[1][1])
    mean = torch.stack([f[0] for f in found]).mean(0)
    # What the gradient meets is the quantised weight.
    expected = grad.double() @ values_of(weight.detach().t(), number_format).t()
    single = (found[0][0] - expected).norm() / expected.norm()
    assert (mean - expected).norm() / expected.norm() < single / 6


def test_bfloat16_activations_keep_their_dtype():
    x, weight, grad = linear_parts(torch.bfloat16)
    recipe = Recipe("nvfp4", stochastic_rounding=True, hadamard=True)
    out = block_scaled_linear(x, weight, recipe, SEED, 0)
    out.backward(grad)
    assert out.dtype == x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    exact = grad.double().t() @ x.detach().double()
    assert (weight.grad - exact).norm() / exact.norm() < 0.3


def test_equals_torchaos_formats():
    pytest.importorskip("torchao.prototype.mx_formats", reason="torchao is not installed")
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(4))
    x *= torch.logspace(-2, 2, 64)[:, None]  # beyond, their scales stop at E4M3's least normal
    theirs = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    assert torch.equal(values_of(x, "mxfp4").float(), theirs)
    scale = per_tensor_amax_to_scale(x.abs().max())
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)
    # They multiply by a rounded reciprocal, so that an element on a tie may fall to the other side.
    ours = values_of(x, "nvfp4").float()
    assert (~torch.isclose(ours, theirs, rtol=1e-5)).float().mean() < 1e-3
