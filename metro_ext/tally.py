"""What the steps of an interval amount to, kept on their device until there is something to report.

A step whose loss or gradient is not finite is skipped: its update, its figures and its count in
Adam are left out, and the run goes on. Only the decision that a step is skipped needs to be made on
the device; whether too many were is read by the host when it reports.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from metro_ext.held_out import interval_figures
from metro_ext.objective import FIGURES

WINDOW = 64  # losses that a spike is told from
# A spike lies above the running median by this many standard deviations (of a normal distribution
# of the same median absolute deviation) and by this share of the median: at one chance in 10^14 a
# step neither noise nor, on a plateau of nearly equal losses, rounding passes for one.
SPIKE_DEVIATIONS = 8.0
SPIKE_SHARE = 0.1
_DEVIATION_OF_MAD = 1.4826


class Tally:
    """Sums and counts of the steps since the last report.

    sums: float64 [1 + FIGURES], the losses and the figures of the steps taken, added up.
    norms: float32 [3], gradient norms of the last step taken: of all parameters, of those of the
        auxiliary model alone, of the others (the shared token table among them).
    skipped: float64 [5], steps skipped in the interval, steps skipped in a row up to now (over
        intervals), and number, loss and gradient norm of the last one.
    spikes: float64 [4], steps of the interval whose loss jumped, and number, loss and running
        median of the last one.
    losses: float64 [WINDOW], of the last steps taken, by step number modulo WINDOW; infinite where
        there was none yet.
    stop: float64 [], ranks that were asked to end before this step; not part of the state.

    Args:
        device: of the memory.
        limit: steps skipped in a row at which the run ends: from then on every step is skipped, so
            that the weights stay as the first of them found them.
        warm_up: steps from the run's first in which no loss counts as a spike.
    """

    def __init__(self, device: torch.device, limit: int = 10, warm_up: int = 0):
        self.limit, self.warm_up = limit, warm_up
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        self.sums = zeros(1 + len(FIGURES))
        self.norms = torch.zeros(3, dtype=torch.float32, device=device)
        self.skipped = zeros(5)
        self.spikes = zeros(4)
        self.losses = zeros(WINDOW).fill_(torch.inf)
        self.stop = zeros(())

    def add(self, number: Tensor, sums: Tensor, norms: Tensor) -> Tensor:
        """Adds a step.

        Args:
            number: float64 [], of the step, from 1.
            sums, norms: as the fields of that name, of this step over all ranks: every rank has
                the same bits and comes to the same decision.

        Returns:
            float32 [], 1: the step is to be skipped, 0: it is to be taken.
        """
        loss, norm = sums[0], norms[0].double()
        over = self.skipped[1] >= self.limit
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm)) & ~over
        skip = bad | over
        # A product with 0 would keep a NaN.
        self.sums += torch.where(skip, torch.zeros_like(sums), sums)
        self.norms.copy_(torch.where(skip, self.norms, norms))
        in_row = torch.where(bad, self.skipped[1] + 1, torch.where(over, self.skipped[1], 0.0))
        last = torch.where(bad, torch.stack([number, loss, norm]), self.skipped[2:])
        self.skipped.copy_(torch.cat([torch.stack([self.skipped[0] + bad, in_row]), last]))
        self._watch(number, loss, ~skip)
        return skip.float()

    def _watch(self, number: Tensor, loss: Tensor, taken: Tensor) -> None:
        """Counts a spike and puts the loss among those that the next ones are compared with."""
        median = self.losses.median()
        spread = (self.losses - median).abs().median() * _DEVIATION_OF_MAD
        margin = torch.maximum(SPIKE_DEVIATIONS * spread, SPIKE_SHARE * median.abs())
        known = torch.isfinite(self.losses).all() & (number > self.warm_up)
        is_spike = taken & known & (loss - median > margin)
        last = torch.where(is_spike, torch.stack([number, loss, median]), self.spikes[1:])
        self.spikes.copy_(torch.cat([(self.spikes[0] + is_spike).view(1), last]))
        place = (number.long() % WINDOW).view(1)
        old = self.losses.index_select(0, place)
        self.losses.index_copy_(0, place, torch.where(taken, loss, old))

    def report(self, steps: int, has_samples: bool) -> tuple[dict[str, Any], list[str]]:
        """What the interval amounts to; waits for the device.

        Args:
            steps: of the interval, skipped ones included.
            has_samples: whether the objective has an auxiliary model that draws some.

        Returns:
            The figures of `interval_figures`, mean loss, gradient norms of the last step taken and
            counts of faults; and a sentence on each kind of fault, with the last step that met it.
        """
        sums = self.sums.cpu()
        skipped, _, *last_skipped = self.skipped.tolist()
        spikes, *last_spike = self.spikes.tolist()
        total, auxiliary, main = self.norms.tolist()
        taken = steps - skipped
        figures = interval_figures(sums[1:], has_samples) | {
            "loss": float(sums[0]) / taken if taken else None,
            "grad_norm": total,
            "grad_norm_auxiliary": auxiliary if has_samples else None,
            "grad_norm_main": main,
            "skipped_steps": int(skipped),
            "loss_spikes": int(spikes),
        }
        sentences = []
        if skipped:
            sentences.append(
                "step {:.0f} was skipped: loss {}, gradient norm {}".format(*last_skipped)
                + f" ({skipped:.0f} skipped since the last line)"
            )
        if spikes:
            jumped = "step {:.0f}: the loss jumped to {:.5g} from a running median of {:.5g}"
            sentences.append(jumped.format(*last_spike))
        return figures, sentences

    def clear(self) -> None:
        """Begins a new interval."""
        self.sums.zero_()
        self.skipped[0] = 0
        self.spikes[0] = 0

    def tensors(self) -> dict[str, Tensor]:
        """The state, for a checkpoint."""
        names = ("sums", "norms", "skipped", "spikes", "losses")
        return {name: getattr(self, name) for name in names}
