"""The emulator of ``emulation/`` against the definitions of what it emulates."""

import pytest
import torch
from emulation import HERE, EmulationError, emulated_sources

ORDERS = ["forward", "reverse"]


@pytest.fixture(scope="module")
def kernels():
    return emulated_sources(HERE / "selftest.cu")


@pytest.mark.parametrize("order", ORDERS)
def test_warp_operations(kernels, order):
    x = torch.arange(32, 96, dtype=torch.int32)
    out = kernels.run("shuffles", x=x, out=x.new_zeros(64, 10), order=order)["out"].tolist()
    for thread, row in enumerate(out):
        warp, lane = thread // 32 * 32, thread % 32
        warp_x = x[warp : warp + 32].tolist()
        ballot = sum(1 << i for i, v in enumerate(warp_x) if v % 3 == 0)
        assert row == [
            warp_x[lane ^ 5],
            warp_x[lane + 3 if lane + 3 < 32 else lane],
            warp_x[lane - 3 if lane % 16 >= 3 else lane],
            warp_x[lane // 8 * 8 + (lane + 7) % 8],
            ballot - 2**32 if ballot >= 2**31 else ballot,
            40 in warp_x,
            1,
            sum(warp_x),
            warp_x[lane ^ 2] if lane % 2 == 0 else 0,
            sum(v % 5 == 0 for v in x.tolist()),
        ], thread


def test_a_missing_barrier_shows_in_one_of_the_orders(kernels):
    blank = torch.zeros(64, dtype=torch.int32)
    expected = 63 - torch.arange(64, dtype=torch.int32)

    def run(order, with_barrier):
        return kernels.run("exchange", out=blank, with_barrier=with_barrier, order=order)["out"]

    for order in ORDERS:
        assert torch.equal(run(order, 1), expected)
        # What a thread has not written yet is NaN bytes, not a value of the block before.
        assert (run(order, 0) == -1).sum() == 32
    assert not torch.equal(run("forward", 0), run("reverse", 0))


def test_atomics(kernels):
    start = {"sum": torch.ones(1), "most": torch.zeros(1, dtype=torch.int32)}
    out = kernels.run("atomics", **start)
    assert out["sum"] == 1 + 0.5 * 120 and out["most"] == 39 * 2


@pytest.mark.parametrize("in_flight", [0, 1, 2])
def test_asynchronous_copies_land_in_the_wait(kernels, in_flight):
    source = torch.arange(256, dtype=torch.float32)
    target = kernels.run("copies", source=source, target=source.new_zeros(256), in_flight=in_flight)
    first, second = target["target"].split(128)
    expected = source[:128].clone()
    expected[4:8] = 0  # the invalid one
    for half, values, landed in [(first, expected, 2), (second, source[128:], 1)]:
        assert torch.equal(half, values) if in_flight < landed else half.isnan().all()


def test_ldmatrix(kernels):
    source = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    blank = torch.zeros(32, 4, 2, dtype=torch.int16)
    out = kernels.run("ldmatrix", source=source, plain=blank, transposed=blank)
    for lane in range(32):
        group, member = lane // 4, lane % 4
        columns = slice(2 * member, 2 * member + 2)
        assert torch.equal(out["plain"][lane], source[:, group, columns])
        assert torch.equal(out["transposed"][lane], source[:, columns, group])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mma(kernels, dtype):
    generator = torch.Generator().manual_seed(0)
    depth = 8 if dtype == torch.float32 else 16
    a = torch.randn(16, depth, generator=generator).to(dtype)
    b = torch.randn(depth, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    out = kernels.run("mma", a=a, b=b, c=c, dtype=dtype)["c"]
    if dtype == torch.float32:  # tf32 keeps ten bits of the significand
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    expected = c.double() + a.double() @ b.double()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-6)


def test_exp2(kernels):
    x = torch.tensor([0.0, 1.5, -3.25, 127.0, 128.0, -127.0, 1e-40, -torch.inf, torch.nan])
    out = kernels.run("exp2", x=x, out=torch.zeros_like(x), count=x.numel())["out"]
    expected = torch.exp2(x)
    expected[5] = 0  # a subnormal result
    torch.testing.assert_close(out, expected, rtol=2.5e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "which, message",
    [
        (0, "divergent barrier: __syncthreads at .*selftest.cu"),
        (1, r"never arrive(?s:.*)thread.* 5-5: has returned"),
        (2, r"never arrive(?s:.*)threads 3-3: has returned"),
        (3, "the mask 0x0000ffff lacks the calling lane"),
        (4, "reads lane .* which is not in the mask 0x0000ffff"),
        (5, r"index 64 out of bounds for type .int \[64\]"),
        (6, "AddressSanitizer: heap-buffer-overflow"),
        (7, "AddressSanitizer: heap-buffer-overflow"),
        (8, "ldmatrix: out of bounds: the address is not in the block's shared memory"),
        (9, "signed integer overflow"),
        (10, "misaligned address"),
        (11, "never arrive(?s:.*)waits in __shfl_xor_sync(?s:.*)waits in __ballot_sync"),
    ],
)
def test_mistakes_are_caught(kernels, which, message, order):
    with pytest.raises(EmulationError, match=message):
        kernels.run("mistake", which=which, out=torch.zeros(64, dtype=torch.int32), order=order)


@pytest.mark.parametrize(
    "threads, shared, raise_limit, error",
    [(1024, 48 << 10, 0, 0), (1025, 0, 0, 9), (32, 50 << 10, 0, 1), (32, 50 << 10, 1, 0)],
)
def test_launches_that_a_gpu_refuses(kernels, threads, shared, raise_limit, error):
    arguments = {"threads": threads, "shared": shared, "raise_limit": raise_limit}
    if not error:
        kernels.run("nothing", **arguments)
        return
    with pytest.raises(EmulationError, match=f"returned the CUDA error {error}"):
        kernels.run("nothing", **arguments)
