"""The measured results as tables and plots.

    python bench/report.py [--results FOLDER] [--output FILE.md]

Reads every JSON in bench/results and writes bench/results/README.md, with a plot of each set of
operators beside it. Figures of a GPU come from bench/gpu_check.py or a benchmark with ``--device
cuda``; where there are none the tables say so.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/report.py`

from bench.gpu_targets import VERDICTS, found_text
from bench.harness import ABSENT, RESULTS, seconds_text
from bench.result_files import Record, Source, markdown, number, place, read, where
from bench.roofline import save_plot
from metro_ext.atomic import atomic_write
from metro_ext.command_line import run

NOT_YET = "not yet run on a GPU (`python bench/gpu_check.py` on a machine with one)"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def _contenders(case: Mapping[str, Any]) -> list[tuple[str, float | str]]:
    return [("ours", case["ours"]), *case["peers"].items()]


def step_section(sources: Sequence[Source]) -> str:
    """The whole step: every contender a row."""
    parts = ["## The whole training step"]
    for device, title in DEVICES.items():
        found = [s for s in sources if s.script == "step" and s.device == device]
        parts.append(f"### {title}")
        if not found:
            parts.append(NOT_YET if device == "cuda" else "not yet run")
        for source in found:
            parts.append(where(source))
            for case in source.record["cases"]:
                parts += [f"**{case['name']}**", _step_table(case)]
    return "\n\n".join(parts)


def _step_table(case: Mapping[str, Any]) -> str:
    figures = case["figures"]
    tokens, mfu = figures.get("tokens_per_s", {}), figures.get("mfu", {})
    peaks = {"ours": case["peak_mb"], **case["peers_peak_mb"]}
    rows = []
    for name, seconds in _contenders(case):
        if isinstance(seconds, str):
            rows.append([name, seconds, "", "", "", ""])
            continue
        ratio = "" if name == "ours" else f"{case['ratios'][name]:.2f}x"
        rows.append([
            name, seconds_text(seconds), number(tokens.get(name), ",.0f"),
            number(mfu.get(name), ".1%"), ratio, number(peaks.get(name), ",.0f"),
        ])  # fmt: skip
    if case["floor_seconds"]:
        share = f"{case['floor_share']:.0%} reached"
        rows.append(["floor", seconds_text(case["floor_seconds"]), "", "", share, ""])
    return markdown(["contender", "time", "tokens/s", "MFU", "time over ours", "peak MB"], rows)


@dataclass(frozen=True)
class Operators:
    """The records of operators of one machine, each of some families, as one."""

    place: str
    plot: str  # file name
    sources: list[Source]

    @property
    def device(self) -> str:
        return self.sources[0].device

    @property
    def cases(self) -> list[Mapping[str, Any]]:
        return [case for source in self.sources for case in source.record["cases"]]

    @property
    def ceilings(self) -> dict[str, float]:
        """The highest of each that any of the runs measured."""
        found: dict[str, float] = {}
        for source in self.sources:
            for name, rate in source.record["ceilings"].items():
                found[name] = max(rate, found.get(name, 0.0))
        return found


def operators(sources: Sequence[Source]) -> list[Operators]:
    """The records of ``bench/ops.py``, by machine, in the order of their files."""
    machines: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        if source.script == "ops":
            machines.setdefault((source.device, place(source)), []).append(source)
    groups, names = [], []
    for (device, at), own in machines.items():
        names.append(DEVICES[device].lower())
        number = names.count(names[-1])
        suffix = "" if number == 1 else f"-{number}"
        groups.append(Operators(at, f"roofline-{names[-1]}{suffix}.png", own))
    return groups


def ops_section(groups: Sequence[Operators]) -> str:
    """Every operator: share of its floor and the ratio to each peer."""
    parts = ["## Operators", "A ratio is a peer's time over ours: above 1 ours is the faster. "
             "Peers in brackets do less work than ours."]  # fmt: skip
    for device, title in DEVICES.items():
        found = [group for group in groups if group.device == device]
        parts.append(f"### {title}")
        if not found:
            parts.append(NOT_YET if device == "cuda" else "not yet run")
        for group in found:
            for source in group.sources:
                ceilings = source.record["ceilings"].items()
                rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in ceilings)
                parts += [
                    f"{where(source)}. Measured ceilings: {rates}",
                    _ops_table(source.record["cases"]),
                ]
            parts.append(f"![Roofline and share of the floor]({group.plot})")
    return "\n\n".join(parts)


def _ops_table(cases: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for case in cases:
        figures = case["figures"]
        rows.append([
            case["name"], seconds_text(case["ours"]), number(case["floor_share"], ".0%"),
            number(figures.get("gb_per_s"), ",.0f"), number(figures.get("gflop_per_s"), ",.0f"),
            number(case["peak_mb"], ",.0f"), _ratios(case),
        ])  # fmt: skip
    header = ["case", "ours", "share of the floor", "GB/s", "GFLOP/s", "peak MB", "peers"]
    return markdown(header, rows, words=["peers"])


def _ratios(case: Mapping[str, Any]) -> str:
    parts = []
    for name, seconds in case["peers"].items():
        if isinstance(seconds, str):
            parts.append(f"{name}: {ABSENT.strip(': ')}")
        else:
            text = f"{name} {case['ratios'][name]:.2f}x"
            parts.append(f"({text})" if name in case["lesser"] else text)
    return ", ".join(parts)


def gpu_section(sources: Sequence[Source]) -> str:
    """What each stage of a GPU check found."""
    parts = ["## Checks on a GPU"]
    found = [source for source in sources if source.script == "gpu_check"]
    if not found:
        parts.append(NOT_YET)
    for source in found:
        record = source.record
        parts.append(
            f"{record['device']}; torch {record['torch']}, CUDA {record['cuda']}; commit "
            f"{record['commit']}, {record['date'][:10]}; `{source.file}`"
        )
        rows = [
            [stage["name"], stage["status"], number(stage.get("seconds"), ".0f"), _finding(stage)]
            for stage in record["stages"]
        ]
        parts.append(markdown(["stage", "result", "seconds", "found"], rows, ["result", "found"]))
        if targets := record.get("targets"):
            parts += ["What the kernels are meant to reach on an H200:", _targets_table(targets)]
            parts += [f"{t['what']}: {t['note']}." for t in targets if t.get("note")]
    return "\n\n".join(parts)


def _targets_table(targets: Iterable[Mapping[str, Any]]) -> str:
    rows = [[t["what"], t["bound"], found_text(t["found"]), VERDICTS[t["met"]]] for t in targets]
    return markdown(["target", "wanted", "found", "verdict"], rows, ["verdict"])


def _finding(stage: Mapping[str, Any]) -> str:
    words = [stage["reason"]] if stage.get("reason") else []
    words += [stage["summary"]] if stage.get("summary") else []
    words += [f"{stage[key]} {key}" for key in ("held", "passed", "skipped") if key in stage]
    broken = [*stage.get("wrong", {}), *stage.get("failed", [])]
    words += [f"not: {', '.join(broken)}"] if broken else []
    return "; ".join(words)


def resources_section(sources: Sequence[Source]) -> str:
    """Static evidence: a row an operator's kernel, over its instantiations."""
    parts = ["## CUDA kernels, as compiled"]
    found = [source for source in sources if source.script == "cuda_resources"]
    if not found:
        parts.append("not yet compiled (`python .ci/cuda_resources.py --update`)")
    for source in found:
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for name, targets in source.record["kernels"].items():
            groups.setdefault(name.split("<")[0], []).append(targets)
        targets = sorted({t for g in groups.values() for row in g for t in row if t[:3] == "sm_"})
        header = ["kernel", "instances"]
        for target in targets:
            header += [f"{target} registers", "spilled bytes", "tensor-core instructions"]
        rows = [[name, len(group), *_resources(group, targets)] for name, group in groups.items()]
        parts += [
            f"nvcc {source.record['nvcc']}; `{source.file}`. From the least to the most of a "
            "kernel's instances (dtypes, head sizes, widths).",
            markdown(header, rows),
        ]
    return "\n\n".join(parts)


