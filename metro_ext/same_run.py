"""Whether a run's folder holds the run that is asked for: what a resume must find unchanged."""

from pathlib import Path
from typing import Any

from metro_ext.config import differences, from_dict
from metro_ext.config_schema import Config
from metro_ext.distributed import World
from metro_ext.errors import UserError
from metro_ext.prepare import Prepared

# Keys that change what a run reports, how long it is or who computes it, not what a step computes.
RESUMABLE_KEYS = {
    "parallel.backend",
    "parallel.mode",
    "parallel.timeout",
    "run.async_save",
    "run.checkpoint_interval",
    "run.dir",
    "run.eval_batches",
    "run.eval_interval",
    "run.graph",
    "run.hang_timeout",
    "run.keep_checkpoints",
    "run.log_interval",
    "run.max_skipped",
    "run.recompute",
    "run.steps",
    "run.tensorboard",
    "run.wandb",
}


def check_same_run(
    folder: Path, state: dict[str, Any], config: Config, world: World, prepared: Prepared
) -> None:
    """Compares a run with the state of a checkpoint.

    Args:
        folder: of the run.
        state: of the checkpoint, as `metro_ext.trainer` writes it.

    Raises:
        UserError: settings that change what a step computes, the tokenizer or a corpus differ,
            or relaxed ranks are not as many.
    """
    changed = [
        key for key in differences(from_dict(state["config"]), config) if key not in RESUMABLE_KEYS
    ]
    if changed:
        raise UserError(
            f"{folder} holds a run with another configuration ({', '.join(changed)} "
            f"differ); give the same options to resume it (--config {folder}/config.toml "
            "has them), or another --run folder"
        )
    if config.sync.mode == "relaxed" and state["ranks"] != world.size:
        raise UserError(
            f"{folder} holds a run of {state['ranks']} ranks that train apart "
            f"(sync.mode=relaxed); resume it on as many, found {world.size}"
        )
    if state["tokenizer_sha256"] != prepared.tokenizer.sha256:
        raise UserError(f"{folder} holds a run with another tokenizer")
    recorded = state.get("corpora", {})  # older checkpoints have none
    for name, corpus in prepared.corpora():
        if recorded.get(name, corpus.sha256) != corpus.sha256:
            raise UserError(
                f"{folder} holds a run on another data.{name} than the corpus "
                f"{corpus.folder} is now; give the same text, or another --run folder"
            )
