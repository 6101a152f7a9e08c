"""The README and the documents: what they show runs, what they link is there, figures are measured.

Of a page's blocks, in their order and in one folder, lines of `sh` that begin with
`python -m metro_ext.` and whole `python` programs are run; commands of `console` are not, but must
be ones that could be. The tutorial has a test of its own.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import metro_ext
from metro_ext.config import load_config
from metro_ext.config_schema import FIELDS
from metro_ext.sample_text import sample_paths

ROOT = Path(__file__).parents[1]
DOCUMENTS = Path(metro_ext.__file__).parent / "docs"
PAGES = {"README.md": ROOT / "README.md"} | {
    path.name: path for path in sorted(DOCUMENTS.glob("*.md"))
}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
PLAYED = ["README.md", "training.md", "finetuning.md"]
RUN = "python -m metro_ext."


def blocks(name: str, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of a page's blocks."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXTS[name], re.DOTALL | re.MULTILINE)
    return [block for block in found if block[0] in languages]


def programs(name: str) -> list[list[str]]:
    """The command lines of what is run, without the interpreter."""
    found = []
    for language, text in blocks(name, "sh", "python"):
        if language == "python":
            found.append(["-c", text])
        else:
            lines = [line for line in text.splitlines() if line.startswith(RUN)]
            found += [shlex.split(line)[1:] for line in lines]
    return found


@pytest.fixture
def workplace(tmp_path, finished) -> Path:
    """A folder as a reader has it after the README's first command, with text of their own."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "default").symlink_to(finished)
    (tmp_path / "books").mkdir()
    train, valid = sample_paths()
    (tmp_path / "books" / "one.txt").write_bytes(train.read_bytes())
    shutil.copy(valid, tmp_path / "held-out.txt")
    return tmp_path


