"""One binary registers every operator, for the CPU and, built with nvcc, for CUDA in any torch."""

import pytest
import torch

import metro_ext.ops
from metro_ext import _C

OPERATORS = sorted(
    name.removeprefix("metro::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("metro::")
)


def has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"metro::{operator}", key)


def test_every_public_operator_is_registered():
    public = {"attention", "bias_gelu", "layer_norm", "rtd_head", "vocab_head", "mask_tokens"}
    public |= {"replace_tokens", "pretrain_loss"}
    assert public <= set(metro_ext.ops.__all__)
    assert public <= set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_are_registered_whatever_torch_was_built_for(operator):
    assert has_kernel(operator, "CPU")
    assert has_kernel(operator, "Meta"), "no fake kernel"
    # Without nvcc a CUDA kernel is there too: the one that says how to build the others.
    assert has_kernel(operator, "CUDA")


def test_the_build_tells_what_it_holds():
    build = _C.build_info()
    assert build["torch_target"] == "2.10"
    assert "-ffp-contract=off" in build["flags"].split()
    assert bool(build["cuda_version"]) == bool(build["cuda_operators"])
