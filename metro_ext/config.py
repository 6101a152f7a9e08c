"""Reads and writes the configuration of a run: preset, then TOML file, then command line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metro_ext.config_schema import (
    FIELDS,
    OBJECTIVES,
    SECTIONS,
    TYPES,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    ProductsConfig,
    RunConfig,
    SyncConfig,
    checked,
)
from metro_ext.errors import UserError
from metro_ext.presets import PRESETS

__all__ = [
    "OBJECTIVES",
    "Config",
    "DataConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "ProductsConfig",
    "RunConfig",
    "SyncConfig",
    "differences",
    "from_dict",
    "help_text",
    "load_config",
    "to_dict",
    "to_toml",
]

# Options that stand for a key: what a user types most.
SHORTCUTS = {
    "run": "run.dir",
    "steps": "run.steps",
    "objective": "objective.name",
    "precision": "run.precision",
    "seed": "run.seed",
    "parallel": "parallel.mode",
    "sync": "sync.mode",
    "preset": "preset",
}


def load_config(
    argv: Sequence[str] = (),
    toml_path: str | Path | None = None,
    preset: str | None = None,
    base: Config | None = None,
    known_options: Iterable[str] = (),
) -> Config:
    """The configuration from all its sources; later ones win: base, preset, TOML, argv.

    argv: `--section.key=value`, `--section.key value` and the shortcuts; a true/false key may
        stand without a value. A list is comma-separated or a TOML array.
    toml_path: a file with one table a section and, at its top, an optional `preset`.
    preset: used unless the file or argv names one. Without any, base stands as it is.
    base: starting point; by default the preset "tiny".
    known_options: the caller's own options ("--config"), for the hint in "did you mean".

    Raises UserError for anything unknown, of the wrong type or out of range.
    """
    from_file = {} if toml_path is None else _read_toml(Path(toml_path))
    from_argv = _parse_argv(argv, known_options)
    preset = from_argv.pop("preset", None) or from_file.pop("preset", None) or preset
    if preset is None and base is None:
        preset = "tiny"
    values: dict[str, Any] = _flatten(base or Config())
    if preset is not None:
        values["preset"] = _preset_name(preset)
        for section, settings in PRESETS[values["preset"]].items():
            values.update({f"{section}.{key}": value for key, value in settings.items()})
    return _build({**values, **from_file, **from_argv})


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers: what goes into a checkpoint's JSON."""
    plain = dataclasses.asdict(config)
    for section in SECTIONS:
        plain[section] = {k: list(v) if type(v) is tuple else v for k, v in plain[section].items()}
    return plain


