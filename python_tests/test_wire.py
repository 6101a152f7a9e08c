"""Rounded sums over ranks: by hand, against simulated ranks, and what rounding leaves out."""

import os

import pytest
import torch
from test_distributed import free_port

from metro_ext.distributed import World, connect, disconnect
from metro_ext.wire import BLOCK, RoundedWire, decode, encode

SHAPES = [(5, 3), (7,), (40, 11), ()]  # 463 values: no whole block for each of 2 or 3 ranks
SIZES = [torch.Size(shape).numel() for shape in SHAPES]
ROUNDS = 5


def moved(rank: int, turn: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * turn + rank)
    return [torch.randn(shape, generator=generator) * 10.0**-rank for shape in SHAPES]


def block(*first: float) -> torch.Tensor:
    values = torch.zeros(BLOCK)
    values[: len(first)] = torch.tensor(first)
    return values


def test_eight_bits_by_hand():
    """A largest magnitude of 127 is a scale of 1: 2.5 is rounded to even, -3.4 to -3."""
    sent = encode(block(127, 2.5, -3.4, -127, 3.5), 8)
    assert sent.dtype == torch.uint8 and len(sent) == BLOCK + 2
    assert sent[:6].tolist() == [127, 2, 256 - 3, 256 - 127, 4, 0]
    assert sent[-2:].view(torch.bfloat16).item() == 1
    assert torch.equal(decode(sent, 8), block(127, 2, -3, -127, 4))


def test_four_bits_by_hand():
    """A largest magnitude of 3.5 is a scale of 0.5; codes are sent plus 8, the first one low."""
    sent = encode(block(-3.5, 1.0, 0.7, -0.2), 4)
    assert len(sent) == BLOCK // 2 + 2
    assert sent[:3].tolist() == [(8 - 7) + 16 * (8 + 2), (8 + 1) + 16 * 8, 8 + 16 * 8]
    assert torch.equal(decode(sent, 4), block(-3.5, 1.0, 0.5, 0.0))


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_have_scales_of_their_own(bits):
    values = torch.stack([block(1e-6, 5e-7), block(0.0), block(3e4, -1.0)]).view(1, -1)
    found = decode(encode(values.repeat(2, 1), bits), bits)
    assert found.shape == (2, 3 * BLOCK) and torch.equal(found[0], found[1])
    most = 2 ** (bits - 1) - 1
    # Half a scale, and of a scale in bfloat16 half a unit in its last place times the code.
    for one, part in zip(values.view(3, -1), found[0].view(3, -1), strict=True):
        scale = float(one.abs().max()) / most
        assert float((one - part).abs().max()) <= scale * (0.5 + most * 2**-8)
    assert not found[0, BLOCK : 2 * BLOCK].any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_block_so_and_no_other(bits, bad):
    values = torch.ones(3 * BLOCK)
    values[BLOCK + 5] = bad
    finite = decode(encode(values, bits), bits).isfinite().view(3, BLOCK).all(1)
    assert finite.tolist() == [True, False, True]


def rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Every block to multiples of its scale, in float64 but for the bfloat16 of the scale."""
    blocks = values.view(-1, BLOCK).double()
    most = 2 ** (bits - 1) - 1
    scales = (values.view(-1, BLOCK).abs().amax(1, keepdim=True) / most).bfloat16().double()
    codes = torch.where(scales > 0, blocks / scales.clamp_min(1e-300), 0).round().clamp(-most, most)
    return (codes * scales).flatten()


def simulate(ranks: int, bits: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(the sum of each turn, the residual of each rank) of ranks taken in turn."""
    chunk = -(-sum(SIZES) // (ranks * BLOCK)) * BLOCK
    residuals = [torch.zeros(ranks * chunk, dtype=torch.float64) for _ in range(ranks)]
    sums = []
    for turn in range(ROUNDS):
        sent = []
        for rank, residual in enumerate(residuals):
            own = torch.cat([value.flatten() for value in moved(rank, turn)])
            residual[: len(own)] += own
            sent.append(rounded(residual.float(), bits))
            residual -= sent[-1]
        total = torch.stack(sent).sum(0)
        whole = rounded(total.float(), bits)
        for rank, residual in enumerate(residuals):
            part = slice(rank * chunk, (rank + 1) * chunk)
            residual[part] += (total - whole)[part]
        sums.append(whole[: sum(SIZES)])
    return sums, residuals


def exchange(rank: int, ranks: int, bits: int, port: int, results) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    world = connect("gloo", 60)
    wire = RoundedWire(SIZES, bits, world, torch.device("cpu"))
    sums = []
    for turn in range(ROUNDS):
        values = moved(rank, turn)
        wire.sum(values)
        sums.append(torch.cat([value.flatten() for value in values]).tolist())
    found = rank, world.traffic.sent, sums, wire.residual.tolist()
    values = moved(rank, ROUNDS)
    if rank == 1:
        values[0][2, 1] = float("nan")
    wire.sum(values)
    results.put((*found, [bool(value.isfinite().all()) for value in values]))
    disconnect()


@pytest.fixture(scope="module", params=[(2, 8), (3, 4)], ids=["2-int8", "3-int4"])
def exchanged(request):
    """(ranks, bits, what each rank sent, its sums by turn, its residual)."""
    ranks, bits = request.param
    context = torch.multiprocessing.get_context("spawn")
    results, port = context.SimpleQueue(), free_port()
    processes = [
        context.Process(target=exchange, args=(rank, ranks, bits, port, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = sorted((results.get() for _ in processes), key=lambda one: one[0])
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    _, sent, sums, residuals, finite = zip(*found, strict=True)
    assert all(one == finite[0] and not one[0] for one in finite)  # every rank knows of rank 1's
    return ranks, bits, sent, torch.tensor(sums), torch.tensor(residuals)


def test_ranks_agree_bit_for_bit_and_with_a_simulation(exchanged):
    ranks, bits, _, sums, residuals = exchanged
    assert all(torch.equal(one, sums[0]) for one in sums)
    expected, left = simulate(ranks, bits)
    torch.testing.assert_close(sums[0], torch.stack(expected).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(residuals, torch.stack(left).float(), rtol=1e-5, atol=1e-6)


def test_nothing_is_lost(exchanged):
    """The sums and what is left over are together all that was to be sent."""
    ranks, _, _, sums, residuals = exchanged
    everything = sum(
        torch.cat([value.flatten() for value in moved(rank, turn)]).double()
        for rank in range(ranks)
        for turn in range(ROUNDS)
    )
    found = sums[0].double().sum(0) + residuals.double().sum(0)[: len(everything)]
    torch.testing.assert_close(found, everything, rtol=0, atol=1e-5)
    assert not residuals[:, sum(SIZES) :].any()


def test_bytes_are_those_of_codes_and_scales(exchanged):
    """463 values: 2 chunks of 256, or 3 of 256; each is sent to the others and gathered."""
    ranks, bits, sent, _, _ = exchanged
    chunk = 256 * bits // 8 + 2 * 2
    assert set(sent) == {ROUNDS * 2 * (ranks - 1) * chunk}


def test_one_rank_rounds_twice_and_keeps_the_rest():
    wire = RoundedWire([3], 4, World(), torch.device("cpu"))
    values = [torch.tensor([7.0, 0.4, -2.6])]
    wire.sum(values)
    assert values[0].tolist() == [7, 0, -3]
    torch.testing.assert_close(wire.residual[:3], torch.tensor([0, 0.4, 0.4]))
