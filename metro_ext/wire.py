"""What ranks send at an outer step: vectors added up over all, in float32 or in fewer bits.

With eight or four bits a value, each block of 128 values is rounded to whole multiples of a scale
of its own, the block's largest magnitude over 127 or 7, in bfloat16. A sum is then made of two
exchanges: every rank sends each other one its chunk of the vector, the owner of a chunk adds up
what it decodes, in float32, rounds the sum in the same way and sends it to all (Streaming DiLoCo,
arXiv 2501.18512, sends outer gradients of four bits). All decode the same bytes, so that all have
the same sum, bit for bit.

What rounding leaves out is not lost but sent later (error feedback, arXiv 1901.09847): each rank
adds to what it sends what it has not sent before, its residual; the owner of a chunk also keeps
there what the rounding of the sum left out. So the sums so far and the residuals of all ranks are
together the sum of all that was to be sent.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from metro_ext.distributed import World

BLOCK = 128  # values of one scale: 1/32 of the bytes of four-bit codes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BITS = {"int8": 8, "int4": 4}


def encode(values: Tensor, bits: int) -> Tensor:
    """Rounds every block of 128 values to codes of 8 or 4 bits and a scale.

    Args:
        values: float32 [..., n], n a multiple of 128.
        bits: 8, or 4: then of each two codes the first is in the lower half of a byte.

    Returns:
        uint8 [..., n bits / 8 + 2 n / 128]: codes, then scales. A block with a value that is not
        finite is decoded to such values.
    """
    blocks = values.unflatten(-1, (-1, BLOCK))
    most = 2 ** (bits - 1) - 1
    scales = (blocks.abs().amax(-1) / most).bfloat16()
    widths = scales.float().unsqueeze(-1)
    usable = widths.isfinite() & (widths > 0)
    codes = torch.where(usable, blocks / widths, 0).round_().clamp_(-most, most).flatten(-2)
    if bits == 8:
        packed = codes.to(torch.int8).view(torch.uint8)
    else:
        low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        packed = low | (high << 4)
    return torch.cat([packed, scales.view(torch.uint8)], -1)


def decode(sent: Tensor, bits: int) -> Tensor:
    """The inverse of `encode`, up to its rounding: float32 [..., n]."""
    blocks = sent.shape[-1] // encoded_bytes(BLOCK, bits)
    packed, scales = sent.split([blocks * BLOCK * bits // 8, 2 * blocks], -1)
    if bits == 8:
        codes = packed.contiguous().view(torch.int8).float()
    else:
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float() - 8
    widths = scales.contiguous().view(torch.bfloat16).float()
    return (codes.unflatten(-1, (-1, BLOCK)) * widths.unsqueeze(-1)).flatten(-2)


def encoded_bytes(values: int, bits: int) -> int:
    """Of `values` values, whole blocks of them."""
    return values * bits // 8 + 2 * (values // BLOCK)


def value_bytes(name: str) -> float:
    """Of a value on a wire of ``sync.wire``, with its share of the scale."""
    if name in DTYPES:
        return DTYPES[name].itemsize
    return encoded_bytes(BLOCK, BITS[name]) / BLOCK


class PlainWire:
    """Sums in a dtype, by all-reduce.

    Args:
        dtype: of what is sent.
        world: this rank among all.
    """

    def __init__(self, dtype: torch.dtype, world: World):
        self._dtype, self._world = dtype, world

    def sum(self, values: Sequence[Tensor]) -> None:
        """Sums every float32 tensor over the ranks, in place; all are on their way at once."""
        world = self._world
        sent = [value.to(self._dtype) for value in values]
        under_way = [dist.all_reduce(value, group=world.group, async_op=True) for value in sent]
        for value, whole, work in zip(values, sent, under_way, strict=True):
            work.wait()
            world.traffic.all_reduce(whole.nbytes, world.size)
            value.copy_(whole)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing is kept between two sums."""
        return {}


class RoundedWire:
    """Sums in 8 or 4 bits a value, with error feedback.

    Args:
        sizes: of the tensors that are summed, always the same and in this order.
        bits: 8 or 4.
        world: this rank among all.
        device: of the tensors.

    Attributes:
        residual: float32 [ranks × values of a chunk], the tensors one after another and zeros up
            to whole blocks for each rank: what this rank has yet to send.
    """

    def __init__(self, sizes: Sequence[int], bits: int, world: World, device: torch.device):
        self._bits, self._world, self._total = bits, world, sum(sizes)
        self._chunk = -(-self._total // (world.size * BLOCK)) * BLOCK
        self.residual = torch.zeros(world.size * self._chunk, device=device)

    def sum(self, values: Sequence[Tensor]) -> None:
        """Sums every float32 tensor over the ranks, in place; what is not finite stays so."""
        world, bits, sizes = self._world, self._bits, [value.numel() for value in values]
        for part, value in zip(self.residual[: self._total].split(sizes), values, strict=True):
            part.add_(value.view(-1))
        chunks = self.residual.view(world.size, self._chunk)
        sent = encode(chunks, bits)
        chunks.sub_(decode(sent, bits))
        own = decode(world.exchange(sent), bits).sum(0)
        whole = encode(own, bits)
        chunks[world.rank].add_(own - decode(whole, bits))
        sums = decode(world.stack(whole), bits).view(-1)
        for part, value in zip(sums[: self._total].split(sizes), values, strict=True):
            value.copy_(part.view_as(value))

    def tensors(self) -> dict[str, Tensor]:
        """What this rank keeps between two sums."""
        return {"residual": self.residual}


def wire(name: str, values: Mapping[str, Tensor], world: World) -> PlainWire | RoundedWire:
    """The wire of a name of ``sync.wire`` for tensors such as `values`."""
    if name in DTYPES:
        return PlainWire(DTYPES[name], world)
    sizes = [value.numel() for value in values.values()]
    device = next((value.device for value in values.values()), torch.device("cpu"))
    return RoundedWire(sizes, BITS[name], world, device)