def _resources(group: Sequence[Mapping[str, Any]], targets: Sequence[str]) -> list[str]:
    cells = []
    for target in targets:
        for key in ("registers", "spill_bytes", "tensor_core"):
            values = [row[target][key] for row in group if target in row]
            low, high = min(values, default=0), max(values, default=0)
            cells.append(str(low) if low == high else f"{low} - {high}")
    return cells


def growth_section(sources: Sequence[Source]) -> str:
    """A row an axis: time and memory by size, and the exponents beside those of theory."""
    parts = []
    for source in sources:
        if source.script != "growth":
            continue
        axes: dict[str, list[Mapping[str, Any]]] = {}
        for case in source.record["cases"]:
            axes.setdefault(case["figures"]["axis"], []).append(case)
        rows = []
        for axis, cases in axes.items():
            figures = cases[0]["figures"]
            fits = [number(figures[f"{key}_exponent"]) for key in
                    ("time", "flops", "memory", "planned")]  # fmt: skip
            rows.append([
                axis, "; ".join(str(case["figures"]["size"]) for case in cases),
                "; ".join(seconds_text(case["ours"]) for case in cases),
                *fits[:2], "; ".join(f"{case['peak_mb']:,.0f}" for case in cases), *fits[2:],
            ])  # fmt: skip
        header = ["axis", "sizes", "time", "its exponent", "that of FLOPs a thread", "peak MB",
                  "its exponent ", "that of the planned bytes"]  # fmt: skip
        plot = source.file.replace(".json", ".png")
        parts += [where(source), markdown(header, rows), f"![Time and memory by size]({plot})"]
    title = "## Growth of a step with its size\n\nFits of size^exponent; memory beyond the least."
    return "\n\n".join([title, *parts]) if parts else ""


