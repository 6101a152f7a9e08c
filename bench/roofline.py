"""The plot of a set of operators: a roofline, and each case's share of its floor."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metro_ext.atomic import atomic_write

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666")
DTYPES = ("bf16", "fp16", "fp32")
COPY = "copy GB/s"


def matrix_roofs(ceilings: Mapping[str, float]) -> dict[str, float]:
    """GFLOP/s by dtype: the best product that the run measured."""
    roofs = {
        dtype: [rate for name, rate in ceilings.items() if name.endswith(f" {dtype} GFLOP/s")]
        for dtype in DTYPES
    }
    return {dtype: max(rates) for dtype, rates in roofs.items() if rates}


def intensity(case: Mapping[str, Any]) -> float:
    """FLOP a byte of the least work; 0 for a case without matrix products."""
    figures = case["figures"]
    return figures["gflop_per_s"] / figures["gb_per_s"]


def save_plot(
    cases: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float], title: str, path: Path
) -> None:
    """Draws cases of ``bench/ops.py`` into a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    image = io.BytesIO()
    figure_of(cases, ceilings, title).savefig(image, format="png")
    with atomic_write(path, "wb") as file:
        file.write(image.getvalue())


def figure_of(
    cases: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float], title: str
) -> Figure:
    families = list(dict.fromkeys(case["figures"]["family"] for case in cases))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(families)}
    height = max(4.5, 0.24 * len(cases) + 1.5)
    figure = Figure(figsize=(14.0, height), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _roofline(left, cases, ceilings, colors)
    _shares(right, cases, colors)
    return figure


def _roofline(
    axes: Axes,
    cases: Sequence[Mapping[str, Any]],
    ceilings: Mapping[str, float],
    colors: Mapping[str, str],
) -> None:
    """Only cases with matrix products have a place on it: the others have no FLOP to count."""
    placed = [case for case in cases if intensity(case) > 0]
    reach = [intensity(case) for case in placed] or [1.0]
    x = np.geomspace(min(1.0, min(reach)) / 2, 4 * max(reach), 200)
    roofs = matrix_roofs(ceilings)
    for (dtype, roof), style in zip(roofs.items(), ("-", "--", ":"), strict=False):
        axes.plot(x, np.minimum(x * ceilings[COPY], roof), style, color="black", linewidth=1,
                  label=f"measured roof, {dtype}")  # fmt: skip
    for family in dict.fromkeys(case["figures"]["family"] for case in placed):
        own = [case for case in placed if case["figures"]["family"] == family]
        axes.scatter(
            [intensity(case) for case in own],
            [case["figures"]["gflop_per_s"] for case in own],
            color=colors[family], s=28, label=family, zorder=3,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="GFLOP/s")
    axes.set_title("Roofline of the operators with matrix products", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def _shares(axes: Axes, cases: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    shares = [100 * (case["floor_share"] or 0.0) for case in cases]
    places = range(len(cases))
    axes.barh(places, shares, color=[colors[case["figures"]["family"]] for case in cases])
    axes.set_yticks(places, [case["name"] for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlim(0, max(105, *shares) if shares else 105)
    axes.set_xlabel("% of the floor: copy bandwidth or matrix rate, as measured in the run")
    axes.set_title("Share of the floor", fontsize=11)
    axes.grid(axis="x", alpha=0.3)
