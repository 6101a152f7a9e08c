"""The configuration: precedence, round trips, and one clear sentence for every mistake."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metro_ext.config import (
    Config,
    ModelConfig,
    OptimConfig,
    RunConfig,
    differences,
    from_dict,
    help_text,
    load_config,
    to_dict,
    to_toml,
)
from metro_ext.config_schema import FIELDS, SECTIONS
from metro_ext.errors import UserError
from metro_ext.presets import PRESETS


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        load_config(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def unlike_default(spec, value):
    """A valid value that is not the default, so that a lost key shows."""
    if "choices" in spec.metadata:
        return spec.metadata["choices"][-1]
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return ('a "quoted", path', "\\tab\t\x7f", "ünï/文")
    if isinstance(value, str):
        return 'x = "1" # not a comment'
    if isinstance(value, int):
        return value + 2
    return 0.1 + 0.2 if spec.name in ("dropout", "mask_fraction") else value * 0.7 + 1e-7


@pytest.fixture
def unlike() -> Config:
    """Every key away from its default."""
    base, sections = Config(), {}
    for section, cls in SECTIONS.items():
        values = {s.name: unlike_default(s, getattr(getattr(base, section), s.name))
                  for s in dataclasses.fields(cls)}  # fmt: skip
        if section == "model":
            values |= {"hidden": 192, "heads": 3}
        if section == "run":
            values["tokens_per_batch"] = 3 * sections["model"].sequence_length
        sections[section] = cls(**values)
    return Config(preset="small", **sections)


def test_round_trips_keep_every_key(tmp_path, unlike):
    changed = [key for key in FIELDS if key != "optim.schedule"]  # the one key with one choice
    assert differences(Config(), unlike) == ["preset", *changed]
    assert load_config(toml_path=write(tmp_path, to_toml(unlike))) == unlike
    assert from_dict(json.loads(json.dumps(to_dict(unlike)))) == unlike


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_round_trip(tmp_path, preset):
    config = load_config(preset=preset)
    assert config.preset == preset
    assert load_config(toml_path=write(tmp_path, to_toml(config))) == config


def test_later_sources_win(tmp_path):
    path = write(
        tmp_path, 'preset = "SMALL"\n[optim]\nlr = 3e-4\nclip_norm = 1\n[run]\nsteps = 7\n'
    )
    config = load_config(["--optim.lr=2e-4", "--steps", "9"], path, preset="base")
    assert config.preset == "small"
    assert config.model.hidden == 256  # preset
    assert config.optim.clip_norm == 1.0 and type(config.optim.clip_norm) is float  # file
    assert config.optim.lr == 2e-4 and config.run.steps == 9  # command line
    # The preset of the command line does not undo the file's other keys.
    config = load_config(["--preset", "base"], path)
    assert (config.model.hidden, config.optim.lr) == (768, 3e-4)


def test_base_stands_unless_a_preset_is_asked_for():
    base = Config(run=RunConfig(dir="elsewhere", steps=3), optim=OptimConfig(lr=0.5))
    assert load_config(base=base) == base
    asked = load_config(["--preset=small"], base=base)
    assert asked.run.dir == "elsewhere"
    assert (asked.optim.lr, asked.run.steps) == (5e-4, 1_000_000)


def test_shortcuts_and_forms():
    argv = ["--run", "r", "--steps=3", "--objective", "clm-all", "--precision", "bf16"]
    argv += ["--seed", "4", "--run.compile", "--run.tensorboard", "true"]
    argv += ["--data.train=a.txt,b c.txt", "--data.valid", '["d,e"]']
    config = load_config(argv)
    assert config.run == dataclasses.replace(
        load_config().run, dir="r", steps=3, precision="bf16", seed=4, compile=True,
        tensorboard=True,
    )  # fmt: skip
    assert config.objective.name == "clm-all"
    assert config.data.train == ("a.txt", "b c.txt") and config.data.valid == ("d,e",)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--optim.learning_rate=1"], ["optim.learning_rate", "'optim.lr'"]),
        (["--optm.lr=1"], ["optm.lr", "'optim.lr'"]),
        (["--run.step=1"], ["run.step", "'run.steps'"]),
        (["--stesp", "3"], ["--stesp", "'--steps'"]),
        (["--confg", "x"], ["--confg", "'--config'"]),
        (["--optim.lr=fast"], ["optim.lr", "a number", "'fast'"]),
        (["--optim.lr=nan"], ["optim.lr", "a number", "nan"]),
        (["--optim.lr=0"], ["optim.lr", "above 0.0", "found 0.0"]),
        (["--steps", "2.5"], ["run.steps", "a whole number", "'2.5'"]),
        (["--steps"], ["--steps", "needs a value"]),
        (["--run.steps=0"], ["run.steps", "at least 1", "found 0"]),
        (["--run.compile=perhaps"], ["run.compile", "true or false", "'perhaps'"]),
        (["--model.dropout=1"], ["model.dropout", "below 1.0"]),
        (["--seed=-1"], ["run.seed", "at least 0", "found -1"]),
        (["--objective=bert"], ["objective.name", "metro, electra, clm-all, mlm", "'bert'"]),
        (["--preset=bass"], ["preset", "base++", "'bass'"]),
        (["--model.heads=3"], ["model.heads", "3 heads", "hidden 128"]),
        (["--model.hidden=20"], ["multiple of 8", "found 20 / 2 = 10"]),
        (["--model.hidden=260"], ["multiple of 8 up to 128", "found 260 / 2 = 130"]),
        (["--model.hidden=132", "--model.heads=1"], ["multiple of 8", "132 / 1 = 132"]),
        (["--model.relative_buckets=33"], ["model.relative_buckets", "even", "33"]),
        (["--model.relative_max_distance=8"], ["model.relative_max_distance", "found 8"]),
        (["--objective.random_token_fraction=0.3"], ["add up", "1.1"]),
        (["--run.tokens_per_batch=100"], ["run.tokens_per_batch", "128", "100"]),
        (["--run.tokens_per_batch=1000"], ["run.tokens_per_batch", "multiple of", "128", "1000"]),
        (["--data.train=[1, 2]"], ["data.train", "list of strings", "[1, 2]"]),
        (["--data.train=[oops"], ["data.train", "list of strings", "[oops"]),
        (["--run", "caf\udce9"], ["run.dir", "UTF-8"]),
        (["--data.train", "a,\udce9"], ["data.train", "UTF-8"]),
        (["train.txt"], ["--section.key=value", "'train.txt'"]),
    ],
)
def test_mistakes_on_the_command_line(argv, parts):
    message = error_of(argv, known_options=["--config", "--print-config"])
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[optim]\nlrr = 1", ["unknown key 'optim.lrr'", "'optim.lr'"]),
        ("[optimizer]\nlr = 1", ["unknown key 'optimizer'", "'optim'"]),
        ("steps = 1", ["unknown key 'steps'", "'run.steps'"]),
        ("lr = 1", ["unknown key 'lr'", "'optim.lr'"]),
        ("run = 1", ["'run' must be a table"]),
        ("[run]\nsteps = true", ["run.steps", "a whole number", "True"]),
        ("[run]\ndir = 3", ["run.dir", "a string", "3"]),
        ("[run]\nsteps = 1.0", ["run.steps", "a whole number", "1.0"]),
        ("[optim]\nlr = inf", ["optim.lr", "a number", "inf"]),
        ('[data]\ntrain = "a.txt"', ["data.train", "a list of strings", "'a.txt'"]),
        ("preset = 4", ["preset must be a string", "4"]),
        ("[run\n", ["must be a TOML file"]),
        ("x = " + "[" * 100_000, ["must be a TOML file"]),
        (f"[optim]\nlr = 1{'0' * 400}", ["optim.lr", "a number"]),
    ],
)
def test_mistakes_in_the_file_name_it(tmp_path, text, parts):
    path = write(tmp_path, text)
    message = error_of(toml_path=path)
    assert [part for part in [str(path), *parts] if part not in message] == []


def test_unreadable_files(tmp_path):
    assert "No such file" in error_of(toml_path=tmp_path / "none.toml")
    assert "Is a directory" in error_of(toml_path=tmp_path)
    path = tmp_path / "latin.toml"
    path.write_bytes('preset = "ü"'.encode("latin-1"))
    assert "UTF-8" in error_of(toml_path=path)


def test_from_dict_is_strict():
    plain = to_dict(Config())
    plain["model"]["depth"] = 3
    with pytest.raises(UserError, match=r"unknown key 'model\.depth'"):
        from_dict(plain)


def test_a_key_younger_than_the_checkpoint_has_its_default():
    unlike = Config(optim=OptimConfig(lr=0.5, eps=1e-3))
    plain = to_dict(unlike)
    del plain["optim"]["eps"], plain["parallel"]
    assert from_dict(plain) == Config(optim=OptimConfig(lr=0.5))


def test_direct_construction_is_checked_and_frozen():
    with pytest.raises(UserError, match=r"model\.layers must be a whole number, found '3'"):
        ModelConfig(layers="3")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.layers = 4
    assert type(ModelConfig(dropout=0).dropout) is float


def test_help_lists_every_key_and_its_default():
    text = help_text()
    for key, spec in FIELDS.items():
        assert f"--{key}=" in text and spec.metadata["help"] in text
    assert "--run.steps=1500" in text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_a_mangled_file_is_refused_or_read(tmp_path_factory, data):
    """Bytes cut out of, or put into, a good file: a Config or a UserError, nothing else."""
    good = to_toml(Config()).encode()
    start = data.draw(st.integers(0, len(good)))
    end = start + data.draw(st.integers(0, 30))
    inserted = data.draw(st.one_of(st.binary(max_size=8), st.sampled_from(
        [b"=", b"[", b"]", b'"', b"\n", b"inf", b"nan", b"-", b"[[", b"{}", b"1e999", b"0x", b"."]
    )))  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "mangled.toml"
    path.write_bytes(good[:start] + inserted + good[end:])
    try:
        config = load_config(toml_path=path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert from_dict(to_dict(config)) == config


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(FIELDS)), st.text(max_size=12))
def test_any_value_is_refused_or_kept(key, text):
    try:
        config = load_config([f"--{key}={text}"])
    except UserError:
        return
    assert differences(load_config(), config) in ([], [key])
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
