"""``python -m metro_ext.report RUN [RUN...] [--output FILE.html]``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from metro_ext.atomic import atomic_write
from metro_ext.command_line import at_least, run
from metro_ext.errors import UserError
from metro_ext.report.page import page
from metro_ext.report.runs import read_runs

REPORT_FILE = "report.html"
MOST_RUNS = 8  # as many colours as can be told apart


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.report",
        description="One HTML page about runs that needs no network: figures, plots, samples of "
        "corrupted held-out text with the main model's verdicts, configuration.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help=f"default: RUN/{REPORT_FILE} for one run, {REPORT_FILE} for several",
    )
    parser.add_argument(
        "--samples", type=at_least(0), default=4, metavar="N", help="passages a run (default 4)"
    )
    options = parser.parse_args(argv)
    if len(options.runs) > MOST_RUNS:
        raise UserError(f"expected at most {MOST_RUNS} runs on a page, found {len(options.runs)}")
    output = options.output
    if output is None:
        output = (options.runs[0] if len(options.runs) == 1 else Path()) / REPORT_FILE
    document, remarks = page(read_runs(options.runs), options.samples)
    with atomic_write(output, "w") as file:
        file.write(document)
    for sentence in remarks:
        print(f"warning: {sentence}", file=sys.stderr)
    print(output)


if __name__ == "__main__":
    run(main)