def other_section(sources: Sequence[Source]) -> str:
    """Results of scripts that have no table of their own: their cases and figures."""
    known = {"step", "ops", "growth", "gpu_check", "cuda_resources"}
    parts = []
    for source in sources:
        if source.script in known:
            continue
        parts.append(f"### {source.script or source.file}")
        cases = source.record.get("cases")
        if not cases:
            parts.append(f"`{source.file}`")
            if source.script == "faults":
                parts.append(_faults_table(source.record))
            continue
        rows = [
            [case["name"], seconds_text(case["ours"]), number(case["ratio"]), _figures(case)]
            for case in cases
        ]
        parts += [where(source), markdown(["case", "ours", "ratio", "figures"], rows, ["figures"])]
    return "\n\n".join(["## Further results", *parts]) if parts else ""


def _faults_table(record: Record) -> str:
    """What was tried, by the file that tries it: test_fuzz.py and fuzz_atheris.py feed inputs."""
    rows = []
    tried = [(row["test"].split("::")[0], row) for row in record.get("tried", [])]
    for file in dict.fromkeys(file for file, _ in tried):
        own = [row for name, row in tried if name == file]
        survived = sum(row["outcome"] == "survived" for row in own)
        inputs = sum(row.get("inputs", 0) for row in own)
        rows.append([file, len(own), survived, f"{inputs:,}" if inputs else ""])
    return markdown(["tried by", "faults or targets", "survived", "inputs"], rows)


def _figures(case: Mapping[str, Any]) -> str:
    """Numbers alone: commands and nested figures stand in the JSON."""
    return ", ".join(
        f"{name} {value:.4g}"
        for name, value in case["figures"].items()
        if isinstance(value, int | float)
    )


def report(sources: Sequence[Source]) -> str:
    """The whole page."""
    sections = [
        "# Results\n\nMade by `python bench/report.py` from the JSON files beside it. Times are "
        "medians over interleaved rounds of one run.",
        step_section(sources),
        growth_section(sources),
        ops_section(operators(sources)),
        gpu_section(sources),
        resources_section(sources),
        other_section(sources),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python bench/report.py", allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--output", type=Path, help="default: README.md in that folder")
    options = parser.parse_args(argv)
    output = options.output or options.results / "README.md"
    sources = read(options.results)
    for group in operators(sources):
        save_plot(group.cases, group.ceilings, group.place, output.parent / group.plot)
    with atomic_write(output, "w") as file:
        file.write(report(sources))
    print(f"written to {output}")


if __name__ == "__main__":
    run(main)
