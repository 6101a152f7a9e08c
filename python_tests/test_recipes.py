"""The recipes load, keep the published settings, and are what the launch files name."""

import os
import re
import stat
import subprocess
import sys

import pytest

from metro_ext.config import differences, load_config
from metro_ext.config_schema import FIELDS
from metro_ext.plan import sized
from metro_ext.plan_memory import Layout, peak_memory
from metro_ext.plan_time import GPUS, usable_memory
from metro_ext.recipes import recipe_folder

FOLDER = recipe_folder()
SIZES = ("base", "base++", "large++", "xl", "xxl")
LAUNCH_FILES = ("single_node.sh", "slurm.sh", "kubernetes.yaml")
# What a recipe adds to its preset: where the text lies and how a step is spread.
OWN = {
    "data.train", "data.valid", "data.tokenizer", "run.tokens_per_batch", "run.accumulation",
    "run.device", "run.checkpoint_interval", "run.recompute", "parallel.mode",
}  # fmt: skip
# Learning rate, steps, clipping (0: none), vocabulary: as published for METRO's group; the rates
# of xl and xxl are large++'s.
PUBLISHED = {
    "base": (4e-4, 125_000, 0.0, 32_000),
    "base++": (2e-4, 2_000_000, 2.0, 128_000),
    "large++": (1e-4, 2_000_000, 2.0, 128_000),
    "xl": (1e-4, 2_000_000, 2.0, 128_000),
    "xxl": (1e-4, 2_000_000, 2.0, 128_000),
}


def test_there_is_one_recipe_a_size():
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_recipe_has_the_published_settings(size):
    config = load_config(toml_path=FOLDER / f"{size}.toml")
    assert config.preset == size
    assert set(differences(config, load_config(preset=size))) <= OWN
    optim, run = config.optim, config.run
    published = (optim.lr, run.steps, optim.clip_norm, config.data.vocab_size)
    assert published == PUBLISHED[size]
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.98, 1e-6)
    assert (optim.warmup_steps, optim.weight_decay) == (10_000, 0.01)
    assert run.tokens_per_batch * run.accumulation == 2048 * 512


@pytest.mark.parametrize(
    ("size", "few", "most"),
    [("base", 8, 8), ("base++", 8, 32), ("large++", 8, 64), ("xl", 8, 64), ("xxl", 256, 256)],
)
def test_a_recipe_fits_the_gpus_that_it_names(size, few, most):
    config = sized(load_config(toml_path=FOLDER / f"{size}.toml"))
    named = f"# {few} GPUs" if few == most else f"# {few} to {most} GPUs"
    assert named in (FOLDER / f"{size}.toml").read_text(encoding="utf-8")
    sequences = config.run.tokens_per_batch // config.model.sequence_length
    for gpus in (few, most):
        assert config.run.accumulation % gpus == 0
        layout = Layout(
            config.parallel.mode, gpus, config.run.recompute, sequences,
            config.run.accumulation // gpus,
        )  # fmt: skip
        memory = peak_memory(config.model, config.objective, config.run.precision, layout)
        assert memory.total < usable_memory(GPUS["a100-80g"])


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_launch_files_name_what_exists(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert "-m metro_ext.train" in text and "python -m metro_ext.recipes" in text
    for recipe in re.findall(r"\)/([\w+]+)\.toml", text):
        assert recipe in SIZES
    for key in re.findall(r"--([a-z]+\.[a-z_]+)", text):
        assert key in FIELDS, key
    launcher = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True
    ).stdout.replace("_", "-")
    command = text[text.index("torchrun \\" if "torchrun \\" in text else "exec torchrun") :]
    for option in re.findall(r" (--[a-z-]+) ", command[: command.index("-m metro_ext.train")]):
        assert option in launcher, option


@pytest.mark.parametrize("name", ["single_node.sh", "slurm.sh"])
def test_scripts_start_the_trainer(name, tmp_path):
    """With torchrun, srun and scontrol replaced by programs that show how they were called."""
    show = '#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n'
    for program, body in {
        "torchrun": show,
        "srun": '#!/bin/sh\n[ "$2" = --cpus-per-task=64 ] || exit 9\nshift 2\nexec "$@"\n',
        "scontrol": "#!/bin/sh\nprintf 'node1\\nnode2\\n'\n",
        "nvidia-smi": "#!/bin/sh\nprintf 'GPU 0\\nGPU 1\\n'\n",
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }.items():
        file = tmp_path / program
        file.write_text(body)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "64", "SLURM_JOB_ID": "1234567",
        "PYTHONPATH": str(FOLDER.parents[1]),  # the package under test, from any folder
    }  # fmt: skip
    done = subprocess.run(
        ["bash", FOLDER / name, "large++", "--run.steps=7"],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[words.index("--config") + 1] == str(FOLDER / "large++.toml")
    assert words[words.index("--nproc-per-node") + 1] == ("8" if name == "slurm.sh" else "2")
    if name == "slurm.sh":
        assert words[words.index("--rdzv-endpoint") + 1] == "node1:24567"
    options = words[words.index("metro_ext.train") + 1 :]
    assert "--run.steps=7" in options
    config = load_config(options[2:], toml_path=options[1])
    assert (config.run.steps, config.run.dir) == (7, "runs/large++")


def test_a_script_without_a_size_says_how_it_is_used(tmp_path):
    done = subprocess.run(["bash", FOLDER / "slurm.sh"], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: sbatch" in done.stderr


def test_kubernetes_file_asks_for_the_processes_it_starts():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    gpus = int(job["spec"]["nprocPerNode"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    config = load_config(toml_path=FOLDER / "xxl.toml")
    assert config.run.accumulation % (worker["replicas"] * gpus) == 0
    claimed = {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert claimed == {mount["name"] for mount in container["volumeMounts"]}
