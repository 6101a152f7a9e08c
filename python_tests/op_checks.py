"""What every operator's test asks, in one place."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# ‖out − ref‖ / ‖ref‖ against the float64 reference on the same (rounded) inputs.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def dtypes(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] + ([torch.float16] if device == "cuda" else [])


DEVICE_DTYPES = [(device, dtype) for device in DEVICES for dtype in dtypes(device)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN counts as infinite."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "") -> None:
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.2e}"


def check_against_reference(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """Compares the output and the gradient of every floating input with the float64 reference."""
    ours = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    theirs = [t.detach().cpu() for t in inputs]
    theirs = [t.double().requires_grad_() if t.is_floating_point() else t for t in theirs]
    out, expected = op(*ours), reference(*theirs)
    assert_close(out, expected, dtype, "output")
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(expected.shape, generator=generator).to(out.dtype)
    out.backward(grad.to(out.device))
    expected.backward(grad.double())
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.requires_grad:
            assert a.grad.dtype == a.dtype
            assert_close(a.grad, b.grad, dtype, f"gradient of input {index}")


def check_finite_differences(
    function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-2, tolerance: float = 2e-3
) -> None:
    """The float32 gradient of a scalar function along random directions, by central differences."""
    x = x.detach().clone().requires_grad_()
    function(x).backward()
    generator = torch.Generator().manual_seed(11)
    for _ in range(3):
        direction = torch.randn(x.shape, generator=generator).to(x)
        direction /= direction.norm()
        with torch.no_grad():
            difference = function(x + step * direction) - function(x - step * direction)
        numeric = float(difference) / (2 * step)
        analytic = float((x.grad * direction).sum())
        scale = max(abs(numeric), float(x.grad.norm()) * 0.1, 1e-6)
        assert abs(numeric - analytic) <= tolerance * scale, (numeric, analytic)


def assert_bitwise_repeatable(function: Callable[[], Sequence[Tensor]], repeats: int = 3) -> None:
    """Same call, same bits, also with another number of threads."""
    first = [t.clone() for t in function()]
    threads = torch.get_num_threads()
    try:
        for repeat in range(repeats):
            torch.set_num_threads(1 if repeat == 0 else threads)
            for a, b in zip(first, function(), strict=True):
                # Compared as bytes, so that NaN equals NaN and -0 differs from 0.
                assert torch.equal(
                    a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
                )
    finally:
        torch.set_num_threads(threads)
