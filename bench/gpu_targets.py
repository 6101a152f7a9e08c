"""What the kernels are meant to reach on one H200, looked up in the record of a GPU check."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Case = Mapping[str, Any]
ATTENTION = "attention 64x512x12x64 bf16"
HEAD = "vocab_head 10240x768x65536 sampled bf16"
NORM = "layer_norm 32768x768 {} bf16"
STEP = "step 12x768 aux 4x768 vocabulary 65536 tokens 64x512 bf16 cuda"
VERDICTS = {None: "not measured", True: "met", False: "missed"}
BIAS_NOTES = {
    "forward": "weak: without a bias our forward pass loads and adds zeros, by the same "
    "instructions; `sdpa no bias` of the same case is the ceiling",
    "backward": "",
}
NORM_VARIANTS = ("residual", "bias + dropout + residual")


@dataclass(frozen=True)
class Target:
    """A figure and its bound.

    what: it is, unit included.
    bound: the least that is wanted, or the most.
    case: of which benchmark case.
    figure: the case -> the figure; KeyError or None where the case lacks it.
    note: what to know about the bound.
    """

    what: str
    bound: float
    case: str
    figure: Callable[[Case], float | None]
    at_most: bool = False
    note: str = ""

    def met_by(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def _rate(name: str) -> Callable[[Case], float]:
    return lambda case: case["figures"][name] / 1e3  # TFLOP/s


def _over(peer: str) -> Callable[[Case], float]:
    """The peer's time over ours."""
    return lambda case: case["ratios"][peer]


def _our_seconds(case: Case) -> float:
    """Of the step as training takes it: in a CUDA graph, where that could be captured."""
    graphed = case["figures"].get("ours_graphed_seconds")
    return min(case["ours"], graphed) if isinstance(graphed, float) else case["ours"]


def _tokens_per_s(case: Case) -> float:
    return case["figures"]["tokens_per_s"]["ours"] * case["ours"] / _our_seconds(case)


def _mfu(case: Case) -> float:
    return 100 * case["figures"]["mfu"]["ours"] * case["ours"] / _our_seconds(case)


def _over_compiled(case: Case) -> float | None:
    """The fastest compiled peer's time over ours."""
    compiled = [
        seconds
        for name, seconds in case["peers"].items()
        if name.startswith("hf compiled") and not isinstance(seconds, str)
    ]
    return min(compiled) / _our_seconds(case) if compiled else None


def _share(case: Case) -> float:
    return 100 * case["floor_share"]


TARGETS = (
    Target("attention forward, TFLOP/s", 300, f"{ATTENTION} forward", _rate("gflop_per_s")),
    # As the published rates of flash attention count: the scores computed again are part of them.
    Target("attention backward, TFLOP/s", 245, f"{ATTENTION} backward", _rate("flash_gflop_per_s")),
    *(
        Target(
            f"attention {mode}, time over that without a bias", 1.10, f"{ATTENTION} {mode}",
            lambda case: 1 / case["ratios"]["ours no bias"], at_most=True, note=note,
        )
        for mode, note in BIAS_NOTES.items()
    ),
    Target(
        "attention, FlexAttention's time over ours", 1.2, f"{ATTENTION} forward + backward",
        _over("flex attention"),
    ),
    Target(
        "vocabulary head forward + backward, TFLOP/s", 550, f"{HEAD} forward + backward",
        _rate("gflop_per_s"),
    ),
    Target(
        "vocabulary head forward, what sampling adds, %", 5, f"{HEAD} forward",
        lambda case: 100 * (1 / case["ratios"]["ours no sample"] - 1), at_most=True,
    ),
    *(
        Target(f"LayerNorm ({variant}) {mode}, % of copy bandwidth", bound,
               f"{NORM.format(variant)} {mode}", _share)
        for variant in NORM_VARIANTS
        for mode, bound in (("forward", 85), ("backward", 75))
    ),
    Target("base++ step, tokens/s", 470_000, STEP, _tokens_per_s),
    Target("base++ step, MFU, %", 40, STEP, _mfu),
    Target("base++ step, Hugging Face compiled over ours", 1.5, STEP, _over_compiled),
)  # fmt: skip


def targets(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each target with what was found; ``found`` and ``met`` are None where it was not measured.

    Args:
        stages: results of `bench.gpu_check`, benchmarks among them with a ``record``.
    """
    cases = {case["name"]: case for s in stages for case in s.get("record", {}).get("cases", [])}
    results = []
    for target in TARGETS:
        try:
            found = target.figure(cases[target.case])
        except KeyError:
            found = None
        results.append(
            {
                "what": target.what,
                "bound": f"{'<=' if target.at_most else '>='} {target.bound:g}",
                "found": found if found is None else float(f"{found:.6g}"),
                "met": found if found is None else target.met_by(found),
                **({"note": target.note} if target.note else {}),
            }
        )
    return results


def target_lines(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line a target and one a note, for people."""
    lines = []
    for result in results:
        found, verdict = found_text(result["found"]), VERDICTS[result["met"]]
        lines.append(f"{result['what']:<62} {result['bound']:>10}  {found:>8}  {verdict}")
        lines += [f"  {result['note']}"] if "note" in result else []
    return lines


def found_text(value: float | None) -> str:
    """Four digits, or whole thousands."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
