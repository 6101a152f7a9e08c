"""``python -m metro_ext.finetune TASK --model RUN --data DIR``: several seeds, median, spread."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from metro_ext.atomic import atomic_write
from metro_ext.command_line import run
from metro_ext.finetune import squad_task
from metro_ext.finetune.classify import Classification
from metro_ext.finetune.embed import Embed
from metro_ext.finetune.job import Job, Kind, median_seed, summary
from metro_ext.finetune.loop import Settings
from metro_ext.finetune.record import Record
from metro_ext.finetune.tasks import TASKS
from metro_ext.hardware import DTYPES, choose_device, exact_reductions
from metro_ext.pretrained import load

KINDS: dict[str, Kind] = {
    **{name: Classification(task) for name, task in TASKS.items()},
    "record": Record(),
    **squad_task.TASKS,
    "embed": Embed(),
}
# Options that are fields of some kinds of tasks only.
OWN_OPTIONS = {"length": "squad1 and squad2", "stride": "squad1 and squad2", "temperature": "embed"}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m metro_ext.finetune",
        description="Fine-tune a run on a task from its official files (plain or .xz).",
    )
    made.add_argument("task", choices=KINDS, metavar="TASK", help=", ".join(KINDS))
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
    made.add_argument("--temperature", type=float, metavar="T", help="of embed's cosines (0.05)")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--precision", choices=DTYPES, default="fp32")
    made.add_argument("--submission", action="store_true", help="predict the test files too")
    return made


def checked_kind(made: argparse.ArgumentParser, options: argparse.Namespace) -> Kind:
    """The task with its own options; ends the process where options do not go together."""
    kind = KINDS[options.task]
    for name in ("seeds", "epochs", "batch", "lr", "limit", "temperature"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            made.error(f"--{name} must be above 0, found {value}")
    if options.submission and not options.output:
        made.error("--submission needs --output DIR")
    if options.submission and kind.tests_reason:
        made.error(kind.tests_reason)
    own = {name: v for name in OWN_OPTIONS if (v := getattr(options, name)) is not None}
    fields = {field.name for field in dataclasses.fields(kind)}
    for name in own:
        if name not in fields:
            made.error(f"--{name} is for {OWN_OPTIONS[name]}, not for {kind.name}")
    return dataclasses.replace(kind, **own)


def settings_of(kind: Kind, options: argparse.Namespace, hidden: int) -> Settings:
    """The task's defaults, with what is given on the command line."""
    given = {
        key: value
        for key in ("epochs", "batch", "lr", "weight_decay", "layer_decay")
        if (value := getattr(options, key)) is not None
    }
    return dataclasses.replace(kind.settings(hidden), dtype=DTYPES[options.precision], **given)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser()
    options = made.parse_args(argv)
    kind = checked_kind(made, options)
    exact_reductions()
    device, pretrained = choose_device(options.device, option="--device"), load(options.model)
    settings = settings_of(kind, options, pretrained.config.model.hidden)
    job = Job(pretrained, options.data, settings, device, options.limit)
    tests = kind.load_tests(options.data) if options.submission else None
    results = []
    for seed in range(1, options.seeds + 1):
        result = kind.finetune(job, seed)
        print(f"seed {seed}: {json.dumps(result.scores)}")
        result.model = result.model.cpu() if options.output else None  # one model on the device
        results.append(result)
    table = summary([result.scores for result in results])
    print(f"\n{kind.name}, {options.seeds} seeds: median (lowest to highest)")
    for name, row in table.items():
        print(f"  {name:<32} {row['median']:.4f} ({row['min']:.4f} to {row['max']:.4f})")
    if not options.output:
        return
    chosen = median_seed(results)
    for path in kind.write(job, chosen, options.output):
        print(path)
    plain = dataclasses.asdict(settings) | {"dtype": options.precision}
    document = {"task": kind.name, "settings": plain,
                "seeds": [result.scores for result in results], "summary": table}  # fmt: skip
    with atomic_write(options.output / "results.json", "w") as file:
        file.write(json.dumps(document, indent=1) + "\n")
    for path in kind.submit(job, chosen, tests, options.output) if options.submission else []:
        print(path)


if __name__ == "__main__":
    run(main)
