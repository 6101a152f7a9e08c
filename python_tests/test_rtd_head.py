import pytest
import reference
import torch
from op_checks import (
    DEVICE_DTYPES,
    DEVICES,
    assert_bitwise_repeatable,
    assert_close,
    check_against_reference,
    check_finite_differences,
)

from metro_ext.ops import rtd_head

SHAPES = [(7, 5), (1, 1), (130, 257), (333, 64), (65, 768), (16, 16)]


def make_inputs(shape, device, dtype=torch.float32):
    """hidden, weight, bias, label; about a quarter of the labels each 1 and 255."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = shape
    hidden = torch.randn(rows, cols, generator=generator).to(device, dtype)
    weight = torch.randn(cols, generator=generator) * 3 / cols**0.5
    label = torch.tensor([0, 1, 0, 255], dtype=torch.uint8)
    label = label[torch.randint(4, (rows,), generator=generator)]
    return [hidden, weight.to(device), torch.tensor([0.3], device=device), label.to(device)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_matches_reference(device, dtype, shape):
    inputs = make_inputs(shape, device, dtype)
    inputs[3][0] = 1  # a single row should count
    check_against_reference(
        lambda *t: rtd_head(*t)[0], lambda *t: reference.rtd_head(*t)[0], inputs, dtype
    )
    _, logit, hits = rtd_head(*inputs)
    doubles = [t.cpu().double() for t in inputs[:3]]
    _, expected_logit, expected_hits = reference.rtd_head(*doubles, inputs[3].cpu())
    assert_close(logit, expected_logit, torch.float32, "logit")  # no rounding to dtype here
    assert hits.dtype == torch.int64 and hits.shape == ()
    assert int(hits) == int(expected_hits)


@pytest.mark.parametrize("device", DEVICES)
def test_keeps_relative_precision_in_the_tails(device):
    logit = torch.linspace(-85, 85, 1001, device=device)
    weight, bias = torch.ones(1, device=device), torch.zeros(1, device=device)
    for label in (0, 1):
        labels = torch.full((1001,), label, dtype=torch.uint8, device=device)
        hidden = logit[:, None].clone().requires_grad_()
        loss = rtd_head(hidden, weight, bias, labels)[0]
        loss.sum().backward()
        z = logit.double().cpu() * (-1 if label else 1)
        expected = z.clamp_min(0) + torch.log1p(torch.exp(-z.abs()))
        slope = (-1 if label else 1) / (1 + torch.exp(-z))
        torch.testing.assert_close(loss.detach().double().cpu(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(hidden.grad[:, 0].double().cpu(), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_logits(device):
    values = [-1e30, 1e30, -torch.inf, torch.inf, torch.nan, 0.0]
    hidden = torch.tensor(values, device=device)[:, None].requires_grad_()
    weight, bias = torch.ones(1, device=device), torch.zeros(1, device=device)
    label = torch.zeros(6, dtype=torch.uint8, device=device)
    loss, _, hits = rtd_head(hidden, weight, bias, label)
    loss.sum().backward()
    loss = loss.detach()
    assert loss[0] == 0 and loss[1] == 1e30 and loss[2] == 0 and loss[3] == torch.inf
    assert torch.isnan(loss[4]) and abs(float(loss[5]) - 0.693147) < 1e-6
    # -1e30, -inf and 0 say original; so does NaN, which is not above zero.
    assert int(hits) == 4
    grad = hidden.grad[:, 0]
    assert (grad[[0, 2]] < 1e-38).all() and (grad[[1, 3]] == 1).all()
    assert torch.isnan(grad[4]) and grad[5] == 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_ignored_rows_count_for_nothing(device):
    hidden, weight, bias, label = make_inputs((50, 24), device)
    hidden[label == 255] = torch.nan
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss, _, hits = rtd_head(*leaves, label)
    keep = label != 255
    kept_loss, _, kept_hits = rtd_head(hidden[keep], weight, bias, label[keep])
    assert torch.equal(loss[keep], kept_loss) and torch.equal(hits, kept_hits)
    assert not loss[~keep].any()
    loss.sum().backward()
    assert not hidden.grad[~keep].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_empty(device, shape):
    hidden, _, bias, label = make_inputs(shape, device)
    weight = torch.zeros(shape[1], device=device)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss, logit, hits = rtd_head(*leaves, label)
    assert loss.shape == logit.shape == shape[:1] and hits.shape == ()
    assert torch.equal(logit, bias.expand(shape[0]))
    grads = torch.autograd.grad(loss.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert shape[0] > 0 or (not grads[1].any() and not grads[2].any())


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_input(device):
    hidden, weight, bias, label = make_inputs((32, 24), device)
    strided = hidden.t().contiguous().t()
    arguments = (weight.repeat_interleave(2)[::2], bias, label.repeat_interleave(2)[::2])
    expected = rtd_head(hidden, weight, bias, label)
    for a, b in zip(rtd_head(strided, *arguments), expected, strict=True):
        assert torch.equal(a, b)


def test_finite_differences():
    inputs = make_inputs((20, 6), "cpu")
    for i in range(3):
        check_finite_differences(
            lambda t, i=i: rtd_head(*inputs[:i], t, *inputs[i + 1 :])[0].sin().sum(), inputs[i]
        )


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_bitwise_repeat(device, dtype):
    hidden, weight, bias, label = make_inputs((999, 130), device, dtype)
    grad = torch.randn(999, device=device)

    def forward_and_backward():
        out = rtd_head(hidden, weight, bias, label)
        grads = torch.ops.metro.rtd_head_backward(grad, out[1], hidden, weight, label)
        return [t.reshape(-1) for t in (*out, *grads)]

    assert_bitwise_repeatable(forward_and_backward)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_opcheck(device, dtype):
    hidden, weight, bias, label = make_inputs((9, 12), device, dtype)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    torch.library.opcheck(torch.ops.metro.rtd_head, (*leaves, label))
    logit = rtd_head(hidden, weight, bias, label)[1]
    arguments = (torch.randn_like(logit), logit, hidden, weight, label)
    torch.library.opcheck(torch.ops.metro.rtd_head_backward, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device):
    hidden, weight, bias, label = make_inputs((20, 16), device)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def loss(hidden, weight, bias):
        return rtd_head(hidden * 2, weight, bias, label)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


H, W, B, L = torch.zeros(3, 4), torch.zeros(4), torch.zeros(1), torch.zeros(3, dtype=torch.uint8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((H[0], W, B, L), r"rtd_head: hidden must have shape \[\*, \*\], found \[4\]"),
        ((H, W[:3], B, L), r"weight must have shape \[4\], found \[3\]"),
        ((H, W, W, L), r"bias must have shape \[1\], found \[4\]"),
        ((H, W, B, L[:2]), r"label must have shape \[3\], found \[2\]"),
        ((H.double(), W, B, L), "hidden must be float32 or bfloat16, found float64"),
        ((H, W.bfloat16(), B, L), "weight must be float32, found bfloat16"),
        ((H, W, B, L.long()), "label must be uint8, found int64"),
        ((H, W, B, L + 2), r"label must hold 0 .* or 255 \(ignored\), found 2 at 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        rtd_head(*arguments)


@pytest.mark.skipif(len(DEVICES) < 2, reason="needs a GPU")
def test_devices_may_not_be_mixed():
    with pytest.raises(RuntimeError, match="weight must be on the device of hidden"):
        rtd_head(H.cuda(), W, B.cuda(), L.cuda())
