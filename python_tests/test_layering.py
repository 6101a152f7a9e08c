"""The package's parts import only what stands to their left, so that none grows into its users."""

import ast
from pathlib import Path

import metro_ext

PACKAGE = Path(metro_ext.__file__).parent

# One direction: a module may import modules of earlier rows (and of its own row, where listed).
LAYERS = [
    {"errors", "atomic", "sample_text", "recipes", "guards", "health", "progress"},
    {"command_line", "ops", "config_schema", "zstd_files", "parquet_files", "progress_live"},
    {"text_files", "checkpoint_parts", "boards"},
    {"records", "monitor"},
    {"tokenizer", "presets", "checkpoint", "info", "distributed", "hardware", "cuda_graph"},
    {"corpus_format", "corpus_plan", "config", "model", "plot", "tokenizer_json", "made_from"},
    {"word_encoder", "mixture", "saver"},
    {"corpus_parts"},
    {"corpus_shards", "corpus_dedup"},
    {"corpus_workers"},
    {"corpus_build"},
    {"corpus"},
    {"batches", "prepare"},
    {"objective", "optim", "mpnet", "products", "shard_exchange", "text_encoder", "hf", "wire"},
    {"sentence_files"},
    {"held_out", "pretrained", "onnx_export", "parallel", "plan_memory", "relaxed"},
    {"tally", "same_run"},
    {"train_step", "training_state"},
    {"plan_time", "trainer", "inspect", "export", "evaluate"},
    {"import_mpnet", "plan", "train", "finetune", "replay"},
    {"report"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports: "metro_ext.ops.gelu" counts as "ops"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "metro_ext":
                names = [f"metro_ext.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name and name.startswith("metro_ext.")}
    return found - {"_C"}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_its_place():
    modules = {module_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert modules == set(RANK), modules ^ set(RANK)


def test_no_import_goes_upward():
    upward = []
    for path in PACKAGE.rglob("*.py"):
        module = module_of(path)
        if module == "__init__":
            continue  # re-exports, on call
        for imported in imports(path) - {module}:
            if RANK.get(imported, 0) >= RANK[module]:
                upward.append(f"{module} imports {imported}")
    assert not upward, upward


def test_the_check_sees_an_upward_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from metro_ext.train import main\nimport metro_ext.ops.gelu\n")
    assert imports(file) == {"train", "ops"}


def test_kernels_know_no_python_package_and_only_glue_sees_torch():
    csrc = Path(__file__).parents[1] / "csrc"
    for path in csrc.rglob("*"):
        if path.suffix in {".cpp", ".cu", ".h", ".cuh"} and not (
            path.name.endswith("_op.cpp") or path.parent.name == "common" or path.parent == csrc
        ):
            assert "torch/csrc" not in path.read_text(), path
