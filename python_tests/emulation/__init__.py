"""Runs the CUDA kernels without a GPU: the very ``csrc/**/*_cuda.cu``, compiled by g++.

The headers here stand in for CUDA's. Every CUDA thread is a fibre; a block's threads run until they
wait (barriers, warp operations), so that a divergent barrier, or a shuffle whose mask names a lane
that never arrives, is an error with a message. Shared memory is spoiled with NaNs before each block
(static arrays of kernel templates excepted), ``cp.async`` lands only in the wait for its group, and
everything runs under AddressSanitizer and UndefinedBehaviorSanitizer. Not shown: races that neither
order of the threads exposes (``order="reverse"`` runs them the other way round: results must not
change), weak memory ordering, and speed.

To add an operator family:

1. ``entries/<family>.cpp``: a METRO_ENTRY for each launcher, which fills its parameter struct from
   the arguments' names (see ``entries/gelu.cpp``);
2. a test: ``kernels = emulated("gelu")``, then
   ``kernels.run("bias_gelu", x=x, bias=bias, out=torch.empty_like(x), rows=7, cols=5,
   dtype=x.dtype)``, which returns the tensors after the call by name. A tensor for the kernel to
   write is filled with NaN bytes first if its name stands in ``written``.

Kernels must be launched through ``metro::cuda::launch``, take dynamic shared memory from
``metro::cuda::dynamic_shared``, declare static shared memory inside kernels of an unnamed
namespace, and reach PTX only through ``csrc/common/cuda_mma.cuh``.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # metro::DType
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all",
              "-fsanitize-sections=metro_shared"]  # fmt: skip
FLAGS = ["-std=c++20", "-g", "-DMETRO_EMULATE_CUDA", "-Wno-unknown-pragmas", "-Wno-attributes"]


class EmulationError(Exception):
    """The kernel did what no kernel may do; the message is the emulator's or the sanitizer's."""


@cache
def cuda_include() -> Path | None:
    """The toolkit's headers, from where nvcc says it takes them."""
    if shutil.which("nvcc") is None or shutil.which("g++") is None:
        return None
    command = ["nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"]
    output = subprocess.run(command, capture_output=True, text=True).stderr
    folders = re.findall(r'-I"?([^"\s]+/include)', output)
    return next((Path(f) for f in folders if (Path(f) / "cuda_bf16.h").exists()), None)


def _compile(flags: list[str], source: Path, folder: Path) -> Path:
    """An object file, kept by the hash of the preprocessed source, the flags and the compiler."""
    command = ["g++", *FLAGS, *flags, "-I", str(HERE.parent / "emulation"), "-I", str(HERE.parent),
               "-I", str(ROOT / "csrc"), "-isystem", str(cuda_include()),
               "-x", "c++", str(source)]  # fmt: skip
    text = subprocess.run([*command, "-E"], capture_output=True, text=True)
    if text.returncode:
        raise EmulationError(text.stderr)
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\n".join([version, *command, text.stdout]).encode()).hexdigest()[:24]
    target = folder / f"{source.stem}-{key}.o"
    if not target.exists():
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".o") as half:
            done = subprocess.run([*command, "-c", "-o", half.name], capture_output=True, text=True)
            if done.returncode:
                raise EmulationError(done.stderr)
            shutil.copy(half.name, f"{target}.{os.getpid()}")
        os.replace(f"{target}.{os.getpid()}", target)
    return target


class Kernels:
    """A family's launchers in a test executable of their own."""

    def __init__(self, sources: list[Path]):
        folder = ROOT / "build" / "emulation"
        folder.mkdir(parents=True, exist_ok=True)
        runtime = [HERE / "scheduler.cpp", HERE / "runtime.cpp"]
        objects = [_compile(["-O2", "-DMETRO_FIBER_HOOKS"], source, folder) for source in runtime]
        objects += [_compile(["-O1", *SANITIZERS], source, folder) for source in sources]
        key = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:24]
        self.binary = folder / f"{sources[0].stem}-{key}"
        if not self.binary.exists():
            half = f"{self.binary}.{os.getpid()}"
            command = ["g++", *SANITIZERS, "-o", half, *map(str, objects)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise EmulationError(done.stderr)
            os.replace(half, self.binary)

    def run(
        self,
        entry: str,
        *,
        written: tuple[str, ...] = (),
        order: str = "forward",
        shared_bytes: int = 163 << 10,
        **arguments: Tensor | int | float | torch.dtype | None,
    ) -> dict[str, Tensor]:
        """Calls a launcher and returns the tensors as it left them.

        Args:
            entry: the name in METRO_ENTRY.
            written: tensors to fill with NaN bytes before the call.
            order: ``"forward"`` or ``"reverse"``, in which threads and blocks run.
            shared_bytes: the most that the device gives a block (sm_80's; sm_86 has 99 << 10).
            arguments: tensors (contiguous, on the CPU), numbers, ``dtype`` for metro::DType.

        Raises:
            EmulationError: the kernel, or the launcher, failed.
        """
        with tempfile.TemporaryDirectory() as name:
            folder, lines = Path(name), []
            for key, value in arguments.items():
                if isinstance(value, torch.dtype):
                    lines.append(f"number {key} {DTYPES[value]}")
                elif isinstance(value, Tensor):
                    raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
                    data = b"\xff" * raw.size if key in written else raw.tobytes()
                    (folder / f"{key}.bin").write_bytes(data)
                    lines.append(f"tensor {key} {len(data)}")
                else:
                    lines.append(f"none {key} 0" if value is None else f"number {key} {value!r}")
            (folder / "arguments.txt").write_text("\n".join(lines) + "\n")
            environment = os.environ | {
                "METRO_EMULATION_ORDER": order,
                "METRO_EMULATION_SHARED_BYTES": str(shared_bytes),
            }
            done = subprocess.run([self.binary, entry, name], capture_output=True, text=True,
                                  errors="replace", env=environment)  # fmt: skip
            if done.returncode:
                raise EmulationError(f"{entry}: exit status {done.returncode}\n{done.stderr}")
            return {
                key: torch.frombuffer(bytearray((folder / f"{key}.bin").read_bytes()),
                                      dtype=value.dtype).reshape(value.shape)
                if value.numel() else value.clone()
                for key, value in arguments.items() if isinstance(value, Tensor)
            }  # fmt: skip


@cache
def _kernels(*sources: Path) -> Kernels:
    return Kernels(list(sources))


def emulated(family: str) -> Kernels:
    """The compiled kernels of ``csrc/<family>``; skips the test where they cannot be compiled."""
    sources = sorted((ROOT / "csrc" / family).glob("*_cuda.cu"))
    return emulated_sources(*sources, HERE / "entries" / f"{family}.cpp")


def emulated_sources(*sources: Path) -> Kernels:
    if cuda_include() is None:
        pytest.skip("needs g++ and the headers of a CUDA toolkit (nvcc is not installed)")
    return _kernels(*sources)
