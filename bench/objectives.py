"""The objective study: ``mlm``, ``electra``, ``clm-all`` and ``metro`` at equal compute.

    python bench/objectives.py [--objectives metro mlm] [--seeds 1 2] [--steps N]

Each (objective, seed) is trained on ``books-10m`` with the settings of ``bench/books.py`` until it
has spent the FLOPs of ``--steps`` steps of ``metro``; then the held-out figures, BLiMP, and CoLA,
SST-2 and RTE fine-tuned. FLOPs are those of matrix products, forward and backward
(`metro_ext.presets.flops_per_token`). Wall time is reported too and, since other work on the
machine lengthens it, what the tokens take at the rate of the fastest logged interval. ``untrained``
is ``metro`` at its start, evaluated likewise: what fine-tuning alone can do. Held-out perplexity is
that of the network that fills masks: the small auxiliary one, but the main one of ``mlm``.

Every finished part is kept in ``--folder``: the same command goes on where it was stopped, parts
may run in any order, and one that fails is named at the end and does not stop the others. The table
and the figure in ``bench/results`` are made of what is there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/objectives.py`

from bench.books import DATA, SETTINGS, call, prepare
from bench.harness import RESULTS, commit, machine
from metro_ext.atomic import atomic_write
from metro_ext.command_line import run
from metro_ext.config import load_config
from metro_ext.config_schema import OBJECTIVES
from metro_ext.errors import UserError
from metro_ext.evaluate.blimp import blimp, read_pairs
from metro_ext.import_mpnet import write_start
from metro_ext.model import PretrainingModel
from metro_ext.presets import flops_per_token
from metro_ext.pretrained import load
from metro_ext.tokenizer import Tokenizer

VOCABULARY = 4096  # of bench/books.py
HELD_OUT = ("mlm_perplexity", "rtd_auc", "rtd_accuracy", "clm_accuracy")
TASKS = ("cola", "sst-2", "rte")
UNTRAINED = "untrained"


def flops_of(objective: str, settings: Sequence[str]) -> float:
    """FLOPs of one token in training."""
    config = load_config(
        [*settings, f"--objective={objective}", f"--model.vocab_size={VOCABULARY}"]
    )
    return flops_per_token(config.model, config.objective)


def equal_steps(objective: str, metro_steps: int, settings: Sequence[str]) -> int:
    """Steps that cost as much as ``metro_steps`` steps of ``metro``."""
    return max(1, round(metro_steps * flops_of("metro", settings) / flops_of(objective, settings)))


class Part:
    """One (objective, seed): its folder, and what has been found for it so far."""

    def __init__(self, folder: Path, objective: str, seed: int):
        self.objective, self.seed = objective, seed
        self.run = folder / f"{objective}-seed{seed}"
        self.path = self.run / "study.json"
        self.found: dict = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def keep(self, **found) -> None:
        self.found |= found
        with atomic_write(self.path, "w") as file:
            file.write(json.dumps(self.found, indent=1) + "\n")


def pretrain(part: Part, steps: int, data: list[str], settings: Sequence[str]) -> None:
    """Trains, or goes on, and keeps the last held-out figures; wall time adds up over restarts.

    UserError where the part was begun with other steps or settings, of which its schedule and its
    evaluation would be a mixture.
    """
    asked = {"steps": steps, "settings": list(settings)}
    if part.found.get("asked", asked) != asked:
        raise UserError(
            f"{part.run}: expected a part begun with {steps} steps and the same settings, found "
            f"one with {part.found['asked']['steps']}: remove it or name another --folder"
        )
    if "steps" in part.found:
        return
    part.run.mkdir(parents=True, exist_ok=True)
    part.keep(asked=asked)
    if part.objective == UNTRAINED:
        start_only(part, data, settings)
        part.keep(steps=0, held_out={}, seconds=0.0)
        return
    start = time.perf_counter()
    try:
        call("metro_ext.train", f"--run={part.run}", f"--objective={part.objective}",
             f"--seed={part.seed}", f"--steps={steps}", *settings, *data)  # fmt: skip
    finally:
        part.keep(seconds=part.found.get("seconds", 0.0) + time.perf_counter() - start)
    lines = (part.run / "evaluation.jsonl").read_text().splitlines()
    part.keep(steps=steps, held_out=json.loads(lines[-1]))


def start_only(part: Part, data: list[str], settings: Sequence[str]) -> None:
    """The networks of ``metro`` as training would find them."""
    options = [*settings, *data, "--objective=metro", f"--seed={part.seed}", f"--run={part.run}"]
    config = load_config([*options, f"--model.vocab_size={VOCABULARY}"])
    model = PretrainingModel(config.model, config.objective.name, config.run.seed)
    write_start(part.run, config, model, Tokenizer.load(config.data.tokenizer))


def evaluate(part: Part, options: argparse.Namespace) -> None:
    """BLiMP, and each task's dev metric over its seeds.

    What is there already, and was found with the same options, is kept.
    """
    asked = {"limit": options.blimp_limit}
    if part.found.get("blimp_asked") != asked:
        pairs, start = read_pairs(options.data / "blimp.jsonl.xz"), time.perf_counter()
        scores = blimp(load(part.run), pairs, options.blimp_limit)
        overall = {name: sets["overall"] for name, sets in scores.items()}
        seconds = time.perf_counter() - start
        part.keep(blimp=overall, blimp_sets=scores, blimp_asked=asked, blimp_seconds=seconds)
    for task in options.tasks:
        words = ["--seeds", options.finetune_seeds, "--epochs", options.epochs,
                 "--precision", options.precision]  # fmt: skip
        words += ["--limit", options.train_limit] if options.train_limit else []
        asked, start = [str(word) for word in words], time.perf_counter()
        if part.found.get(f"{task}_asked") == asked:
            continue
        out = part.run / f"finetuned-{task}"
        call("metro_ext.finetune", task, "--model", part.run, "--data", options.data / "glue",
             "--output", out, *words)  # fmt: skip
        found = json.loads((out / "results.json").read_text())["summary"]
        seconds = time.perf_counter() - start
        part.keep(**{task: found, f"{task}_asked": asked, f"{task}_seconds": seconds})


def figures(part: Part) -> dict[str, float]:
    """One flat row of a part: held-out figures, BLiMP scores, the tasks' first metrics."""
    held_out = part.found["held_out"]
    row = {key: held_out[key] for key in HELD_OUT if held_out.get(key) is not None}
    row |= {f"BLiMP {name}": 100 * value for name, value in part.found.get("blimp", {}).items()}
    for task in TASKS:
        if task in part.found:
            metric, values = next(iter(part.found[task].items()))
            row[f"{task} {metric.split()[-1]}"] = 100 * values["median"]
    row["minutes"] = part.found["seconds"] / 60
    timing = part.run / "timing.jsonl"
    if timing.is_file():
        records = [json.loads(line) for line in timing.read_text().splitlines()]
        tokens = sum(record["tokens_per_s"] * record["seconds"] for record in records)
        row["minutes, undisturbed"] = tokens / max(r["tokens_per_s"] for r in records) / 60
    return row


