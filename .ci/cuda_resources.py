"""Static evidence about the CUDA kernels: what each needs on each target, held to a table.

    python .ci/cuda_resources.py            compile, compare with the table, fail where it got worse
    python .ci/cuda_resources.py --update   compile and write the table

Needs nvcc, c++filt (binutils) and nvdisasm (of the CUDA toolkit or `pip install
nvidia-cuda-nvdisasm`); no GPU. The table, bench/results/cuda_resources.json, has for each kernel
and target: registers a thread; bytes of static shared memory a block, of stack frame and of spilled
registers (stores + loads) a thread; and the number of tensor-core instructions in the disassembly.
Dynamic shared memory is the launch's choice and not seen here. A spill is intended only where the
kernel's row carries a ``spill_reason``, written by hand; --update keeps it.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "bench" / "results" / "cuda_resources.json"
TARGETS = ("sm_80", "sm_90a")
JOBS = 2
# Less than this is the compiler's mood; what costs occupancy is far more.
REGISTER_SLACK = 1.10
UPDATE = "if that is intended: python .ci/cuda_resources.py --update, and commit the table"
REASON = "spill_reason"

FUNCTION = re.compile(r"Compiling entry function '(\S+)' for")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
SECTION = re.compile(r"^\.text\.(\S+):")
# mma.sync (HMMA and its integer, 8-bit and double kin) and wgmma (HGMMA and kin).
TENSOR_CORE = re.compile(r"\s(?:[HIDQB]MMA|[HIQB]GMMA)\b")

Row = dict[str, int]
Kernels = dict[str, dict]  # kernel -> target -> Row, and perhaps REASON


def ptxas_rows(log: str) -> dict[str, Row]:
    """What ``ptxas -v`` reports, by mangled name."""
    rows: dict[str, Row] = {}
    name, stack, spill = "", 0, 0
    for line in log.splitlines():
        if match := FUNCTION.search(line):
            name, stack, spill = match[1], 0, 0
        elif match := FRAME.search(line):
            stack, spill = int(match[1]), int(match[2]) + int(match[3])
        elif match := USED.search(line):
            shared = SHARED.search(line)
            rows[name] = {
                "registers": int(match[1]),
                "shared_bytes": int(shared[1]) if shared else 0,
                "stack_bytes": stack,
                "spill_bytes": spill,
            }
    return rows


def tensor_core_counts(disassembly: str) -> Counter[str]:
    """Tensor-core instructions of nvdisasm's text, by mangled name."""
    counts: Counter[str] = Counter()
    name = ""
    for line in disassembly.splitlines():
        if match := SECTION.match(line):
            name = match[1]
        elif TENSOR_CORE.search(line):
            counts[name] += 1
    return counts


def readable(demangled: str) -> str:
    """``grad_key_kernel<float, 96>`` of a demangled signature."""
    name = demangled.replace("(anonymous namespace)::", "").replace("metro::", "")
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and place:
            name = name[:place]
            break
    name = re.sub(r"\((?:int|bool|unsigned int|[\w ]+)\)(?=\d)", "", name)  # (int)96 -> 96
    return name.removeprefix("void ").strip()


