import pytest
import torch
from op_checks import DEVICES, assert_bitwise_repeatable, relative_error

from metro_ext.ops import TokenTable
from metro_ext.ops.token_table import _add_repeated_rows

V, H = 60, 8


def uses(matrix, rows, tokens):
    """Two lookups and a product that depends on the first, as a step has them."""
    first, second = rows(tokens[0]), rows(tokens[1])
    return (first @ matrix.t()).sin().sum() + (second * first).sum()


def inputs(device):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=generator).to(device).requires_grad_()
    tokens = torch.randint(0, 7, (2, 40), generator=generator).to(device)  # many repeats
    return weight, tokens


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_gradient_is_that_of_plain_autograd(device, dtype, tolerance):
    weight, tokens = inputs(device)
    table = TokenTable(weight, dtype)
    assert table.matrix.dtype == dtype
    (ours,) = torch.autograd.grad(uses(table.matrix, table.rows, tokens), weight)
    exact = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(uses(exact, lambda t: exact[t], tokens), exact)
    assert ours.dtype == torch.float32
    assert relative_error(ours, expected) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 5, 3001])  # the last is widened in several pieces
def test_heads_gradient_is_widened_in_place(device, rows):
    weight = torch.randn(rows, 40, device=device, requires_grad=True)
    expected = torch.randn(rows, 40, device=device).bfloat16()
    table = TokenTable(weight, torch.bfloat16)
    assert torch.equal(table.matrix, weight.bfloat16())
    tokens = torch.tensor([0, rows - 1, 0], device=device)
    looked_up = table.rows(tokens)
    table.gradient.copy_(expected)
    (grad,) = torch.autograd.grad([table.matrix, looked_up], weight,
                                  [table.gradient, torch.ones_like(looked_up)])  # fmt: skip
    assert grad.data_ptr() == table.matrix.data_ptr()
    assert torch.equal(
        grad, expected.float().index_add_(0, tokens, torch.ones_like(looked_up).float())
    )


@pytest.mark.parametrize("device", DEVICES)
def test_lookups_alone(device):
    weight, tokens = inputs(device)
    TokenTable(weight, torch.bfloat16).rows(tokens[0]).sum().backward()
    counts = torch.bincount(tokens[0], minlength=V).float()
    assert torch.equal(weight.grad, counts[:, None].expand(V, H))


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_bit_for_bit(device):
    weight, tokens = inputs(device)

    def gradient():
        table = TokenTable(weight, torch.bfloat16)
        return torch.autograd.grad(uses(table.matrix, table.rows, tokens).float(), weight)

    assert_bitwise_repeatable(gradient)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device):
    weight, tokens = inputs(device)

    def function(weight, tokens):
        table = TokenTable(weight, torch.float32)
        return uses(table.matrix, table.rows, tokens)

    (ours,) = torch.autograd.grad(torch.compile(function, fullgraph=True)(weight, tokens), weight)
    (expected,) = torch.autograd.grad(function(weight, tokens), weight)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_lookups_that_go_backward_first_add_to_the_rest(device):
    weight, tokens = inputs(device)
    table = TokenTable(weight, torch.float32)
    table.apart().rows(tokens[1]).sin().sum().backward()
    assert weight.grad is None
    uses(table.matrix, table.rows, tokens).backward()
    exact = weight.detach().double().requires_grad_()
    (uses(exact, lambda t: exact[t], tokens) + exact[tokens[1]].sin().sum()).backward()
    assert relative_error(weight.grad, exact.grad) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab, count", [(V, 4000), (5000, 4000), (3, 1), (3, 0)])
def test_rows_of_repeated_tokens(device, vocab, count):
    """Half of the tokens are one, and there are more or fewer of them than the table has rows."""
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(0, vocab, (count,), generator=generator)
    tokens[: count // 2] = vocab - 1
    tokens = tokens[torch.randperm(count, generator=generator)].to(device)
    rows = torch.randn(count, H, generator=generator).to(device)
    grad = torch.randn(vocab, H, generator=generator).to(device)
    expected = grad.double().index_add(0, tokens, rows.double())
    first, second = grad.clone(), grad.clone()
    _add_repeated_rows(first, tokens, rows)
    _add_repeated_rows(second, tokens, rows)
    assert torch.equal(first, second)
    assert relative_error(first, expected) < 1e-6
    unused = torch.ones(vocab, dtype=torch.bool, device=device).index_fill(0, tokens, False)
    assert torch.equal(first[unused], grad[unused])
