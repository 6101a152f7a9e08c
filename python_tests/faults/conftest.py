"""The fault suite: --faults-json FILE writes a table of what was tried and what became of it."""

from pathlib import Path

import pytest
from faults_table import update
from fork_server import Server
from training_runs import TINY

# A run of 24 steps with a checkpoint after every second one: there is always something to lose.
SHORT = [*TINY, "--steps", "24", "--run.checkpoint_interval=2", "--run.eval_interval=9"]


def pytest_addoption(parser: pytest.Parser) -> None:
    help_line = "write what was tried and survived"
    parser.addoption("--faults-json", type=Path, metavar="FILE", help=help_line)


class Table:
    """Collects the outcome, the first line of the docstring and the properties of each test."""

    def __init__(self, path: Path):
        self._path = path
        self._rows: dict[str, dict] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item):
        report = (yield).get_result()
        if report.when == "call" or report.outcome != "passed":
            what = (item.function.__doc__ or item.name).strip().split("\n")[0]
            self._rows[item.name] = {
                "test": f"{item.path.name}::{item.name}",
                "what": what,
                "outcome": {"passed": "survived"}.get(report.outcome, report.outcome),
                "seconds": round(report.duration, 2),
                **dict(item.user_properties),
            }
            if report.skipped:
                self._rows[item.name]["reason"] = str(report.longrepr[2])
            # After every test: a run that is cut short has its table too.
            update(self._path, self._rows.values())


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("faults_json", None)
    if path is not None:
        config.pluginmanager.register(Table(path))


@pytest.fixture(scope="session")
def server():
    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def unbroken(server, text, tmp_path_factory) -> Path:
    """The run that every survivor is compared with, bit for bit."""
    folder = tmp_path_factory.mktemp("faults") / "unbroken"
    server.run(["--run", str(folder), *SHORT, *text], folder.with_suffix(".log"))
    return folder


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "output.log"
