"""What the sharded engines send: weights to be gathered, gradients to be summed into parts.

Every product rounds its weight to ``run.precision`` first (`metro_ext.ops.linear`), so a matrix may
as well travel rounded: at half the bytes, and with the bits that it would have had. Vectors and the
relative bias are read in float32 and travel so; gradients are summed in float32. FSDP2's own
``MixedPrecisionPolicy(param_dtype=bfloat16)`` rounds vectors too, all that a layer holds or none of
it, and its gradients then lose what a parameter's several uses add up in float32.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from metro_ext.distributed import World


class _Buffers:
    """Half of FSDP2's interface for custom collectives: buffers as it allocates them by default."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class Gather(_Buffers):
    """Gathers a module's parameters, matrices in a narrower type.

    Args:
        sizes: of this rank's part of each parameter in the order of the buffer: (elements, whether
            it is rounded).
        dtype: what those are rounded to; float32: nothing is.
        world: counts what is sent.
    """

    def __init__(self, sizes: Sequence[tuple[int, bool]], dtype: torch.dtype, world: World):
        self._dtype, self._world = dtype, world
        self._parts: list[tuple[slice, bool]] = []
        start = 0
        for size, rounded in sizes:
            self._parts.append((slice(start, start + size), rounded))
            start += size
        self._elements = start

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        if self._dtype == torch.float32:
            self._world.traffic.part(output_tensor.nbytes, self._world.size)
            return _all_gather(output_tensor, input_tensor, group, async_op)
        assert input_tensor.numel() == self._elements, (input_tensor.numel(), self._elements)
        sent = self._pack(input_tensor)
        everyone = sent.new_empty(self._world.size, len(sent))
        _all_gather(everyone.view(-1), sent, group, False)
        self._world.traffic.part(everyone.nbytes, self._world.size)
        self._unpack(everyone, output_tensor.view(self._world.size, -1))
        return None

    def _pack(self, whole: Tensor) -> Tensor:
        """uint8: the float32 parts, then the rounded ones, to a multiple of four bytes."""
        kept = [whole[part].view(torch.uint8) for part, rounded in self._parts if not rounded]
        narrow = [whole[part].to(self._dtype).view(torch.uint8) for part, r in self._parts if r]
        size = sum(len(part) for part in (*kept, *narrow))
        return torch.cat([*kept, *narrow, whole.new_empty(-size % 4, dtype=torch.uint8)])

    def _unpack(self, everyone: Tensor, whole: Tensor) -> None:
        """The inverse of `_pack` for the ranks' rows; rounded parts are widened again."""
        start = 0
        for kind, dtype in ((False, torch.float32), (True, self._dtype)):
            for part, rounded in self._parts:
                if rounded == kind:
                    end = start + (part.stop - part.start) * dtype.itemsize
                    whole[:, part].copy_(everyone[:, start:end].view(dtype))
                    start = end


class Scatter(_Buffers):
    """Sums gradients into every rank's part, as FSDP2 does by default, and counts the bytes."""

    def __init__(self, world: World):
        self._world = world

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        self._world.traffic.part(input_tensor.nbytes, self._world.size)
        reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return reduce(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def _all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup, async_op: bool) -> Any:
    # torch renamed the function after 2.10.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(whole, part, group=group, async_op=async_op)


def own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that `fully_shard` gives a module, in the order of its buffers.

    Those of nested sharded modules are not among them; children come before their parents, and
    each parameter once.
    """
    seen: set[int] = set()

    def walk(one: nn.Module) -> Iterator[nn.Parameter]:
        for child in one.children():
            if not isinstance(child, FSDPModule):
                yield from walk(child)
        for parameter in one.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter

    yield from walk(module)
