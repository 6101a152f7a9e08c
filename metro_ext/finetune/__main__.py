"""``python -m metro_ext.finetune TASK --model RUN --data DIR``: several seeds, median, spread."""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from metro_ext.atomic import atomic_write
from metro_ext.command_line import run
from metro_ext.finetune.heads import Classifier, encode, export_classifier
from metro_ext.finetune.loop import Settings, defaults, predict, train
from metro_ext.finetune.submission import write_submission
from metro_ext.finetune.tasks import TASKS, Task
from metro_ext.pretrained import Pretrained, load

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def finetune_seed(
    task: Task,
    pretrained: Pretrained,
    data: Path,
    settings: Settings,
    seed: int,
    say=print,
    limit: int | None = None,
) -> tuple[Classifier, dict[str, dict[str, float]]]:
    """One seed's model, and its metrics on each dev file; ``limit``: examples to train on."""
    examples = task.load(data, task.train)[:limit]
    model = Classifier(pretrained, max(1, len(task.labels)), seed)
    rows = encode(pretrained.tokenizer, examples, pretrained.config.model.sequence_length)
    train(model, rows, [example.label for example in examples], settings, seed, say)
    scores = {}
    for name in task.dev:
        dev = task.load(data, name)
        out = predict(model, pretrained.tokenizer, dev, settings.dtype)
        scores[name] = task.score(dev, out)
    return model, scores


def summary(per_seed: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """``FILE METRIC`` -> median, lowest and highest over the seeds."""
    table = {}
    for name, metrics in per_seed[0].items():
        for metric in metrics:
            values = [scores[name][metric] for scores in per_seed]
            table[f"{name} {metric}"] = {
                "median": statistics.median(values), "min": min(values), "max": max(values),
            }  # fmt: skip
    return table


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m metro_ext.finetune",
        description="Fine-tune a run on a task from its official files (plain or .xz).",
    )
    made.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    made.add_argument("--model", required=True, metavar="RUN", help="folder of a pretraining run")
    made.add_argument("--data", required=True, type=Path, metavar="DIR", help="GLUE's folder")
    output = "for results.json, the median seed's model (for transformers) and submissions"
    made.add_argument("--output", type=Path, metavar="DIR", help=output)
    made.add_argument("--seeds", type=int, default=5, metavar="N")
    made.add_argument("--epochs", type=float)
    made.add_argument("--batch", type=int)
    made.add_argument("--lr", type=float)
    made.add_argument("--weight-decay", type=float)
    made.add_argument("--layer-decay", type=float, help="factor of the rate from layer to layer")
    made.add_argument("--limit", type=int, metavar="N", help="train on the first N examples")
    made.add_argument("--precision", choices=DTYPES, default="fp32")
    made.add_argument("--submission", action="store_true", help="predict the test files too")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = parser()
    options = made.parse_args(argv)
    if options.seeds < 1:
        made.error("--seeds must be at least 1")
    if options.submission and not options.output:
        made.error("--submission needs --output DIR")
    task, pretrained = TASKS[options.task], load(options.model)
    given = {
        key: value
        for key in ("epochs", "batch", "lr", "weight_decay", "layer_decay")
        if (value := getattr(options, key)) is not None
    }
    settings = dataclasses.replace(
        defaults(task.name, task.small, pretrained.config.model.hidden),
        dtype=DTYPES[options.precision],
        **given,
    )
    results, models = [], []
    for seed in range(1, options.seeds + 1):
        model, scores = finetune_seed(
            task, pretrained, options.data, settings, seed, limit=options.limit
        )
        results.append(scores)
        models.append(model if options.output else None)
        print(f"seed {seed}: {json.dumps(scores)}")
    table = summary(results)
    print(f"\n{task.name}, {options.seeds} seeds: median (lowest to highest)")
    for name, row in table.items():
        print(f"  {name:<32} {row['median']:.4f} ({row['min']:.4f} to {row['max']:.4f})")
    if options.output:
        first = next(iter(results[0]))
        metric = next(iter(results[0][first]))
        ranked = sorted(range(len(results)), key=lambda i: results[i][first][metric])
        chosen = ranked[(len(ranked) - 1) // 2]
        export_classifier(models[chosen], pretrained.tokenizer, task.labels, options.output)
        plain = dataclasses.asdict(settings) | {"dtype": options.precision}
        document = {"task": task.name, "settings": plain, "seeds": results, "summary": table}
        with atomic_write(options.output / "results.json", "w") as file:
            file.write(json.dumps(document, indent=1) + "\n")
        if options.submission:
            for name in task.test:
                test = task.load(options.data, name, labelled=False)
                out = predict(models[chosen], pretrained.tokenizer, test, settings.dtype)
                print(write_submission(task, test, out, name, options.output))


if __name__ == "__main__":
    run(main)
