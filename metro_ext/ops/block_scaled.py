"""Four-bit block-scaled products, emulated: the numerics of MXFP4 and NVFP4 and nothing of their
speed.

Both formats store elements as E2M1 (sign, two exponent bits, one of mantissa: 0, 0.5, 1, 1.5, 2,
3, 4, 6) in blocks along the summed dimension of a product, a scale to each block:

    mxfp4   blocks of 32, scale a power of two (E8M0) (OCP Microscaling Formats v1.0, section 6.3)
    nvfp4   blocks of 16, scale E4M3, and one float32 scale to the tensor, by which the largest
            block's scale is E4M3's largest (NVIDIA, arXiv 2509.25149)

An operand is quantised, then multiplied as what its four bits stand for; E2M1 times E4M3 has six
significant bits at most, so bfloat16 holds it exactly and the product sums in float32 as the
hardware does. All three products of a linear layer are treated so, each with blocks along its own
summed dimension. For gradients the literature adds *stochastic rounding*, which is unbiased (mxfp4
scales by 3/4 for that, so that nothing saturates: arXiv 2502.20586), and a *random Hadamard
transform* of the weight gradient's operands, which spreads outliers within a block and leaves the
exact product as it is (arXiv 2502.20586, 2509.25149).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

E2M1_MAX, E2M1_MAX_EXPONENT = 6.0, 2
E4M3_MAX, E4M3_MIN = 448.0, 2.0**-9
E8M0_EXPONENT = 127  # of the largest scale; the smallest has its negative
BLOCK = {"mxfp4": 32, "nvfp4": 16}
HADAMARD = 16  # size of a transform, that of NVIDIA's recipe

# What a number is drawn for, beside the purposes of csrc/common/philox.h.
_ROUNDING, _SIGNS = 5, 6
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Recipe:
    """How a linear layer's operands are quantised.

    format: ``mxfp4`` or ``nvfp4``.
    stochastic_rounding: of the output's gradient, in both products that it enters.
    hadamard: transform both operands of the weight's gradient.
    """

    format: str
    stochastic_rounding: bool = False
    hadamard: bool = False


def random_words(seed: Tensor, purpose: int, draw: int, count: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011), as csrc/common/philox.h has it.

    Args:
        seed: int64 [], the key.
        purpose, draw: what is drawn; the counter is (index, purpose and draw).
        count: of numbers.

    Returns:
        int64 [count], uniform in [0, 2^32), on the seed's device and without waiting for it.
    """
    index = torch.arange((count + 3) // 4, device=seed.device)
    zero = torch.zeros_like(index)
    c = [index & _WORD, index >> 32, zero + (purpose << 24 | draw & 0xFFFFFF), zero]
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 wraps where uint64 would: the bits are the same, and the shift's sign is masked off.
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (p1 >> 32) & _WORD ^ c[1] ^ k0,
            p1 & _WORD,
            (p0 >> 32) & _WORD ^ c[3] ^ k1,
            p0 & _WORD,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack(c, dim=-1).flatten()[:count]


def round_e2m1(x: Tensor, uniform: Tensor | None = None) -> Tensor:
    """The E2M1 value of each element of float32 x, saturated at ± 6; float32.

    Args:
        uniform: float32 in [0, 1), like x: up where it is below the share of the way from the
            lower neighbour to the upper. Without it, to the nearest, ties to even.
    """
    size = x.abs().clamp_max(E2M1_MAX)
    # The spacing of neighbours: 0.5 below 2, 1 up to 4, 2 above.
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    scaled = size / step
    if uniform is None:
        rounded = scaled.round()
    else:
        below = scaled.floor()
        rounded = below + (uniform < scaled - below)
    return torch.copysign(rounded * step, x)


def quantise(
    x: Tensor, number_format: str, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the four bits and the scales of x's blocks along its last dimension stand for.

    Args:
        x: [..., K] of any float type; a last block may be shorter than the others.
        number_format: ``mxfp4`` or ``nvfp4``.
        uniform: float32 like x, to round stochastically (see `round_e2m1`).

    Returns:
        Values in the dtype of x (exact in bfloat16 and float32), and a scale by which they are
        still to be multiplied, float32 [], or None: that of the tensor for nvfp4, 4/3 for mxfp4
        where it rounds stochastically. A block that has an infinity or NaN is NaN.
    """
    block, length = BLOCK[number_format], x.shape[-1]
    blocks = _blocks(x.float(), block)
    largest = blocks.abs().amax(-1, keepdim=True)
    whole = None
    if number_format == "mxfp4":
        # frexp's mantissa lies in [0.5, 1): its exponent is one more than floor(log2).
        exponent = torch.frexp(largest).exponent - 1 - E2M1_MAX_EXPONENT
        exponent = exponent.clamp(-E8M0_EXPONENT, E8M0_EXPONENT)
        scale, scaled = torch.exp2(exponent.float()), blocks * torch.exp2(-exponent.float())
        if uniform is not None:  # elements reach 8, and saturation at 6 is a bias
            scaled, whole = scaled * 0.75, blocks.new_tensor(4 / 3)
    else:
        whole = largest.amax() / (E2M1_MAX * E4M3_MAX)
        whole = torch.where((whole > 0) & torch.isfinite(whole), whole, torch.ones_like(whole))
        scale = (largest / E2M1_MAX / whole).clamp(E4M3_MIN, E4M3_MAX)
        scale = scale.to(torch.float8_e4m3fn).float()
        scaled = blocks / (scale * whole)
    drawn = None if uniform is None else _blocks(uniform, block)
    values = round_e2m1(scaled, drawn) * scale
    values = torch.where(torch.isfinite(largest), values, torch.nan)
    return values.flatten(-2)[..., :length].to(x.dtype), whole


def _blocks(x: Tensor, size: int) -> Tensor:
    """[..., K] as [..., blocks, size], filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def hadamard(x: Tensor, signs: Tensor) -> Tensor:
    """x [..., K] times signs, then blocks of the last dimension times the Hadamard matrix.

    The matrix of 16 (Sylvester's), over √16, is orthonormal: a sum of products of two operands that
    are transformed alike is what it was.

    Args:
        signs: ± 1 [16].

    Returns:
        [..., K rounded up to 16], in the dtype of x.
    """
    matrix = torch.ones(1, 1, dtype=torch.float32, device=x.device)
    while len(matrix) < HADAMARD:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    turned = (_blocks(x.float(), HADAMARD) * signs) @ (matrix / HADAMARD**0.5)
    return turned.flatten(-2).to(x.dtype)


def _multiply(a: Tensor, b: Tensor, recipe: Recipe, a_uniform: Tensor | None = None) -> Tensor:
    """a [M, K] · bᵀ, b [N, K], of quantised operands, in the dtype of a."""
    a, a_whole = quantise(a, recipe.format, a_uniform)
    b, b_whole = quantise(b, recipe.format)
    product = F.linear(a, b)
    for whole in (a_whole, b_whole):
        if whole is not None:
            product = product.float() * whole
    return product.to(a.dtype)


class _BlockScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, seed: Tensor, draw: int, recipe: Recipe
    ) -> Tensor:
        ctx.save_for_backward(x, weight, seed)
        ctx.draw, ctx.recipe = draw, recipe
        return _multiply(x, weight.to(x.dtype), recipe)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, seed = ctx.saved_tensors
        recipe = ctx.recipe
        left, right = grad_out.t(), x.t()
        if recipe.hadamard:
            signs = 1.0 - 2.0 * (random_words(seed, _SIGNS, ctx.draw, HADAMARD) & 1).float()
            left, right = hadamard(left, signs), hadamard(right, signs)
        across = along = None
        if recipe.stochastic_rounding:  # the gradient is quantised twice: two draws
            across = _uniform(seed, 2 * ctx.draw, grad_out.shape)
            along = _uniform(seed, 2 * ctx.draw + 1, left.shape)
        grad_x = _multiply(grad_out, weight.to(x.dtype).t(), recipe, across)
        grad_weight = _multiply(left, right, recipe, along).to(weight.dtype)
        return grad_x, grad_weight, None, None, None


def _uniform(seed: Tensor, draw: int, shape: torch.Size) -> Tensor:
    """float32 of a shape, multiples of 2^-24 in [0, 1)."""
    words = random_words(seed, _ROUNDING, draw, shape.numel())
    return (words >> 8).float().mul_(2.0**-24).view(shape)


def block_scaled_linear(
    x: Tensor, weight: Tensor, recipe: Recipe, seed: Tensor, draw: int
) -> Tensor:
    """x·weightᵀ with operands, and those of both gradients, as the recipe's four bits hold them.

    Args:
        x: activations [T, K], float32 or bfloat16.
        weight: float32 [N, K], rounded to the dtype of x first.
        seed: int64 [], key of the random draws of the backward pass.
        draw: of this product among all that share the seed; below 2^23.

    Returns:
        Activations [T, N] in the dtype of x; the weight's gradient is float32.
    """
    return _BlockScaledLinear.apply(x, weight, seed, draw, recipe)
