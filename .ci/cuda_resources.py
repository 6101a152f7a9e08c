"""Compiles every CUDA kernel for every target and fails on spills to local memory."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGETS = ["sm_80", "sm_90a"]
FUNCTION = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")


def compile_for(source: Path, target: str) -> list[tuple[str, int, int]]:
    """(kernel, registers, spilled bytes) of each kernel in a source."""
    command = ["nvcc", "-std=c++20", "-O3", f"-arch={target}", "-I", str(ROOT / "csrc"), "-cubin",
               "-Xptxas=-v", "-o", "/dev/null", str(source)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    kernels, name, spilled = [], "", 0
    for line in done.stderr.splitlines():
        if match := FUNCTION.search(line):
            name = match[1]
        elif match := SPILLS.search(line):
            spilled = int(match[2]) + int(match[3])
        elif match := USED.search(line):
            kernels.append((name, int(match[1]), spilled))
    return kernels


def main() -> None:
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    if not sources:
        sys.exit("no CUDA sources found")
    spills = 0
    for target in TARGETS:
        for source in sources:
            kernels = compile_for(source, target)
            if not kernels:
                sys.exit(f"{source}: no kernels found for {target}")
            most = max(registers for _, registers, _ in kernels)
            print(f"{target}  {source.name}: {len(kernels)} kernels, at most {most} registers")
            for name, registers, spilled in kernels:
                if spilled:
                    print(f"  {name}: {spilled} bytes spilled, {registers} registers")
                    spills += 1
    if spills:
        sys.exit(f"{spills} kernels spill registers")


if __name__ == "__main__":
    main()
