"""Every operator names an argument that lies on another device than the rest.

A "meta" tensor among those on the CPU stands for the other device, so that no GPU is needed. The
dispatcher would send such a call to the fake kernel; it is handed to the CPU's.
"""

import pytest
import torch

from metro_ext import ops

CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
T, H, V, N = 6, 8, 12, 3


def f32(*shape):
    return torch.zeros(shape)


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


SEED = torch.tensor(1)
CU = torch.tensor([0, T], dtype=torch.int32)
QKV, BIAS, OUT, LSE = f32(T, 3, 2, H), f32(2, 2 * T - 1), f32(T, 2, H), f32(2, T)
TARGET, LABEL, DENOMINATORS = int64(1, 2, -100), torch.zeros(T, dtype=torch.uint8), f32(3) + 1
HIT = torch.zeros(N, dtype=torch.uint8)
WEIGHTS = (1.0, 50.0, 1.0)
# By operator, arguments that it accepts when all are on the CPU.
CALLS = {
    "bias_gelu": (f32(T, H), f32(H)),
    "bias_gelu_backward": (f32(T, H), f32(T, H), f32(H)),
    "bias_gelu_backward_": (f32(T, H), f32(T, H), f32(H)),
    "layer_norm": (f32(T, H), f32(H), f32(T, H), f32(H), f32(H), SEED, 0.1, 0, 1e-5),
    "layer_norm_backward": (f32(T, H), f32(T, H), f32(T), f32(T), f32(H), SEED, 0.1, 0),
    "attention": (QKV, CU, BIAS, T, SEED, 0.1, 0),
    "attention_backward": (OUT, QKV, OUT, LSE, CU, BIAS, T, SEED, 0.1, 0),
    "vocab_head": (f32(N, H), f32(V, H), f32(V), TARGET, SEED, 1.0, 0),
    "vocab_head_gradients": (f32(N, H), f32(V, H), f32(V), TARGET, SEED, 1.0, 0, f32(1), f32(V, H),
                             False),
    "rtd_head": (f32(T, H), f32(H), f32(1), LABEL),
    "rtd_head_backward": (f32(T), f32(T), f32(T, H), f32(H), LABEL),
    "mask_tokens": (int64(0, 5, 6, 7, 8, 2), int64(0, 1, 2, 3, 4), SEED, N, 4, V, 0.8, 0.1),
    "replace_tokens": (int64(0, 5, 6, 7, 8, 2), int64(1, 2, 0), int64(5, 6, -100),
                       int64(5, 6, 7), 1),
    "pretrain_loss": (f32(N), HIT, TARGET, f32(T), f32(T), LABEL, f32(N), HIT, TARGET,
                      DENOMINATORS, *WEIGHTS),
    "pretrain_loss_backward": (f32(), f32(12), TARGET, LABEL, TARGET, DENOMINATORS, *WEIGHTS),
}  # fmt: skip


def operators() -> dict[str, torch._ops.OpOverload]:
    assert ops._C  # registers them
    return {name: getattr(torch.ops.metro, name).default for name in CALLS}


def test_every_operator_is_here():
    page = torch._C._jit_get_all_schemas()
    assert {s.name.removeprefix("metro::") for s in page if s.name.startswith("metro::")} == set(
        CALLS
    )


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_on_another_device_is_named(name):
    operator, arguments = operators()[name], CALLS[name]
    operator(*arguments)
    names = [argument.name for argument in operator._schema.arguments]
    found = [i for i, value in enumerate(arguments) if isinstance(value, torch.Tensor)]
    for index in found:
        elsewhere = list(arguments)
        elsewhere[index] = arguments[index].to("meta")
        with pytest.raises(RuntimeError, match="must be on the device of") as error:
            operator.redispatch(CPU, *elsewhere)
        message = str(error.value)
        assert f"metro::{name}: " in message
        # The tensor that the rest is held against is named as such.
        assert names[index] in message or "another device), found cpu" in message, message
