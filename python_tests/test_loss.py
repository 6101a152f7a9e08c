import pytest
import reference
import torch
from op_checks import (
    DEVICES,
    assert_bitwise_repeatable,
    assert_close,
    check_finite_differences,
)

from metro_ext.ops import METRICS, pretrain_loss

WEIGHTS = (1.5, 50.0, 0.7)
WEIGHT_OPTIONS = dict(zip(("mlm_weight", "rtd_weight", "clm_weight"), WEIGHTS, strict=True))
PARTS = [("mlm", "rtd", "clm"), ("mlm", "rtd"), ("mlm",), ("rtd",), ("clm",), ("mlm", "clm")]


def make_parts(names=PARTS[0], sizes=(50, 333, 71), device="cpu", seed=0):
    """The named parts, about a quarter of the rows ignored."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, rows in zip(PARTS[0], sizes, strict=True):
        loss = 5 * torch.rand(rows, generator=generator)
        kind = torch.randint(4, (rows,), generator=generator)
        if name == "rtd":
            logit = torch.randn(rows, generator=generator)
            label = torch.tensor([0, 1, 0, 255], dtype=torch.uint8)[kind]
            part = (loss, logit, label)
        else:
            hit = torch.randint(2, (rows,), generator=generator).to(torch.uint8)
            target = torch.where(kind == 3, -100, torch.arange(rows))
            part = (loss, hit, target)
        parts[name] = tuple(t.to(device) for t in part)
    return {name: parts[name] for name in names}


def losses(parts):
    return [part[0] for part in parts.values()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("denominators", [None, (100.0, 7.5, 0.0)])
@pytest.mark.parametrize("sizes", [(50, 333, 71), (1, 1, 1), (614, 4096, 614), (70001, 3, 9)])
@pytest.mark.parametrize("names", PARTS)
def test_matches_reference(device, names, sizes, denominators):
    parts = make_parts(names, sizes, device)
    for name, part in parts.items():
        if name == "rtd":
            part[2][0] = 1
        else:
            part[2][0] = 3  # the only row of a part should count
    doubles = {k: (p[0].cpu().double(), *(t.cpu() for t in p[1:])) for k, p in parts.items()}
    for leaf in losses(parts) + losses(doubles):
        leaf.requires_grad_()
    if denominators is not None:
        denominators = torch.tensor(denominators, device=device)
    loss, metrics = pretrain_loss(**parts, denominators=denominators, **WEIGHT_OPTIONS)
    given = None if denominators is None else denominators.cpu().double()
    arguments = [doubles.get(name) for name in PARTS[0]]
    expected, expected_metrics = reference.pretrain_loss(*arguments, given, WEIGHTS)
    assert loss.shape == () and loss.dtype == metrics.dtype == torch.float32
    assert_close(loss, expected, torch.float32, "loss")
    torch.testing.assert_close(metrics.cpu(), expected_metrics.float(), rtol=1e-6, atol=0)
    assert torch.equal(metrics[[1, 2, 3, 5, 6, 7, 8, 10, 11]] % 1, metrics.new_zeros(9))
    (3 * loss).backward()
    if expected.requires_grad:
        (3 * expected).backward()
    for ours, theirs in zip(losses(parts), losses(doubles), strict=True):
        reference_grad = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        assert_close(ours.grad, reference_grad, torch.float32, "gradient")


@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device):
    def tensor(values, dtype=torch.float32):
        return torch.tensor(values, dtype=dtype, device=device)

    byte = torch.uint8
    loss, metrics = pretrain_loss(
        mlm=(tensor([1, 2, 9]), tensor([1, 0, 1], byte), tensor([4, 5, -100], torch.int64)),
        rtd=(
            tensor([0.5, 0.25, 0.25, 9]),
            tensor([1, -1, 1, 1]),
            tensor([1, 1, 0, 255], byte),
        ),
        clm=(tensor([4]), tensor([0], byte), tensor([0], torch.int64)),
        rtd_weight=30.0,
    )
    assert dict(zip(METRICS, metrics.tolist(), strict=True)) == {
        "mlm_nll_sum": 3,
        "mlm_hits": 1,
        "mlm_count": 2,
        "replaced_count": 2,
        "rtd_loss_sum": 1,
        "rtd_hits": 1,
        "rtd_count": 3,
        "rtd_predicted_replaced": 2,
        "rtd_true_positive": 1,
        "clm_nll_sum": 4,
        "clm_hits": 0,
        "clm_count": 1,
    }
    assert loss.item() == 1.5 + 10 + 4


@pytest.mark.parametrize("device", DEVICES)
def test_micro_batches_add_up(device):
    parts = make_parts(sizes=(60, 400, 60), device=device)
    whole, metrics = pretrain_loss(**parts, **WEIGHT_OPTIONS)
    halves = []
    for i in range(2):
        half = {k: tuple(t.chunk(2)[i] for t in part) for k, part in parts.items()}
        counts = metrics[[2, 6, 11]]
        halves.append(pretrain_loss(**half, denominators=counts, **WEIGHT_OPTIONS))
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole)
    torch.testing.assert_close(halves[0][1] + halves[1][1], metrics)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(0, 0, 0), (0, 5, 0), (4, 6, 8)])
def test_nothing_to_count(device, sizes):
    parts = make_parts(sizes=sizes, device=device)
    for name, part in parts.items():
        part[2].fill_(255 if name == "rtd" else -100)
        part[0].fill_(torch.nan).requires_grad_()
    loss, metrics = pretrain_loss(**parts)
    assert loss.item() == 0 and not metrics.any()
    for grad, leaf in zip(torch.autograd.grad(loss, losses(parts)), losses(parts), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("device", DEVICES)
def test_non_finite_losses_show(device):
    parts = make_parts(device=device)
    parts["rtd"][2][5] = 0
    parts["rtd"][0][5] = torch.nan
    loss, metrics = pretrain_loss(**parts)
    assert torch.isnan(loss) and torch.isnan(metrics[METRICS.index("rtd_loss_sum")])
    assert torch.isfinite(metrics).sum() == len(METRICS) - 1


@pytest.mark.parametrize("device", DEVICES)
def test_long_sums_keep_their_precision(device):
    """Ten million equal terms: a float32 running sum would be off in the second digit."""
    rows = 10_000_000
    rtd = (
        torch.full((rows,), 0.1, device=device),
        torch.ones(rows, device=device),
        torch.zeros(rows, dtype=torch.uint8, device=device),
    )
    loss, metrics = pretrain_loss(rtd=rtd, rtd_weight=1.0)
    assert abs(loss.item() - 0.1) < 1e-8
    assert metrics[METRICS.index("rtd_count")] == rows


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_input(device):
    parts = make_parts(device=device)
    strided = {k: tuple(t.repeat_interleave(2)[::2] for t in part) for k, part in parts.items()}
    for a, b in zip(pretrain_loss(**strided), pretrain_loss(**parts), strict=True):
        assert torch.equal(a, b)


def test_finite_differences():
    parts = make_parts()
    for name, (loss, *rest) in parts.items():
        # Linear, so the step may be long; a short one would drown in the rounding of the sum.
        check_finite_differences(
            lambda t, name=name, rest=rest: pretrain_loss(
                **parts | {name: (t, *rest)}, rtd_weight=2.0
            )[0],
            loss,
            step=1.0,
        )


@pytest.mark.parametrize("device", DEVICES)
def test_bitwise_repeat(device):
    parts = make_parts(sizes=(30_000, 200_003, 1000), device=device)
    leaves = [leaf.requires_grad_() for leaf in losses(parts)]

    def forward_and_backward():
        loss, metrics = pretrain_loss(**parts)
        return [loss.detach().reshape(1), metrics, *torch.autograd.grad(loss, leaves)]

    assert_bitwise_repeatable(forward_and_backward)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("own_counts", [True, False])
@pytest.mark.parametrize("names", PARTS)
def test_opcheck(device, names, own_counts):
    parts = make_parts(names, (5, 9, 7), device)
    for leaf in losses(parts):
        leaf.requires_grad_()
    absent = (None, None, None)
    flat = [t for name in PARTS[0] for t in parts.get(name, absent)]
    denominators = None if own_counts else torch.tensor([4.0, 9.0, 2.0], device=device)
    torch.library.opcheck(torch.ops.metro.pretrain_loss, (*flat, denominators, *WEIGHTS))
    metrics = pretrain_loss(**parts)[1]
    grad = torch.tensor(2.0, device=device)
    arguments = (grad, metrics, flat[2], flat[5], flat[8], denominators, *WEIGHTS)
    torch.library.opcheck(torch.ops.metro.pretrain_loss_backward, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", [PARTS[0], PARTS[1], ("clm",)])
def test_compiles_whole(device, names):
    parts = make_parts(names, device=device)
    leaves = [leaf.requires_grad_() for leaf in losses(parts)]

    def step(parts):
        loss, metrics = pretrain_loss(**{k: (p[0] * 2, *p[1:]) for k, p in parts.items()})
        return loss.sin(), metrics

    compiled = torch.compile(step, fullgraph=True)
    (loss, metrics), (expected_loss, expected_metrics) = compiled(parts), step(parts)
    torch.testing.assert_close(metrics, expected_metrics)
    expected = torch.autograd.grad(expected_loss, leaves)
    for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


F, B, N = torch.zeros(3), torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "pretrain_loss: expected mlm, rtd or clm, found None for all"),
        ({"mlm": (F, B, None)}, "mlm_nll and mlm_target must be given together, found one of them"),
        ({"mlm": (F, B[:2], N)}, r"mlm_hit must have the shape of mlm_nll \[3\], found \[2\]"),
        ({"rtd": (F, F, B[:2])}, r"label must have the shape of rtd_loss \[3\], found \[2\]"),
        ({"clm": (F[None], B, N)}, r"clm_nll must have shape \[\*\], found \[1, 3\]"),
        ({"clm": (F.double(), B, N)}, "clm_nll must be float32, found float64"),
        ({"mlm": (F.bfloat16(), B, N)}, "mlm_nll must be float32, found bfloat16"),
        ({"mlm": (F, B.bool(), N)}, "mlm_hit must be uint8, found bool"),
        ({"mlm": (F, B, N.int())}, "mlm_target must be int64, found int32"),
        ({"rtd": (F, F, N)}, "label must be uint8, found int64"),
        (
            {"rtd": (F, F, B), "denominators": F[:2]},
            r"denominators must have shape \[3\], found \[2\]",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(RuntimeError, match=message):
        pretrain_loss(**options)


@pytest.mark.skipif(len(DEVICES) < 2, reason="needs a GPU")
def test_devices_may_not_be_mixed():
    with pytest.raises(RuntimeError, match="mlm_hit must be on the device of"):
        pretrain_loss(mlm=(F.cuda(), B, N.cuda()))