@pytest.mark.parametrize("name", PLAYED)
def test_what_a_page_shows_runs(name, workplace):
    assert programs(name)
    for words in programs(name):
        done = subprocess.run(
            [sys.executable, *words], cwd=workplace, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{words}\n{done.stderr}"
        assert done.stdout, words


def test_nothing_is_left_out():
    """Each page with something to run is played, but for those that have a test of their own."""
    shown = {name for name in TEXTS if programs(name)}
    assert shown == {*PLAYED, "tutorial.md"}
    assert sum(len(programs(name)) for name in PLAYED) >= 15


NOT_RUN = [
    shlex.split(line, comments=True)
    for name in TEXTS
    for _, text in blocks(name, "console")
    for line in text.splitlines()
]


@pytest.mark.parametrize("words", NOT_RUN, ids=" ".join)
def test_a_command_that_is_not_run_could_be(words):
    for word in words:
        if word.startswith(("bench/", ".ci/", "python_tests/")):
            assert (ROOT / word).exists(), word
    module = next((word for word in words if word.startswith("metro_ext.")), None)
    if module is None:
        return
    options = words[words.index(module) + 1 :]
    if module == "metro_ext.train":
        load_config(options)  # a UserError for what is unknown or out of range
        return
    path = DOCUMENTS.parent.joinpath(*module.split(".")[1:])
    path = path if path.is_dir() else path.with_suffix(".py")
    sources = path.rglob("*.py") if path.is_dir() else [path]
    source = "".join(file.read_text(encoding="utf-8") for file in sources)
    for option in options:
        assert not option.startswith("--") or f'"{option.partition("=")[0]}"' in source, option


def anchors(name: str) -> set[str]:
    """What a link to a heading ends in, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", TEXTS[name], flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    text = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        assert (PAGES[name].parent / path).exists(), target
        page = Path(path).name or name
        assert not anchor or anchor in anchors(page), target


def test_every_document_is_in_the_readme():
    for name in set(TEXTS) - {"README.md"}:
        assert f"(metro_ext/docs/{name})" in TEXTS["README.md"], name


def test_ci_finds_the_test_command():
    lines = [line for line in TEXTS["README.md"].splitlines() if line.endswith("&& pytest -n 2")]
    assert len(lines) == 1 and lines[0].startswith("python3 -m venv .venv && ")


# ---- Figures are those of the records, settings those of the code ----

STEPS = {
    "12 × 256, auxiliary": "step-bf16",
    "the same, float32": "step-fp32",
    "12 × 768, auxiliary": "step-base-512-bf16",
    "12 × 256, AVX2": "step-fp32-avx2",
    "the same, tcmalloc": "step-fp32-avx2-tcmalloc",
}
BOTH = "bf16 forward + backward"
OPERATORS = {
    "attention, learned bias": ("attention", f"attention 8x512x12x64 {BOTH}"),
    "the same, dropout": ("attention", f"attention 8x512x12x64 dropout 0.1 {BOTH}"),
    "bias + dropout": ("layer-norm", f"layer_norm 4096x768 bias + dropout + residual {BOTH}"),
    "GELU": ("gelu", f"bias_gelu 4096x3072 {BOTH}"),
    "RTD head": ("rtd-head", f"rtd_head 4096x768 {BOTH}"),
    "vocabulary head": ("vocab-head", f"vocab_head 614x768x65536 sampled {BOTH}"),
}


# Rows of kernels.md, of which some give the forward pass alone too.
KERNELS = {
    "attention | 8 × 512": ("attention", "attention 8x512x12x64 bf16"),
    "with dropout": ("attention", "attention 8x512x12x64 dropout 0.1 bf16"),
    "attention | 32 × 128": ("attention", "attention 32x128x4x64 bf16"),
    "bias + dropout": ("layer-norm", "layer_norm 4096x768 bias + dropout + residual bf16"),
    "GELU": ("gelu", "bias_gelu 4096x3072 bf16"),
    "vocabulary head": ("vocab-head", "vocab_head 614x768x65536 sampled bf16"),
    "RTD head": ("rtd-head", "rtd_head 4096x768 bf16"),
}


def row(start: str, page: str = "README.md") -> list[str]:
    (line,) = [one for one in TEXTS[page].splitlines() if one.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def record(name: str, case: str | None = None) -> dict:
    cases = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["cases"]
    (found,) = [one for one in cases if case in (None, one["name"])]
    return found


@pytest.mark.parametrize("start", STEPS)
def test_a_step_s_figures(start):
    found = record(STEPS[start])
    best = min(found["ratios"], key=found["ratios"].get)
    share, memory = found["floor_share"], found["peak_mb"]
    assert row(start)[1:] == [
        f"{found['ours']:.2f} s",
        f"{share:.0%}".replace("%", " %"),
        f"{found['peers'][best]:.2f} s ({found['ratios'][best]:.2f} ×)",
        f"{memory:.0f}; {found['peers_peak_mb'][best]:.0f}",
    ]


@pytest.mark.parametrize("start", OPERATORS)
def test_an_operator_s_figures(start):
    family, case = OPERATORS[start]
    found = record(f"ops-{family}", case)
    _, ms, share, peers = row(start)
    assert ms == f"{1e3 * found['ours']:.3g}" and share == f"{found['floor_share']:.0%}"
    said = re.findall(r"([\d.]+) ×", peers)
    assert said and set(said) <= {f"{ratio:.1f}" for ratio in found["ratios"].values()}


@pytest.mark.parametrize("start", KERNELS)
def test_a_kernel_s_shares(start):
    family, case = KERNELS[start]
    shares = {
        kind: f"{record(f'ops-{family}', f'{case} {kind}')['floor_share']:.0%}"[:-1] + " %"
        for kind in ("forward", "forward + backward")
    }
    said = row(start, "kernels.md")[-1]
    assert said in (
        shares["forward + backward"],
        f"{shares['forward + backward']} ({shares['forward']} forward)",
    )


def recipe_defaults() -> list[tuple[str, str]]:
    """(key, default as it is written) of the recipe's tables, where a row gives one value a key."""
    found = []
    for line in TEXTS["recipe.md"].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        keys = re.findall(r"`([\w.]+)`", cells[0])
        if not line.startswith("| `") or not keys or "." not in keys[0]:
            continue
        section = keys[0].partition(".")[0]
        keys = [key if "." in key else f"{section}.{key}" for key in keys]
        found += zip(keys, cells[1].split(", "), strict=False)
    return found


def test_the_recipe_s_defaults_are_those_of_the_code():
    compared = 0
    for key, said in recipe_defaults():
        default = FIELDS[key].default  # a KeyError: there is no such setting
        if re.fullmatch(r"[\d.e-]+|`\w+`", said):
            assert default == (said.strip("`") if said.startswith("`") else float(said)), key
            compared += 1
    assert compared >= 15