def from_dict(plain: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`; an unknown key is a UserError.

    A key that is missing has its default: the checkpoint is older than the key.
    """
    return _build({**_flatten(Config()), **_flat_table(plain)})


def to_toml(config: Config) -> str:
    """A TOML file, with each key's help line as a comment, that loads to the same Config."""
    lines = [f"preset = {_toml_value(config.preset)}"]
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        for spec in dataclasses.fields(SECTIONS[section]):
            value = _toml_value(getattr(getattr(config, section), spec.name))
            lines.append(f"{spec.name} = {value}  # {_describe(spec)}")
    return "\n".join(lines) + "\n"


def differences(a: Config, b: Config) -> list[str]:
    """The dotted keys on which two configurations differ, in the order of the fields."""
    left, right = _flatten(a), _flatten(b)
    return [key for key in left if left[key] != right[key]]


def help_text(base: Config | None = None) -> str:
    """Every option with its default and help line, for --help."""
    values = _flatten(base or load_config())
    lines = [f"  --preset NAME  one of: {', '.join(PRESETS)} (default {values['preset']})"]
    lines += [f"  --{short} is --{key}" for short, key in SHORTCUTS.items() if short != key]
    for key, spec in FIELDS.items():
        option = f"--{key}={_toml_value(values[key])}"
        lines.append(f"  {option:<42} {_describe(spec)}")
    return "\n".join(lines)


def _describe(spec: dataclasses.Field) -> str:
    choices = spec.metadata.get("choices")
    return spec.metadata["help"] + (f" ({' | '.join(choices)})" if choices else "")


def _flatten(config: Config) -> dict[str, Any]:
    values: dict[str, Any] = {"preset": config.preset}
    for key in FIELDS:
        section, name = key.split(".")
        values[key] = getattr(getattr(config, section), name)
    return values


def _build(values: Mapping[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key in FIELDS:
        section, name = key.split(".")
        sections[section][name] = values[key]
    made: dict[str, Any] = {name: SECTIONS[name](**sections[name]) for name in SECTIONS}
    return Config(values["preset"], **made)


def _preset_name(name: Any) -> str:
    if not isinstance(name, str):
        raise UserError(f"preset must be a string, found {name!r}")
    if name.lower() not in PRESETS:
        raise UserError(f"preset must be one of {', '.join(PRESETS)}, found {name!r}")
    return name.lower()


def _nearest(word: str, known: Mapping[str, str]) -> str:
    """The key nearest to a word, by its name or, since names abbreviate, by its help line."""

    def likeness(key: str) -> float:
        return max(
            difflib.SequenceMatcher(None, word.lower(), text.lower()).ratio()
            for text in (key, known[key])
        )

    return max(known, key=likeness)


def _unknown_key(key: str) -> UserError:
    """Nearest by the whole name, or, where the section is known, by the name inside it."""
    section, _, name = key.partition(".")
    if section in SECTIONS and name:
        inside = {s.name: s.metadata["help"] for s in dataclasses.fields(SECTIONS[section])}
        nearest = f"{section}.{_nearest(name, inside)}"
    else:
        # A key without its section is nearest by its own name: "lr" is optim.lr.
        known = {name: name.rpartition(".")[2] for name in ("preset", *SECTIONS, *FIELDS)}
        nearest = _nearest(key, known)
    return UserError(f"unknown key {key!r}; did you mean '{nearest}'?")


def _flat_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim": {"lr": 1}} as {"optim.lr": 1.0}, every key known and every value checked."""
    values: dict[str, Any] = {}
    for section, settings in table.items():
        if section == "preset":
            values["preset"] = _preset_name(settings)
        elif section not in SECTIONS:
            raise _unknown_key(section)
        elif not isinstance(settings, Mapping):
            raise UserError(f"'{section}' must be a table of keys, found {settings!r}")
        else:
            for name, value in settings.items():
                key = f"{section}.{name}"
                if key not in FIELDS:
                    raise _unknown_key(key)
                values[key] = checked(key, value)
    return values


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} must be UTF-8 text, found byte {error.start} that is not"
        ) from None
    except ValueError as error:  # TOMLDecodeError, or a number of more digits than int() reads
        raise UserError(f"{path} must be a TOML file: {error}") from None
    except RecursionError:
        raise UserError(f"{path} must be a TOML file, found values nested too deep") from None
    try:
        return _flat_table(table)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _parse_argv(argv: Sequence[str], known_options: Iterable[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"expected an option --section.key=value, found {word!r}")
        option, equals, text = word[2:].partition("=")
        key = SHORTCUTS.get(option, option)
        if key != "preset" and key not in FIELDS:
            if "." in option:
                raise _unknown_key(option)
            known = [*(f"--{name}" for name in (*SHORTCUTS, *FIELDS)), *known_options]
            nearest = _nearest(f"--{option}", {name: name for name in known})
            raise UserError(f"unknown option '--{option}'; did you mean '{nearest}'?")
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif TYPES.get(key) is bool:
                text = "true"
            else:
                raise UserError(f"the option --{option} needs a value, found none")
        values[key] = _preset_name(text) if key == "preset" else checked(key, _parse(key, text))
    return values


def _parse(key: str, text: str) -> Any:
    """The text of an option in its field's type; what does not parse is left for `checked`."""
    expected = TYPES[key]
    if expected is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if expected == tuple[str, ...]:
        if text.startswith("["):
            try:
                return tomllib.loads(f"value = {text}")["value"]
            except (ValueError, RecursionError):
                return text
        return [part for part in text.split(",") if part]
    try:
        return expected(text)
    except ValueError:
        return text


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's; only DEL must be escaped in TOML and is not in JSON.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    return repr(value)
