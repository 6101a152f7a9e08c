"""Cross-entropy over a large vocabulary, and a sample from it, without holding the logits.

The gradients of the loss are computed in the forward pass, from the logits that are at hand there:
to come back for them would mean to compute the logits, a third of all the work, a second time. What
makes this possible is that the loss is a sum: each row's weight in it is known beforehand.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metro_ext import _C  # noqa: F401  (registers torch.ops.metro)
from metro_ext.ops.first_order import refuse_second_order


class VocabHead(NamedTuple):
    """What :func:`vocab_head` gives for N rows; none of it carries a gradient.

    Attributes:
        nll: float32 [N], −ln softmax(logits)[target] in nats; 0 where ignored.
        lse: float32 [N], ln Σ exp(logits).
        hit: uint8 [N], 1 where the first argmax of the logits is the target.
        sample: int64 [N], one token a row; empty without a seed.
    """

    nll: Tensor
    lse: Tensor
    hit: Tensor
    sample: Tensor


def vocab_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    seed: Tensor | None = None,
    temperature: float = 1.0,
    draw: int = 0,
) -> VocabHead:
    """Losses, hits and samples of the logits ``hidden @ weight.T + bias``, without gradients.

    Args:
        hidden: activations [N, H], float32 or bfloat16 (float16 on CUDA).
        weight: [V, H] in the dtype of ``hidden``.
        bias: float32 [V].
        target: int64 [N], ids in [0, V), or -100 for a row that is to be ignored: nll 0, hit 0, no
            gradient (but a sample, if samples are asked for).
        seed: one int64 on the device of the data, the key of the random numbers; None: no samples.
        temperature: samples come from softmax(logits / temperature); > 0.
        draw: tells apart the draws that share a seed, in [0, 2^24).

    Returns:
        A :class:`VocabHead`. The logits are rounded to the dtype of ``hidden`` before the bias is
        added, as a linear layer's are; everything after that is float32.

    Samples depend on the seed, ``draw``, the row's index and its logits alone: the Gumbel-max trick
    (Maddison et al., arXiv 1411.0030) over tiles of the vocabulary, inverse CDF inside the winner;
    ``csrc/vocab_head/vocab_head.h`` describes the scheme.
    Logits are held a chunk of rows at a time, never N × V. All results are deterministic.

    Raises:
        RuntimeError: a shape, dtype, device, the temperature, or (on the CPU) a target is not as
            above.
    """
    plain = _plain(hidden, weight, bias)
    return VocabHead(*torch.ops.metro.vocab_head(*plain, target, seed, temperature, draw))


def vocab_head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    scale: Tensor | float = 1.0,
    seed: Tensor | None = None,
    temperature: float = 1.0,
    draw: int = 0,
) -> tuple[Tensor, VocabHead]:
    """``scale`` times the sum of the losses of :func:`vocab_head`, with gradients.

    Args:
        hidden, weight, bias, target, seed, temperature, draw: as there.
        scale: a number, or float32 of one element on the device of the data; for a mean
            1 / (number of targets). It is part of the gradients that the forward pass computes, in
            the dtype of ``hidden``: in float16 leave it near 1, and scale the loss.

    Returns:
        loss: float32 [], differentiable by ``hidden``, ``weight`` and ``bias``.
        head: as :func:`vocab_head` gives it.

    Raises:
        RuntimeError: as :func:`vocab_head`, or ``scale`` is not as above.
    """
    if not isinstance(scale, Tensor):
        scale = hidden.new_full((), scale, dtype=torch.float32)
    gradients = HeadGradients(weight)
    head = gradients.vocab_head(hidden, bias, target, scale, seed, temperature, draw)
    return gradients.attach(head.nll.sum() * scale.detach().reshape(())), head


class HeadGradients:
    """The gradients of one loss by the heads that are tied to one matrix.

    All of them add into a single gradient of the matrix, which at a vocabulary of 64K and a width
    of 768 is 100 MB in bfloat16::

        gradients = HeadGradients(weight)
        first = gradients.vocab_head(hidden, bias, target, scale)
        second = gradients.vocab_head(other_hidden, other_bias, other_target, other_scale)
        loss = gradients.attach(scale * first.nll.sum() + other_scale * second.nll.sum() + more)

    Args:
        weight: the matrix [V, H], in the dtype of the hidden states.
        room: contiguous, like ``weight``: takes its gradient, so that nothing is allocated for it.
    """

    def __init__(self, weight: Tensor, room: Tensor | None = None):
        self._weight, self._room = weight, room
        self._grad_weight: Tensor | None = None
        self._inputs: list[Tensor] = []
        self._grads: list[Tensor] = []

    def vocab_head(
        self,
        hidden: Tensor,
        bias: Tensor,
        target: Tensor,
        scale: Tensor,
        seed: Tensor | None = None,
        temperature: float = 1.0,
        draw: int = 0,
    ) -> VocabHead:
        """:func:`vocab_head`, and the gradients of ``scale · nll.sum()`` where they are needed.

        Args:
            hidden, bias, target, seed, temperature, draw: as there.
            scale: float32 of one element, on the device of the data.

        Returns:
            A :class:`VocabHead`.

        Raises:
            RuntimeError: as :func:`vocab_head`, or ``scale`` is not as above.
        """
        given = hidden, self._weight, bias
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)):
            return vocab_head(*given, target, seed, temperature, draw)
        hidden_plain, weight, bias_plain = _plain(*given)
        is_first = self._grad_weight is None
        if is_first:
            room = self._room
            if room is None:
                room = torch.empty_like(weight, memory_format=torch.contiguous_format)
            self._grad_weight = room
        *head, grad_hidden, grad_bias = torch.ops.metro.vocab_head_gradients(
            hidden_plain, weight, bias_plain, target, seed, temperature, draw, scale.detach(),
            self._grad_weight, not is_first,
        )  # fmt: skip
        self._inputs += [hidden, bias]
        self._grads += [grad_hidden, grad_bias]
        return VocabHead(*head)

    def attach(self, loss: Tensor, with_matrix: bool = True) -> Tensor:
        """``loss``, with the gradients by the heads' inputs on top of those that it has.

        Args:
            loss: float32 []. It is the caller's part that it contains ``scale · nll.sum()`` of
                every head since the last call.
            with_matrix: the matrix's gradient too; else it waits for a later call, to whose loss
                these heads then belong as far as the matrix is concerned.

        Returns:
            float32 [], the value of ``loss``.

        Raises:
            RuntimeError: in the backward pass, if it is to be differentiated once more.
        """
        if self._grad_weight is None:
            return loss
        inputs, grads = self._inputs, self._grads
        self._inputs, self._grads = [], []
        if with_matrix:
            inputs, grads = [*inputs, self._weight], [*grads, self._grad_weight]
        return _Attach.apply(loss, len(inputs), *inputs, *grads)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():
            refuse_second_order("metro::vocab_head_gradients")
        # In place, as the matrix's is large; a second backward pass is then refused by autograd.
        grads = [grad.mul_(grad_loss) for grad in ctx.saved_tensors]
        return grad_loss, None, *grads, *[None] * len(grads)


def _plain(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach() for tensor in tensors)


@torch.library.register_fake("metro::vocab_head")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    seed: Tensor | None,
    temperature: float,
    draw: int,
) -> tuple[Tensor, ...]:
    rows = hidden.shape[0]
    nll = hidden.new_empty(rows, dtype=torch.float32)
    hit = hidden.new_empty(rows, dtype=torch.uint8)
    sample = hidden.new_empty(rows if seed is not None else 0, dtype=torch.int64)
    return nll, torch.empty_like(nll), hit, sample


@torch.library.register_fake("metro::vocab_head_gradients")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    seed: Tensor | None,
    temperature: float,
    draw: int,
    scale: Tensor,
    grad_weight: Tensor,
    accumulate: bool,
) -> tuple[Tensor, ...]:
    rows = hidden.shape[0]
    nll = hidden.new_empty(rows, dtype=torch.float32)
    hit = hidden.new_empty(rows, dtype=torch.uint8)
    sample = hidden.new_empty(rows if seed is not None else 0, dtype=torch.int64)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return nll, torch.empty_like(nll), hit, sample, grad_hidden, torch.empty_like(bias)
