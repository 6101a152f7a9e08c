"""What a build of a corpus is going to do, written down before it begins, so that it can go on.

The input is cut into units, each of which one process encodes. They follow from the input and the
options alone, never from the number of processes, and so does all that is made of them.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

from metro_ext.atomic import atomic_write
from metro_ext.errors import UserError
from metro_ext.text_files import Part, check_text_file, file_parts, find_text_files

PLAN = "plan.json"
_VERSION = 1
# Of text (or of compressed text): what a killed build loses for each of its processes.
UNIT_BYTES = 1 << 25


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides a corpus, besides its input."""

    tokenizer_sha256: str
    shard_tokens: int
    field: str
    dedup: bool


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file as it was when the build began: a change of size or time is a change of content."""

    path: str
    bytes: int
    modified_ns: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Units of (index into files, begin, end): see `metro_ext.text_files.Part`."""

    options: Options
    files: list[InputFile]
    units: list[list[tuple[int, int, int]]]

    def write(self, folder: Path) -> None:
        body = {"version": _VERSION, **dataclasses.asdict(self)}
        with atomic_write(folder / PLAN, "w") as file:
            json.dump(body, file, indent=1)

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """The plan of a build's folder.

        Raises:
            UserError: it is of another version of the package, or damaged.
        """
        try:
            body = json.loads((folder / PLAN).read_bytes())
            if body.pop("version") != _VERSION:
                raise ValueError("another version of metro_ext wrote it")
            units = [[tuple(span) for span in unit] for unit in body["units"]]
            return cls(
                Options(**body["options"]), [InputFile(**one) for one in body["files"]], units
            )
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{folder / PLAN}: the plan of an unfinished build cannot be read ({error}): "
                f"remove the folder {folder} to build anew"
            ) from error

    def parts(self, unit: int) -> list[tuple[Path, Part]]:
        return [(Path(self.files[i].path), Part(a, b)) for i, a, b in self.units[unit]]

    def check_files(self) -> None:
        """See that no input file has changed since the plan was made.

        Raises:
            UserError: names the first that has.
        """
        for file in self.files:
            if (found := _look(Path(file.path))) != file:
                raise UserError(
                    f"{file.path}: the file changed since the build began (expected "
                    f"{file.bytes} bytes, time {file.modified_ns}; found {found.bytes} bytes, time "
                    f"{found.modified_ns})"
                )


def make_plan(inputs: Iterable[str | os.PathLike], options: Options) -> Plan:
    """Find the input's files and cut them into units.

    Raises:
        UserError: see `find_text_files`; a .parquet file without the column; a missing extra.
    """
    paths = find_text_files(inputs)
    files: list[InputFile] = []
    units: list[list[tuple[int, int, int]]] = []
    filled = 0
    for index, path in enumerate(paths):
        check_text_file(path, options.field)
        files.append(_look(path))
        # A small file shares its unit with those before it.
        for part in file_parts(path, UNIT_BYTES):
            if not units or filled + min(files[-1].bytes, UNIT_BYTES) > UNIT_BYTES:
                units.append([])
                filled = 0
            units[-1].append((index, part.begin, part.end))
            filled += files[-1].bytes
    return Plan(options, files, units)


def begin_or_resume(folder: Path, plan: Plan) -> bool:
    """Write the plan into a build's folder, or see that it is the one that is there.

    Returns:
        Whether there is work of an earlier build to go on with.

    Raises:
        UserError: the folder holds a build with other options or of other input.
    """
    if not (folder / PLAN).exists():
        plan.write(folder)
        return False
    before = Plan.read(folder)
    remedy = f"remove the folder {folder} to build anew"
    for option in dataclasses.fields(Options):
        was, now = (getattr(p.options, option.name) for p in (before, plan))
        if was != now:
            raise UserError(
                f"{folder} holds an unfinished build with another {option.name} (expected {was}, "
                f"found {now}): give the same options to go on with it, or {remedy}"
            )
    try:
        before.check_files()
    except (UserError, OSError) as error:
        raise UserError(f"{error}: put it back to go on with the build, or {remedy}") from error
    if (before.files, before.units) != (plan.files, plan.units):
        raise UserError(
            f"{folder} holds an unfinished build of other files (expected {len(before.files)}, "
            f"found {len(plan.files)}): name the same input to go on with it, or {remedy}"
        )
    plan.write(folder)  # equal is not the same: 1.0 equals 1, and is no place in a file
    return True


def _look(path: Path) -> InputFile:
    status = os.stat(path)
    return InputFile(str(path), status.st_size, status.st_mtime_ns)