def run(command: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done


def nvdisasm() -> str:
    """Path of the disassembler: of the toolkit, else of the PyPI package."""
    if found := shutil.which("nvdisasm"):
        return found
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvdisasm":
            return str(file.locate())
    raise SystemExit("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")


def compile_for(source: Path, target: str, disassembler: str) -> dict[str, Row]:
    """Rows of every kernel of a source, by ``file/kernel``."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernels.cubin")
        log = run(
            ["nvcc", "-std=c++20", "-O3", f"-arch={target}", "-I", str(ROOT / "csrc"), "-cubin",
             "-Xptxas=-v", "-o", cubin, str(source)]
        ).stderr  # fmt: skip
        tensor_core = tensor_core_counts(run([disassembler, "-c", cubin]).stdout)
    rows = ptxas_rows(log)
    if not rows:
        raise SystemExit(f"{source}: no kernels found for {target}")
    names = run(["c++filt", *rows]).stdout.splitlines()
    stem = source.stem.removesuffix("_cuda")
    result: dict[str, Row] = {}
    for mangled, demangled in zip(rows, names, strict=True):
        key = f"{stem}/{readable(demangled)}"
        if key in result:
            raise SystemExit(f"{source}: two kernels read {key}; give one another name")
        result[key] = rows[mangled] | {"tensor_core": tensor_core[mangled]}
    return result


def measure(sources: list[Path]) -> Kernels:
    disassembler = nvdisasm()
    pairs = [(source, target) for source in sources for target in TARGETS]
    kernels: Kernels = {}
    with ThreadPoolExecutor(JOBS) as pool:
        results = pool.map(lambda pair: compile_for(*pair, disassembler), pairs)
        for (source, target), rows in zip(pairs, results, strict=True):
            most = max(row["registers"] for row in rows.values())
            tensor = sum(row["tensor_core"] > 0 for row in rows.values())
            print(f"{target:<7} {source.name}: {len(rows)} kernels, at most {most} registers, "
                  f"{tensor} on tensor cores", flush=True)  # fmt: skip
            for name, row in rows.items():
                kernels.setdefault(name, {})[target] = row
    return dict(sorted(kernels.items()))


def unintended_spills(kernels: Kernels) -> list[str]:
    return [
        f"{name} {target}: {row['spill_bytes']} bytes spilled, and no {REASON}"
        for name, targets in kernels.items()
        for target, row in targets.items()
        if target != REASON and row["spill_bytes"] and not targets.get(REASON)
    ]


def regressions(committed: dict, kernels: Kernels, nvcc: str) -> list[str]:
    """A sentence for each thing that is worse than in the table.

    Registers and stack are the compiler's choice: they are compared under the table's nvcc only.
    """
    table: Kernels = committed["kernels"]
    found = [f"{name}: in the table, but no longer compiled" for name in table.keys() - kernels]
    for name, targets in kernels.items():
        if name not in table:
            found.append(f"{name}: not in the table")
            continue
        for target, row in targets.items():
            before = table[name].get(target)
            if before is None:
                found.append(f"{name} {target}: not in the table")
            else:
                same_nvcc = nvcc == committed["nvcc"]
                found += [f"{name} {target}: {text}" for text in worse(before, row, same_nvcc)]
    with_reasons = {
        name: targets | {REASON: table.get(name, {}).get(REASON)}
        for name, targets in kernels.items()
    }
    return sorted(found) + unintended_spills(with_reasons)


def worse(before: Row, now: Row, same_nvcc: bool) -> list[str]:
    def change(key: str) -> str:
        return f"{before[key]} -> {now[key]}"

    found = []
    if now["spill_bytes"] > before["spill_bytes"]:
        found.append(f"spilled bytes {change('spill_bytes')}")
    if before["tensor_core"] and not now["tensor_core"]:
        found.append(f"tensor-core instructions {change('tensor_core')}")
    if same_nvcc and now["registers"] > REGISTER_SLACK * before["registers"]:
        found.append(f"registers {change('registers')}")
    if same_nvcc and now["stack_bytes"] > before["stack_bytes"]:
        found.append(f"stack frame {change('stack_bytes')}")
    return found


def text_of(nvcc: str, kernels: Kernels) -> str:
    """The table as JSON with a line a kernel and target, so that a change reads as one."""
    blocks = []
    for name, targets in kernels.items():
        lines = [f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in targets.items()]
        blocks.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    head = f'{{\n "script": "cuda_resources",\n "nvcc": {json.dumps(nvcc)},\n "kernels": {{\n'
    return head + ",\n".join(blocks) + "\n }\n}\n"


def nvcc_version() -> str:
    match = re.search(r"V(\d+\.\d+\.\d+)", run(["nvcc", "--version"]).stdout)
    return match[1] if match else "unknown"


def update(kernels: Kernels, nvcc: str) -> None:
    before = json.loads(TABLE.read_text())["kernels"] if TABLE.exists() else {}
    for name, targets in kernels.items():
        spills = any(row["spill_bytes"] for row in targets.values())
        if spills and (reason := before.get(name, {}).get(REASON)):
            targets[REASON] = reason
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    partial = TABLE.with_suffix(".partial")
    partial.write_text(text_of(nvcc, kernels))
    partial.replace(TABLE)
    print(f"written to {TABLE.relative_to(ROOT)}")
    if found := unintended_spills(kernels):
        raise SystemExit("\n".join(found) + f"\nmend them, or write a {REASON} into the table")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare what the CUDA kernels need on each target with the committed table."
    )
    parser.add_argument("--update", action="store_true", help="write the table")
    options = parser.parse_args()
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    if not sources:
        raise SystemExit("no CUDA sources found")
    if not options.update and not TABLE.exists():
        raise SystemExit(f"{TABLE} is missing; make it with --update")
    nvcc, kernels = nvcc_version(), measure(sources)
    if options.update:
        update(kernels, nvcc)
        return
    committed = json.loads(TABLE.read_text())
    if nvcc != committed["nvcc"]:
        print(f"nvcc is {nvcc}, the table's {committed['nvcc']}: registers are not compared")
    if found := regressions(committed, kernels, nvcc):
        raise SystemExit("\n".join([*found, UPDATE]))
    print(f"{len(kernels)} kernels on {', '.join(TARGETS)}: none worse than in the table")


if __name__ == "__main__":
    sys.exit(main())
