"""What this installation is and which kernels will run: ``python -m metro_ext.info``."""

import platform

import torch

import metro_ext
from metro_ext.command_line import run
from metro_ext.ops import _C


def report() -> str:
    """Version, build, devices and kernels, a line each."""
    build = _C.build_info()
    cuda = "no CUDA kernels in this build"
    if build["cuda_version"]:
        cuda = (
            f"CUDA {build['cuda_version']} for {build['cuda_architectures']} "
            f"({', '.join(build['cuda_operators'])})"
        )
    lines = [
        ("metro_ext", f"{metro_ext.__version__} (binary {build['version']})"),
        ("built", f"GCC {build['compiler']}, torch {build['torch_built_against']}"),
        ("flags", f"{build['flags']}, and those of each instruction set"),
        ("loads in", f"torch >= {build['torch_target']} (LibTorch stable ABI)"),
        ("kernels", f"CPU portable, AVX2, AVX-512, AVX-512 BF16; {cuda}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("python", f"{platform.python_version()} on {platform.machine()}"),
        ("cpu", f"{torch.get_num_threads()} threads, runs the {_C.cpu_isa()} kernels"),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        memory = properties.total_memory / 2**30
        use = "runs the CUDA kernels" if build["cuda_version"] else "unused: no CUDA kernels"
        lines.append((f"cuda:{index}", f"{properties.name}, {capability}, {memory:.0f} GiB, {use}"))
    if not torch.cuda.is_available():
        lines.append(("cuda", "no device: everything runs on the CPU"))
    return "\n".join(f"{name:<10} {value}" for name, value in lines)


def main() -> None:
    print(report())


if __name__ == "__main__":
    run(main)
