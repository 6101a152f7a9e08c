"""Text to token ids and token ids to batches: speed beside Hugging Face tokenizers, and memory.

    python bench/data.py [--megabytes 20] [--sizes 1000 3000] [--output data.json]
    python bench/data.py --only-build --dedup --sizes 1000 10000 --output data-scale.json

Text is the beginning of ``books-more.txt.xz`` (in ``METRO_DATA``, default ``../shared/data``),
repeated where it is too short; the vocabularies of 32000, uncased, are trained on
``books-10m.txt.xz``.

- ``encode``: lines in memory to ids in memory, on all cores of this process. Ours is a process a
  core, as in ``corpus build``. The peers are ``encode_batch_fast`` with a thread a core: a BPE of
  the same size of tokenizers' own (NFKC, lower case, byte level), and the export of our vocabulary,
  which gives our ids. A warm-up round has filled everybody's caches.
- ``corpus build``: the whole command, from a text file to a corpus on disk. ``peak_mb`` is the
  resident memory of all its processes together, looked at 20 times a second;
  ``high_water_mb`` adds up the most that each of them ever had (VmHWM), so no peak can be higher.
  A page that processes share counts in each. With ``--dedup`` a paragraph is a document (hundreds
  of thousands a copy of the text, of which those without the word that changes repeat) and
  duplicates are dropped.
- ``first batch``: from the opening of the larger corpus to a batch of 16 x 512 tokens, in a process
  of its own, at step 0 and at step 10^6; and the time of a batch after that.
"""

