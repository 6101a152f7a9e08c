import pytest

from bench import growth


def test_exponent_of_a_power_law():
    sizes = [1, 2, 4, 16]
    assert growth.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)


def test_exponent_needs_two_points_above_zero():
    assert growth.exponent([1, 2], [0.0, 5.0]) is None


def test_growth_leaves_out_what_every_size_has():
    sizes = [1, 2, 4, 16]
    values = [100.0, *(100 + size**2 for size in sizes[1:])]
    assert growth.growth_exponent(sizes, values) == pytest.approx(2)


@pytest.mark.parametrize("axis", growth.AXES)
def test_every_point_is_a_valid_step(axis):
    for size in growth.AXES[axis]:
        options = growth.step.parse(growth.arguments(axis, size, "bf16"))
        assert getattr(options, axis) == size
        assert options.hidden % options.heads == 0


def test_plot_writes_a_picture(tmp_path):
    cases = [
        growth.Case(
            name=f"tokens {size}",
            ours=1e-3 * size,
            peak_mb=100.0 + size,
            figures={
                "axis": "tokens", "size": size, "gflop_of_a_thread": size / 10,
                "planned_mb": size / 20,
                "time_exponent": 1.0, "flops_exponent": 1.0, "memory_exponent": None,
            },
        )
        for size in (1024, 4096)
    ]  # fmt: skip
    growth.plot(cases, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