def summarise(parts: list[Part]) -> dict[str, dict[str, dict[str, float]]]:
    """objective -> figure -> median, lowest and highest over the seeds that are done."""
    table: dict = {}
    for objective in (*OBJECTIVES, UNTRAINED):
        rows = [figures(p) for p in parts if p.objective == objective and "steps" in p.found]
        keys = {key: None for row in rows for key in row}
        for key in keys:
            values = [row[key] for row in rows if key in row]
            table.setdefault(objective, {})[key] = {
                "median": statistics.median(values), "min": min(values), "max": max(values),
                "seeds": len(values),
            }  # fmt: skip
    return table


def draw(table: dict, path: Path) -> None:
    """BLiMP and the tasks: one group of bars a figure, one bar an objective, whiskers its range."""
    from matplotlib.figure import Figure

    words = ("BLiMP", *TASKS)
    keys = list({k: None for row in table.values() for k in row if k.startswith(words)})
    picture = Figure(figsize=(max(6, 1.4 * len(keys)), 4), layout="constrained")
    axes = picture.subplots()
    for place, (objective, row) in enumerate(table.items()):
        shown = [(i, row[key]) for i, key in enumerate(keys) if key in row]
        middle = [r["median"] for _, r in shown]
        spread = [[r["median"] - r["min"] for _, r in shown],
                  [r["max"] - r["median"] for _, r in shown]]  # fmt: skip
        width = 0.8 / len(table)
        x = [i + (place - (len(table) - 1) / 2) * width for i, _ in shown]
        axes.bar(x, middle, width=0.9 * width, yerr=spread, capsize=2, label=objective)
    axes.set_xticks(range(len(keys)), keys, rotation=20, ha="right")
    axes.set_ylabel("per cent (median and range)")
    axes.legend()
    with atomic_write(path) as file:
        picture.savefig(file, format="png", dpi=120)


def report(parts: list[Part], output: str, settings: Sequence[str]) -> None:
    table = summarise(parts)
    if not table:
        return
    document = {
        "script": "objectives",
        "commit": commit(),
        "machine": machine(),
        "settings": list(settings),
        "flops_per_token": {n: flops_of(n, settings) for n in table if n != UNTRAINED},
        "parts": [{"objective": p.objective, "seed": p.seed, **p.found} for p in parts if p.found],
        "table": table,
    }
    with atomic_write(RESULTS / f"{output}.json", "w") as file:
        file.write(json.dumps(document, indent=1) + "\n")
    draw(table, RESULTS / f"{output}.png")
    for objective, row in table.items():
        print(objective)
        for key, value in row.items():
            print(f"  {key:<24} {value['median']:9.3f} ({value['min']:.3f} to {value['max']:.3f})")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python bench/objectives.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = (*OBJECTIVES, UNTRAINED)
    parser.add_argument("--objectives", nargs="+", choices=names, default=list(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=2000, help="of metro; the others' follow")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--finetune-seeds", type=int, default=1, help="seeds of each task")
    parser.add_argument("--epochs", type=float, default=3, help="of fine-tuning")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--train-limit", type=int, default=20_000, help="0: the whole set")
    parser.add_argument("--blimp-limit", type=int, default=200, help="pairs a set")
    parser.add_argument("--pretrain-only", action="store_true")
    parser.add_argument("--report-only", action="store_true", help="of what is there")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--folder", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--output", default="objectives", help="name in bench/results")
    options, extra = parser.parse_known_args(argv)
    settings = [*SETTINGS, *extra]  # --section.key=value of metro_ext.train
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = [Part(folder, o, seed) for seed in options.seeds for o in options.objectives]
    failed = []
    if not options.report_only:
        data = prepare(folder)
        for part in parts:
            trained = part.objective != UNTRAINED
            steps = equal_steps(part.objective, options.steps, settings) if trained else 0
            try:
                pretrain(part, steps, data, settings)
                if not options.pretrain_only:
                    evaluate(part, options)
            except subprocess.CalledProcessError as error:
                failed.append(f"{part.run.name}: {error}")
            report(parts, options.output, settings)
    report(parts, options.output, settings)
    if failed:
        raise UserError("not finished, run the command again: " + "; ".join(failed))


if __name__ == "__main__":
    run(main)