import argparse
import itertools
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/data.py`

from bench.harness import Case, emit, table
from bench.timing import interleave, medians
from bench.workers import Worker, serve
from metro_ext.command_line import run
from metro_ext.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("METRO_DATA", ROOT.parent / "shared" / "data"))
VOCABULARY = 32000
LINES_AT_ONCE = 4096
OURS, OWN_BPE, EXPORTED = "ours", "hf tokenizers", "hf tokenizers, our vocabulary"
SHAPE = {"tokens_per_batch": 16 * 512, "sequence_length": 512, "seed": 1}
STEP, MORE_BATCHES = 10**6, 50


def text_of(name: str) -> str:
    path = DATA / name
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; set METRO_DATA to the folder of data")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def make_vocabularies(folder: Path) -> None:
    """tokenizer.model, its export as exported.json, and own.json, unless they are there."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    from metro_ext.tokenizer import Tokenizer, train_tokenizer
    from metro_ext.tokenizer_json import tokenizer_document

    train = folder / "train.txt"
    if not train.exists():
        train.write_text(text_of("books-10m.txt.xz"), encoding="utf-8")
    model = folder / "tokenizer.model"
    if not model.exists():
        train_tokenizer([train], VOCABULARY).save(model)
    if not (folder / "exported.json").exists():
        document = tokenizer_document(Tokenizer.load(model))
        (folder / "exported.json").write_text(json.dumps(document), encoding="utf-8")
    if not (folder / "own.json").exists():
        own = tokenizers.Tokenizer(models.BPE())
        own.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        own.train([str(train)], trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
        own.save(str(folder / "own.json"))


def worker(name: str, folder: Path, share: int, shares: int) -> None:
    """A contender: encodes its share of the lines when asked, or makes batches of a corpus."""
    lines: list[str] = []
    encode: Callable[[list[str]], int]
    if name == OURS:
        from metro_ext.tokenizer import Tokenizer
        from metro_ext.word_encoder import WordEncoder

        encoder = WordEncoder(Tokenizer.load(folder / "tokenizer.model"))

        def encode(batch: list[str]) -> int:
            return encoder.encode(batch)[0].size
    else:
        import tokenizers

        file = "own.json" if name == OWN_BPE else "exported.json"
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / file))

        def encode(batch: list[str]) -> int:
            found = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            return sum(len(one.ids) for one in found)

    def load() -> int:
        text = (folder / "encode.txt").read_text(encoding="utf-8")
        every = [line for line in text.split("\n") if line.strip()]
        lines[:] = every[len(every) * share // shares : len(every) * (share + 1) // shares]
        return len(lines)

    def tokens() -> int:
        begins = range(0, len(lines), LINES_AT_ONCE)
        return sum(encode(lines[begin : begin + LINES_AT_ONCE]) for begin in begins)

    def first_batch(corpus: str, step: int) -> dict[str, float]:
        from metro_ext.batches import BatchSource
        from metro_ext.corpus import Corpus

        start = time.perf_counter()
        source = BatchSource(Corpus.open(corpus), **SHAPE)
        source.batch(step)
        first = time.perf_counter() - start
        for index in range(step + 1, step + 1 + MORE_BATCHES):
            source.batch(index)
        return {"first": first, "each": (time.perf_counter() - start - first) / MORE_BATCHES}

    serve({"load": load, "tokens": tokens, "first_batch": first_batch})


def encode_case(folder: Path, megabytes: int, rounds: int) -> Case:
    content = text_of("books-more.txt.xz")[: megabytes * 10**6]
    (folder / "encode.txt").write_text(content, encoding="utf-8")
    size, cores = len(content.encode()), len(os.sched_getaffinity(0))
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    counts: dict[str, int] = {}
    with ExitStack() as stack, ThreadPoolExecutor(cores) as threads:

        def contender(name: str, shares: int) -> Callable[[], float]:
            arguments = [["--folder", str(folder), "--share", f"{i}/{shares}"]
                         for i in range(shares)]  # fmt: skip
            made = [stack.enter_context(Worker("bench.data", name, a)) for a in arguments]
            for one in made:
                one.call("load")

            def once() -> float:
                start = time.perf_counter()
                counts[name] = sum(threads.map(lambda one: one.call("tokens"), made))
                return time.perf_counter() - start

            return once

        contenders = {OURS: contender(OURS, cores)}
        contenders |= {name: contender(name, 1) for name in (OWN_BPE, EXPORTED)}
        times = interleave(contenders, rounds, warmup=1)
    middle = medians(times)
    if counts[OURS] != counts[EXPORTED]:
        raise RuntimeError(f"{counts[OURS]} tokens, {counts[EXPORTED]} by the export")
    return Case(
        name=f"encode {megabytes} MB vocabulary {VOCABULARY} {cores} cores",
        ours=middle[OURS],
        peers={name: middle[name] for name in (OWN_BPE, EXPORTED)},
        spread={name: (min(values), max(values)) for name, values in times.items()},
        figures={
            "bytes_per_s": {name: size / seconds for name, seconds in middle.items()},
            "tokens_per_s": {name: counts[name] / seconds for name, seconds in middle.items()},
        },
    )


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += family(int(child))
    except OSError:  # gone meanwhile
        pass
    return found


def resident(pid: int) -> tuple[int, int]:
    """Bytes that a process has in memory, and the most that it had."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM")))
        now, most = (int(found[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
        return now, most
    except (OSError, KeyError):  # gone meanwhile
        return 0, 0


def write_text(path: Path, megabytes: int, paragraphs: bool) -> None:
    """The text of `books-more`, over and over; copies differ, as further books would."""
    content = text_of("books-more.txt.xz")
    if paragraphs:  # a document each
        content = content.replace("\n\n", "\n").replace("\n", "\n\n")
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        for copy in itertools.count():
            changed = content.replace(" the ", f" the{copy} ")[: megabytes * 10**6 - size]
            size += file.write(changed + "\n\n")
            if size >= megabytes * 10**6:
                return


def build_case(folder: Path, megabytes: int, dedup: bool) -> Case:
    text, output = folder / "text.txt", folder / "corpus"
    write_text(text, megabytes, paragraphs=dedup)
    command = [sys.executable, "-m", "metro_ext.corpus", "build", str(text), "--tokenizer",
               str(folder / "tokenizer.model"), "--output", str(output),
               *(["--dedup"] if dedup else [])]  # fmt: skip
    start, peak, most = time.perf_counter(), 0, {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            seen = {pid: resident(pid) for pid in family(process.pid)}
            peak = max(peak, sum(now for now, _ in seen.values()))
            most |= {pid: high for pid, (_, high) in seen.items() if high}
            time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"corpus build ended with code {process.returncode}")
    made = json.loads((output / "manifest.json").read_text())
    figures = {
        "bytes_per_s": text.stat().st_size / seconds,
        "tokens_per_s": made["tokens"] / seconds,
        "high_water_mb": sum(most.values()) / 1e6,
        "processes": len(most),
        "tokens": made["tokens"],
        "documents": made["documents"],
    }
    if dedup:
        figures["duplicates"] = made["duplicates"]
    text.unlink()
    name = f"corpus build {megabytes} MB" + (", a paragraph a document, --dedup" if dedup else "")
    return Case(name, seconds, peak_mb=peak / 1e6, figures=figures)


def batch_cases(folder: Path, corpus: Path) -> list[Case]:
    cases = []
    for step in (0, STEP):
        with Worker("bench.data", OURS, ["--folder", str(folder)]) as one:
            found = one.call("first_batch", corpus=str(corpus), step=step)
        figures = {"seconds_a_batch_after": found["each"]}
        cases.append(Case(f"first batch at step {step}", found["first"], figures=figures))
    return cases


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python bench/data.py", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=20, help="text of `encode` (20)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000], help="MB to build")
    parser.add_argument("--only-build", action="store_true", help="`corpus build` alone")
    parser.add_argument("--dedup", action="store_true", help="drop duplicates among paragraphs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the vocabularies here")
    parser.add_argument("--output", metavar="FILE", help="write the JSON too, to bench/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        share, shares = map(int, options.share.split("/"))
        return worker(options.worker, options.folder, share, shares)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        make_vocabularies(folder)
        cases = []
        if not options.only_build:
            cases.append(encode_case(folder, options.megabytes, options.rounds))
        place = Path(scratch)
        (place / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
        for size in options.sizes:
            shutil.rmtree(place / "corpus", ignore_errors=True)
            cases.append(build_case(place, size, options.dedup))
            print(table(cases[-1:]), file=sys.stderr, flush=True)  # the next one may take an hour
        if not options.only_build:
            cases += batch_cases(folder, place / "corpus")
        threads = len(os.sched_getaffinity(0))
        emit("data", cases, threads=threads, output=options.output)


if __name__ == "__main__":
    run(main)
