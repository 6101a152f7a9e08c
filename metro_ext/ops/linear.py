"""Matrix products of activations with float32 parameters, by torch's own kernels.

Written as autograd functions for what they keep: the parameter itself, not its rounded copy, and
for `bias_gelu_linear` the input of the GELU, not also its output, for a `linear` of a norm's output
the input of the norm, which the norm keeps anyway. A copy costs a pass over the weight, a norm or a
GELU one over the activations; kept through the backward pass, all of them are a third of a step's
memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metro_ext.ops.gelu import bias_gelu
from metro_ext.ops.layer_norm import Normed

# torch's own float32 product goes to MKL, whose kernels for CPUs that are not Intel's stop at AVX2;
# oneDNN's use AVX-512 there and are twice as fast. With AVX2 alone MKL is the faster of the two,
# by half where an operand is transposed.
_USES_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
)
# bfloat16 products go to oneDNN anyway, but where it has no kernels for them, as with AVX2 alone,
# they take 5 to 10 times as long as in float32.
WIDENS_BFLOAT16 = (
    hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


def _is_eager_cpu(a: Tensor) -> bool:
    """Whether `_product` chooses the kernel; torch.compile chooses its own."""
    return a.device.type == "cpu" and not torch.compiler.is_compiling()


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] · bᵀ, b [N, K], plus bias [N]: [M, N] in the dtype of ``a``.

    Where a CPU multiplies float32 alone, bfloat16 factors are widened, which is exact, and the
    float32 product is rounded once.
    """
    if _is_eager_cpu(a):
        if a.dtype == torch.bfloat16 and WIDENS_BFLOAT16:
            wide = None if bias is None else bias.float()
            return F.linear(a.float(), b.float(), wide).to(a.dtype)
        if a.dtype == torch.float32 and _USES_ONEDNN and a.numel() and b.numel():
            return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


class _Linear(torch.autograd.Function):
    """norm: (sum, weight, shift) that x is the normed output of, or nothing; kept instead of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *norm: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight, *(norm or (x,)))
        ctx.eps, ctx.has_bias = eps, bias is not None
        return _product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        grad_x = _product(grad_out, weight.to(grad_out.dtype).t())
        x = kept[0] if len(kept) == 1 else Normed.again(kept[0], kept[1], kept[2], ctx.eps)
        grad_weight = _product(grad_out.t(), x.t()).to(weight.dtype)
        # Summed in float32 and rounded once, as grad_weight is; asking sum() for float32 would make
        # it convert the whole gradient first.
        grad_bias = grad_out.sum(0).to(weight.dtype) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, *(None for _ in kept if len(kept) > 1)


class _BiasGeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias, weight)
        return _product(bias_gelu(x, bias), weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, weight = ctx.saved_tensors
        grad_weight = _product(grad_out.t(), bias_gelu(x, bias).t()).to(weight.dtype)
        grad = _product(grad_out, weight.to(x.dtype).t())
        grad_bias = torch.ops.metro.bias_gelu_backward_(grad, x, bias)
        return grad, grad_bias, grad_weight


def linear(x: Tensor | Normed, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias in the dtype of ``x``; parameters and their gradients stay float32.

    Args:
        x: activations [T, K], float32 or bfloat16 (float16 on CUDA), or the output of a norm, which
            the backward pass then computes again.
        weight: float32 [N, K].
        bias: float32 [N]; None: zero.

    Returns:
        Activations [T, N].

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit (torch's own message).
    """
    if isinstance(x, Normed):
        return _Linear.apply(x.out, weight, bias, x.eps, x.sum, x.weight, x.shift)
    return _Linear.apply(x, weight, bias, 0.0)


def bias_gelu_linear(x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """GELU(x + bias)·weightᵀ: the second half of a feed-forward block.

    Args:
        x: activations [T, F], float32 or bfloat16 (float16 on CUDA).
        bias: float32 [F].
        weight: float32 [H, F].

    Returns:
        Activations [T, H]. The backward pass recomputes the GELU from ``x``.

    Raises:
        RuntimeError: a shape, dtype or device is not as above.
    """
    return _BiasGeluLinear.apply(x, bias, weight)
