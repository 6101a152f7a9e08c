"""A token embedding table that is read by lookups and by tied vocabulary heads in one step."""

import copy
from typing import Any

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

    Attributes:
        matrix: [V, H] in ``dtype``, for heads tied to the table.
        gradient: like ``matrix``, uninitialised: where the heads may put its gradient. Backward,
            the float32 gradient of ``weight`` is then widened in place, over the matrix that nobody
            reads any more: at that moment most of a step's memory has been handed back, but in
            pieces among the gradients of layers, and another block of this size would come on top
            of them. None where ``dtype`` is that of ``weight``, or under ``torch.compile``.

    An instance serves one forward and backward pass. Under ``torch.compile``, which cannot follow
    the collection, it is plain autograd.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.weight = weight
        self.plain = torch.compiler.is_compiling()
        self.lookups: list[tuple[Tensor, Tensor]] = []
        self.gradient: Tensor | None = None
        if self.plain or not torch.is_grad_enabled():
            self.matrix = weight.to(dtype)
        elif weight.dtype == dtype:
            self.matrix = _Table.apply(weight, None, self.lookups)
        else:
            both = weight.new_empty(2, *weight.shape, dtype=dtype)
            self.matrix, self.gradient = _Table.apply(weight, both, self.lookups), both[1]

    def apart(self) -> "TokenTable":
        """The same table for lookups in a part of the step that goes backward first, by itself.

        Returns:
            A :class:`TokenTable`. The gradients of its lookups reach ``weight`` with this table's
            own backward pass; those of its ``matrix`` do not.
        """
        other = copy.copy(self)
        other.matrix = self.matrix.detach().requires_grad_()
        return other

    def rows(self, tokens: Tensor) -> Tensor:
        """The rows of tokens.

        Args:
            tokens: int64 [T], ids in [0, V).

        Returns:
            [T, H] in the table's dtype.

        Raises:
            IndexError: an id is out of range (on the CPU; torch's own message).
        """
        if self.plain:
            return F.embedding(tokens, self.weight).to(self.matrix.dtype)
        return _Lookup.apply(self.matrix, tokens, self.lookups)


class _Table(torch.autograd.Function):
    """The matrix of a weight: itself, or its rounded copy in the first half of ``both``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, both: Tensor | None, lookups: list) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        ctx.both, ctx.lookups = both, lookups
        if both is None:
            return weight.view_as(weight)
        # Not a view: autograd would refuse one whose base is written to later.
        half = both.new_empty(0).set_(both.untyped_storage(), 0, weight.shape, both[0].stride())
        return half.copy_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        # Autograd comes here after every use of the matrix, so the lookups have all reported.
        (weight,) = ctx.saved_tensors
        both, ctx.both = ctx.both, None
        if grad is None:
            grad = torch.zeros_like(weight)
        elif both is not None and grad.data_ptr() == both[1].data_ptr():
            grad = _widen(both, weight)
        else:
            grad = grad.to(weight.dtype)
        for tokens, rows in ctx.lookups:
            _add_rows(grad, tokens, rows.to(weight.dtype))
        ctx.lookups.clear()
        return grad, None, None


# What is left is copied out first: fewer elements than are worth a call of their own.
_WIDEN_AT_ONCE = 1 << 14


def _widen(both: Tensor, weight: Tensor) -> Tensor:
    """The second half of ``both`` in float32, like ``weight``, over the memory of the whole."""
    narrow = both[1].flatten()
    wide = both.view(-1).view(weight.dtype)
    done, count = 0, wide.numel()
    while done < count:
        # Elements [done, end) fill the bytes [4 done, 4 end); those not read yet begin at byte
        # 2 (count + done): half of what is left can be written without reaching them.
        end = done + (count - done) // 2
        if end - done < _WIDEN_AT_ONCE:
            wide[done:] = narrow[done:].clone()
            break
        wide[done:end] = narrow[done:end]
        done = end
    return wide.view(weight.shape)


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
    def forward(ctx: Any, matrix: Tensor, tokens: Tensor, lookups: list) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.lookups = lookups
        return F.embedding(tokens, matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        ctx.lookups.append((tokens, grad))
        return None, None, None
