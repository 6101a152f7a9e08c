"""Ways to draw one token a row from a softmax in plain torch, for the peers."""

import torch
from torch import Tensor


def multinomial(logits: Tensor) -> Tensor:
    """What most would write."""
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


def gumbel(logits: Tensor) -> Tensor:
    """argmax(logit - ln(-ln u)): no softmax, a uniform number a logit."""
    return (logits - torch.rand_like(logits).log().neg().log()).argmax(-1)


def cdf(logits: Tensor) -> Tensor:
    """Inverts the cumulative sum: one uniform number a row, and so the fastest of the three."""
    cumulative = logits.softmax(-1).cumsum(-1)
    # Of the sum as rounded, which need not be 1.
    level = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, level, right=True).squeeze(-1)
    return index.clamp_max(logits.shape[-1] - 1)


SAMPLING = {"cdf": cdf, "gumbel": gumbel, "multinomial": multinomial}
