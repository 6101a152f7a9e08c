"""Launch recipes: the paper's settings a size (`*.toml`) and how to start them on a cluster."""

from importlib import resources
from pathlib import Path


def recipe_folder() -> Path:
    """Where the recipes lie: `SIZE.toml`, `single_node.sh`, `slurm.sh` and `kubernetes.yaml`."""
    return Path(str(resources.files(__name__)))
