"""The terminal's panel of a run as a picture: its records are shown to it once more.

    python bench/progress.py RUN OUTPUT.svg [--step N]

Loading fonts is left out of rich's SVG, so that the file asks nothing of the network.
"""

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/progress.py`

from metro_ext.atomic import atomic_write
from metro_ext.command_line import run
from metro_ext.config import load_config
from metro_ext.monitor import EVALUATION_FILE, METRICS_FILE, TIMING_FILE, read_records
from metro_ext.progress_live import Panelled
from metro_ext.train import CONFIG_FILE

COLUMNS = 100


def picture(folder: Path, title: str, until: int | None = None) -> str:
    """The panel as it stood at a step (None: the last), as SVG.

    folder: of a run, with its records and configuration.
    """
    total = load_config(toml_path=folder / CONFIG_FILE).run.steps
    until = total if until is None else until
    # Drawn once, at the end: the live console is a buffer that nobody sees.
    hidden = Console(file=io.StringIO(), force_terminal=True, width=COLUMNS)
    panel = Panelled(hidden, title, total, 0)
    timing = {record["step"]: record for record in read_records(folder / TIMING_FILE)}
    before = 0
    for record in read_records(folder / METRICS_FILE):
        step = record.pop("step")
        if step > until:
            break
        speed = timing[step]
        eta = (total - step) * speed["seconds"] / (step - before)
        panel.interval(step, record, speed, eta)
        before = step
    for record in read_records(folder / EVALUATION_FILE):
        if (step := record.pop("step")) <= until:
            panel.evaluation(step, record)
    shown = Console(file=io.StringIO(), record=True, force_terminal=True, width=COLUMNS)
    shown.print(panel.picture())
    panel.close()
    svg = shown.export_svg(title="python -m metro_ext.train", theme=MONOKAI)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("output", type=Path, metavar="OUTPUT.svg")
    parser.add_argument("--step", type=int, help="as it stood at this step (the last)")
    arguments = parser.parse_args(argv)
    svg = picture(arguments.run, str(arguments.run), arguments.step)
    with atomic_write(arguments.output, "w") as file:
        file.write(svg)
    print(f"{arguments.output}: {len(svg) / 1e3:.0f} kB")


if __name__ == "__main__":
    run(main)
