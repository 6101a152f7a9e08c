"""``python -m metro_ext.evaluate blimp|retrieval RUN --data ...``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from metro_ext.atomic import atomic_write
from metro_ext.command_line import run
from metro_ext.errors import UserError
from metro_ext.evaluate import beir, retrieval
from metro_ext.evaluate.blimp import blimp, read_pairs
from metro_ext.hardware import DTYPES, choose_device
from metro_ext.pretrained import load, load_text_encoder


def _blimp(options: argparse.Namespace) -> dict:
    if not options.data.is_file():
        raise UserError(f"{options.data}: there is no such file: check --data")
    result = blimp(load(options.run), read_pairs(options.data), options.limit)
    names = list(result)
    print(f"{'set':<58}" + "".join(f"{name:>8}" for name in names))
    for uid in result[names[0]]:
        print(f"{uid:<58}" + "".join(f"{100 * result[name][uid]:8.1f}" for name in names))
    return result


def _retrieval(options: argparse.Namespace) -> dict:
    device = choose_device(options.device, option="--device")
    collection = beir.read(options.data, options.split)
    texts = load_text_encoder(options.run)
    texts.encoder.to(device)
    result = retrieval.evaluate(texts, collection, DTYPES[options.precision])
    print(f"{len(collection.queries)} queries of {collection.qrels}")
    for name, value in result.items():
        print(f"  {name:<16}{value:8.4f}")
    return result


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m metro_ext.evaluate", description="Evaluate a run without training it."
    )
    tasks = made.add_subparsers(required=True, metavar="TASK")
    task = tasks.add_parser("blimp", help="minimal pairs, by every head that the run has")
    task.add_argument("run", metavar="RUN", help="folder of a pretraining run")
    task.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl[.xz]")
    task.add_argument("--limit", type=int, metavar="N", help="the first N pairs of each set")
    task.set_defaults(evaluate=_blimp)
    task = tasks.add_parser("retrieval", help="nDCG@10, recall and MRR@10 on BEIR's files")
    task.add_argument("run", metavar="RUN", help="folder of a run, of an export or of a fine-tune")
    files = "folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv"
    task.add_argument("--data", type=Path, required=True, metavar="DIR", help=files)
    task.add_argument("--split", default="test")
    task.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    task.add_argument("--precision", choices=DTYPES, default="fp32")
    task.set_defaults(evaluate=_retrieval)
    for task in tasks.choices.values():
        task.add_argument("--output", type=Path, metavar="FILE.json")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    result = options.evaluate(options)
    if options.output:
        with atomic_write(options.output, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
