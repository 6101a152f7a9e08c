"""Files that the GLUE and SuperGLUE servers take."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from metro_ext.atomic import atomic_write
from metro_ext.finetune.examples import Example
from metro_ext.finetune.tasks import Task, choices


def write_submission(task: Task, examples: list[Example], out: np.ndarray, path: Path) -> Path:
    """GLUE (.tsv): ``index<TAB>prediction`` with a header; SuperGLUE: a JSON object a line."""
    if path.suffix == ".jsonl":
        return write_json_lines(path, _records(task, examples, out))
    rows = [f"{example.index}\t{_prediction(task, o)}" for example, o in _pairs(examples, out)]
    with atomic_write(path, "w") as file:
        file.write("\n".join(["index\tprediction", *rows]) + "\n")
    return path


def write_json_lines(path: Path, records: list[dict]) -> Path:
    """A JSON object a line."""
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path


def _pairs(examples: list[Example], out: np.ndarray) -> Iterator[tuple[Example, np.ndarray]]:
    return zip(examples, out, strict=True)


def _prediction(task: Task, out: np.ndarray) -> str:
    if not task.labels:
        return f"{min(5.0, max(0.0, float(out[0]))):.3f}"  # STS-B's scale
    return task.labels[int(out.argmax())]


def _records(task: Task, examples: list[Example], out: np.ndarray) -> list[dict]:
    if task.name == "copa":
        best = choices(examples, out)
        return [{"idx": group, "label": examples[place].index} for group, place in best.items()]
    if task.name == "multirc":
        return _multirc_records(examples, out)
    return [{"idx": e.index, "label": _prediction(task, o)} for e, o in _pairs(examples, out)]


def _multirc_records(examples: list[Example], out: np.ndarray) -> list[dict]:
    passages: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for example, o in _pairs(examples, out):
        passage, question = cast(tuple[int, int], example.group)
        answers = passages.setdefault(passage, {}).setdefault(question, [])
        answers.append({"idx": example.index, "label": int(o.argmax())})
    return [
        {
            "idx": passage,
            "passage": {"questions": [{"idx": q, "answers": a} for q, a in questions.items()]},
        }
        for passage, questions in passages.items()
    ]
