"""A token embedding table that is read by lookups and by tied vocabulary heads in one step."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenTable:
    """One step's use of a token table: rows for the embeddings, the matrix for tied heads.

    By plain autograd every lookup has a gradient of the table's full size, zeros nearly all of it:
    at a vocabulary of 64K and a width of 256 that is 67 MB each to allocate, clear and add. Here
    the lookups hand their few rows on, and the table's one gradient is the heads' plus these rows.

    Args:
        weight: float32 [V, H].
        dtype: of rows and matrix; the rounded copy is made once.

    matrix: [V, H] in `dtype`, for heads tied to the table.

    An instance serves one forward and backward pass. Under ``torch.compile``, which cannot follow
    the collection, it is plain autograd.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.weight = weight
        self.plain = torch.compiler.is_compiling()
        self.lookups: list[tuple[Tensor, Tensor]] = []
        self.matrix = weight.to(dtype) if self.plain else _Table.apply(weight, dtype, self.lookups)

    def apart(self) -> "TokenTable":
        """The same table for lookups in a part of the step that goes backward first, by itself.

        Their gradients reach ``weight`` with this table's own backward pass; those of its `matrix`
        do not.
        """
        other = copy.copy(self)
        other.matrix = self.matrix.detach().requires_grad_()
        return other

    def rows(self, tokens: Tensor) -> Tensor:
        """The rows of int64 tokens [T]: [T, H] in the table's dtype."""
        if self.plain:
            return F.embedding(tokens, self.weight).to(self.matrix.dtype)
        return _Lookup.apply(self.matrix, tokens, self.lookups)


class _Table(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, dtype: torch.dtype, lookups: list) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        ctx.lookups = lookups
        return weight.to(dtype) if weight.dtype != dtype else weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        # Autograd comes here after every use of the matrix, so the lookups have all reported.
        (weight,) = ctx.saved_tensors
        grad = torch.zeros_like(weight) if grad is None else grad.to(weight.dtype)
        for tokens, rows in ctx.lookups:
            _add_rows(grad, tokens, rows.to(weight.dtype))
        ctx.lookups.clear()
        return grad, None, None


def _add_rows(grad: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """grad[tokens] += rows, in a fixed order where a token repeats."""
    if grad.is_cuda:
        _add_repeated_rows(grad, tokens, rows)
    else:
        grad.index_add_(0, tokens, rows)


def _add_repeated_rows(grad: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """The same for CUDA: no host synchronisation, and shapes that depend on T alone.

    A masked batch has [MASK] thousands of times. There index_add_ would add its rows in any order,
    and index_put_ one after the other, each through memory. The backward pass of an embedding
    shares a long run of equal indices out among many threads, in a fixed order, but makes a whole
    table; so the distinct tokens are numbered first, and its table is [T, H].
    """
    count = tokens.numel()
    if count == 0:
        return
    ordered, order = tokens.sort()
    number = torch.zeros_like(ordered)  # of the distinct token, in ascending order
    number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    slot = torch.empty_like(number).scatter_(0, order, number)
    sums = torch.ops.aten.embedding_dense_backward(rows, slot, count, -1, False)
    # Slots beyond the last number hold zeros, and are spread over the table.
    target = torch.arange(count, device=tokens.device) % grad.shape[0]
    target.scatter_(0, number, ordered)
    # Added atomically, and yet in every order to the same bits: a row of `grad` receives one sum,
    # else zeros.
    grad.index_add_(0, target, sums)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix: Tensor, tokens: Tensor, lookups: list) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.lookups = lookups
        return F.embedding(tokens, matrix)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (tokens,) = ctx.saved_tensors
        ctx.lookups.append((tokens, grad))
        return None, None, None
