"""``python -m metro_ext.finetune TASK --model RUN --data DIR``: several seeds, median, spread."""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from metro_ext.atomic import atomic_write
from metro_ext.command_line import run
from metro_ext.finetune import squad_task
from metro_ext.finetune.heads import Classifier, encode, export_classifier
from metro_ext.finetune.loop import Settings, defaults, predict, train
from metro_ext.finetune.span_head import SpanModel, export_span_model
from metro_ext.finetune.submission import write_submission
from metro_ext.finetune.tasks import TASKS, Task
from metro_ext.hardware import choose_device
from metro_ext.pretrained import Pretrained, load

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Result:
    """One seed's model, its figures by dev file, and, for SQuAD, what it found there."""

    model: Classifier | SpanModel
    scores: dict[str, dict[str, float]]
    found: squad_task.Found | None = None


def classify_seed(
    task: Task,
    pretrained: Pretrained,
    data: Path,
    settings: Settings,
    seed: int,
    device: torch.device,
    limit: int | None = None,
) -> Result:
    """One seed's classifier, and its metrics on each dev file; ``limit``: examples to train on."""
    examples = task.load(data, task.train)[:limit]
    model = Classifier(pretrained, max(1, len(task.labels)), seed).to(device)
    rows = encode(pretrained.tokenizer, examples, pretrained.config.model.sequence_length)
    train(model, rows, [example.label for example in examples], settings, seed)
    scores = {}
    for name in task.dev:
        dev = task.load(data, name)
        out = predict(model, pretrained.tokenizer, dev, settings.dtype)
        scores[name] = task.score(dev, out)
    return Result(model, scores)


def answer_seed(task: squad_task.SquadTask, *arguments) -> Result:
    """`classify_seed` for SQuAD."""
    model, scores, found = squad_task.finetune_seed(task, *arguments)
    return Result(model, {f"dev-v{task.version}.json": scores}, found)


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
    names = [*TASKS, *squad_task.TASKS]
    made.add_argument("task", choices=names, metavar="TASK", help=", ".join(names))
    made.add_argument("--model", required=True, metavar="RUN", help="folder of a pretraining run")
    made.add_argument("--data", required=True, type=Path, metavar="DIR", help="the files' folder")
    output = "for results.json, the median seed's model (for transformers) and submissions"
    made.add_argument("--output", type=Path, metavar="DIR", help=output)
    made.add_argument("--seeds", type=int, default=5, metavar="N")
    made.add_argument("--epochs", type=float)
    made.add_argument("--batch", type=int)
    made.add_argument("--lr", type=float)
    made.add_argument("--weight-decay", type=float)
    made.add_argument("--layer-decay", type=float, help="factor of the rate from layer to layer")
    made.add_argument("--limit", type=int, metavar="N", help="train on the first N examples")
    made.add_argument("--length", type=int, metavar="TOKENS", help="of SQuAD's windows (384)")
    stride = "from one of SQuAD's windows to the next (128)"
    made.add_argument("--stride", type=int, metavar="TOKENS", help=stride)
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--precision", choices=DTYPES, default="fp32")
    made.add_argument("--submission", action="store_true", help="predict the test files too")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = parser()
    options = made.parse_args(argv)
    spans = options.task in squad_task.TASKS
    if options.seeds < 1:
        made.error("--seeds must be at least 1")
    if options.submission and not options.output:
        made.error("--submission needs --output DIR")
    if options.submission and spans:
        made.error("SQuAD's test sets are not public: predictions.json of the dev set is in DIR")
    if not spans and (options.length, options.stride) != (None, None):
        made.error("--length and --stride are for squad1 and squad2")
    device, pretrained = choose_device(options.device, option="--device"), load(options.model)
    task = squad_task.TASKS[options.task] if spans else TASKS[options.task]
    if spans:
        task = squad_task.with_windows(task, options.length, options.stride)
    given = {
        key: value
        for key in ("epochs", "batch", "lr", "weight_decay", "layer_decay")
        if (value := getattr(options, key)) is not None
    }
    settings = dataclasses.replace(
        defaults(task.name, not spans and task.small, pretrained.config.model.hidden),
        dtype=DTYPES[options.precision],
        **given,
    )
    results = []
    for seed in range(1, options.seeds + 1):
        one_seed = answer_seed if spans else classify_seed
        result = one_seed(task, pretrained, options.data, settings, seed, device, options.limit)
        print(f"seed {seed}: {json.dumps(result.scores)}")
        result.model = result.model.cpu() if options.output else None  # one model on the device
        results.append(result)
    table = summary([result.scores for result in results])
    print(f"\n{task.name}, {options.seeds} seeds: median (lowest to highest)")
    for name, row in table.items():
        print(f"  {name:<32} {row['median']:.4f} ({row['min']:.4f} to {row['max']:.4f})")
    if options.output:
        plain = dataclasses.asdict(settings) | {"dtype": options.precision}
        document = {"task": task.name, "settings": plain,
                    "seeds": [result.scores for result in results], "summary": table}  # fmt: skip
        chosen = median_seed(results)
        write = write_answers if spans else write_classifier
        write(task, pretrained, chosen, options.output)
        with atomic_write(options.output / "results.json", "w") as file:
            file.write(json.dumps(document, indent=1) + "\n")
        if options.submission:
            model = chosen.model.to(device)
            for name in task.test:
                test = task.load(options.data, name, labelled=False)
                out = predict(model, pretrained.tokenizer, test, settings.dtype)
                print(write_submission(task, test, out, name, options.output))


def median_seed(results: list[Result]) -> Result:
    """The seed in the middle (the lower of two) by the first metric of the first dev file."""
    first = next(iter(results[0].scores))
    metric = next(iter(results[0].scores[first]))
    ranked = sorted(results, key=lambda result: result.scores[first][metric])
    return ranked[(len(ranked) - 1) // 2]


def write_classifier(task: Task, pretrained: Pretrained, chosen: Result, out: Path) -> None:
    export_classifier(chosen.model, pretrained.tokenizer, task.labels, out)


def write_answers(
    task: squad_task.SquadTask, pretrained: Pretrained, chosen: Result, out: Path
) -> None:
    export_span_model(chosen.model, pretrained.tokenizer, out)
    (scores,) = chosen.scores.values()
    for path in squad_task.write_predictions(task, chosen.found, scores, out):
        print(path)


if __name__ == "__main__":
    run(main)
