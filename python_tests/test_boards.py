"""TensorBoard and Weights & Biases are told what the records hold; read back from their files."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from training_runs import train

from metro_ext.boards import open_boards, require_boards
from metro_ext.config_schema import RunConfig
from metro_ext.errors import UserError
from metro_ext.monitor import Monitor, read_records

BLOCK, HEADER = 32768, 7  # of the log format of LevelDB, in which an offline run is written
FULL, LAST = 1, 4


def wandb_records(path: Path) -> Iterator:
    """The records of an offline run's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, whole = HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # a block's end too short for a header is filled up
            place += BLOCK - place % BLOCK
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (FULL, LAST):
            yield Record.FromString(whole)
            whole = b""


def wandb_told(path: Path) -> tuple[str, dict, list[dict]]:
    """(id, configuration, what was logged) of an offline run's file."""
    import wandb

    wandb.teardown()  # ends the process that writes it, as the end of this one would
    identifier, config, history = "", {}, []
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            identifier = record.run.run_id
            config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "history":
            pairs = ((i.nested_key[0] if i.nested_key else i.key, i) for i in record.history.item)
            history.append({key: json.loads(i.value_json) for key, i in pairs})
    shown = [{k: v for k, v in row.items() if not k.startswith("_")} for row in history]
    return identifier, config, shown


def log(folder, config, resumed_step, steps, evaluation=None):
    boards = open_boards(config, folder, resumed_step, {"run": {"seed": 5}})
    stream = io.StringIO()
    with Monitor(folder, 10, resumed_step=resumed_step, boards=boards, stream=stream) as monitor:
        for step, loss in steps.items():
            monitor.log(step, {"loss": loss})
        if evaluation is not None:
            monitor.log_evaluation(max(steps), {"rtd_auc": evaluation, "rtd_f1": None})
        monitor.sync()


@pytest.mark.parametrize(("key", "module"), [("tensorboard", "torch.utils.tensorboard"),
                                             ("wandb", "wandb")])  # fmt: skip
def test_one_that_is_missing_is_named(key, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    config = RunConfig(**{key: True})
    for attempt in (lambda: require_boards(config), lambda: open_boards(config, tmp_path, 0, {})):
        with pytest.raises(UserError, match=rf"pip install 'metro-ext\[{key}\]'"):
            attempt()
    assert not list(tmp_path.iterdir())
    require_boards(RunConfig())
    assert open_boards(RunConfig(), tmp_path, 0, {}) == []


def test_a_folder_named_wandb_is_not_taken_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    with pytest.raises(UserError, match="Weights & Biases is not installed"):
        require_boards(RunConfig(wandb=True))


def test_tensorboard_gets_what_there_is(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = RunConfig(tensorboard=True)
    log(tmp_path, config, 0, {4: 6.0, 5: 7.0, 6: 8.0})
    # Resumed after step 4: what was told of later steps is told anew.
    log(tmp_path, config, 4, {5: 0.5}, evaluation=0.75)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(4, 6.0), (5, 0.5)]
    assert [(e.step, e.value) for e in read.Scalars("eval/rtd_auc")] == [(5, 0.75)]
    assert not {"train/rtd_loss", "eval/rtd_f1"} & set(read.Tags()["scalars"])


def test_wandb_gets_what_there_is_and_goes_on_under_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config, folder = RunConfig(wandb=True), tmp_path / "run"
    log(folder, config, 0, {4: 6.0, 6: 8.0})
    (first,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    identifier, settings, history = wandb_told(first)
    assert settings["run"] == {"seed": 5}
    losses = [(row["step"], row["train/loss"]) for row in history if "train/loss" in row]
    assert losses == [(4, 6.0), (6, 8.0)]
    log(folder, config, 4, {5: 0.5}, evaluation=0.75)
    (second,) = set(folder.glob("wandb/offline-run-*/run-*.wandb")) - {first}
    resumed, _, history = wandb_told(second)
    assert resumed == identifier
    assert [row.get("train/loss") for row in history] == [0.5, None]
    assert history[-1] == {"step": 5, "eval/rtd_auc": 0.75}


def test_a_mode_that_is_none_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with pytest.raises(UserError, match="Weights & Biases cannot start"):
        open_boards(RunConfig(wandb=True), tmp_path, 0, {})


def test_a_run_tells_it_all(tmp_path, text, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = tmp_path / "run"
    done = train(folder, "--steps", "6", "--run.wandb=true", *text)
    assert "wandb" not in done.stdout and "wandb" not in done.stderr
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    _, settings, history = wandb_told(file)
    assert settings["run"]["wandb"] is True and settings["model"]["hidden"] == 32
    records = read_records(folder / "metrics.jsonl")
    told = [row for row in history if "train/loss" in row]
    assert [row["train/loss"] for row in told] == [record["loss"] for record in records]
    assert all("train/tokens_per_s" in row for row in told)
