"""GLUE's and SuperGLUE's classification tasks, from their files to models and submissions."""

from dataclasses import dataclass
from pathlib import Path

from metro_ext.finetune.examples import Example
from metro_ext.finetune.heads import Classifier, encode, export_classifier
from metro_ext.finetune.job import Job, Result
from metro_ext.finetune.loop import Settings, defaults, predict, train
from metro_ext.finetune.submission import write_submission
from metro_ext.finetune.tasks import Task


@dataclass(frozen=True)
class Classification:
    """A `Task` as a `metro_ext.finetune.job.Kind`."""

    task: Task
    tests_reason = ""

    @property
    def name(self) -> str:
        return self.task.name

    def settings(self, hidden: int) -> Settings:
        return defaults(self.name, self.task.small, hidden)

    def finetune(self, job: Job, seed: int) -> Result:
        task, tokenizer = self.task, job.pretrained.tokenizer
        examples = task.load(job.data, task.train)[: job.limit]
        dev = {name: task.load(job.data, name) for name in task.dev}
        model = Classifier(job.pretrained, max(1, len(task.labels)), seed).to(job.device)
        rows = [(row,) for row in encode(tokenizer, examples, job.length)]
        train(model, rows, [example.label for example in examples], job.settings, seed)
        scores = {}
        for name, own in dev.items():
            out = predict(model, encode(tokenizer, own, job.length), job.settings.dtype)
            scores[name] = task.score(own, out)
        return Result(model, scores)

    def write(self, job: Job, chosen: Result, out: Path) -> list[Path]:
        export_classifier(chosen.model, job.pretrained.tokenizer, self.task.labels, out)
        return []

    def load_tests(self, data: Path) -> dict[str, list[Example]]:
        """Name of the submission file -> examples; diagnostic sets where they are there."""
        return self.task.load_tests(data)

    def submit(
        self, job: Job, chosen: Result, tests: dict[str, list[Example]], out: Path
    ) -> list[Path]:
        model, written = chosen.model.to(job.device), []
        for name, examples in tests.items():
            rows = encode(job.pretrained.tokenizer, examples, job.length)
            found = predict(model, rows, job.settings.dtype)
            written.append(write_submission(self.task, examples, found, out / name))
        return written
