"""What the figures of an interval say about a run: sentences to warn with, each told once.

The failure that ELECTRA's users meet most is an auxiliary model that outruns the main one: it fills
in the original so often that hardly a token is replaced, and "original" everywhere is the best
that the main model finds. The limits are wide; a healthy run does not come near them.
"""

from collections.abc import Mapping

# Of the samples, the share equal to the original above which too little is left to detect. At 15 %
# masked it leaves fewer than 4 in 100 tokens replaced; the auxiliary models of the paper's sizes
# guess about half.
SAMPLE_ACCURACY = 0.75
# By how much the main model's RTD accuracy must exceed that of always saying "original", once the
# warm-up is PATIENCE times over.
RTD_GAIN = 0.001
PATIENCE = 10
# A model that knows what it does not know has an entropy near its loss.
ENTROPY_SHARE = 0.5
GRADIENT_RATIO = 100.0

Figures = Mapping[str, float | None]


class Health:
    """Looks at one interval after another.

    Args:
        warm_up: steps of the run's warm-up, in which nothing is out of range.
        at_temperature_1: whether the samples are drawn at 1 throughout, so that sample_nats is the
            entropy.
    """

    def __init__(self, warm_up: int, at_temperature_1: bool):
        self._warm_up, self._at_temperature_1 = warm_up, at_temperature_1
        self._told: set[str] = set()

    def warnings(self, step: int, figures: Figures) -> list[str]:
        """What is out of range at `step` and was not told before: symptom, meaning, remedy."""
        found = []
        for key, check in _CHECKS.items():
            if key == "entropy" and not self._at_temperature_1:
                continue
            needed = PATIENCE * self._warm_up if key == "rtd" else self._warm_up
            sentence = check(figures) if step > needed and key not in self._told else None
            if sentence is not None:
                self._told.add(key)
                found.append(f"step {step}: {sentence}")
        return found


def _outrun(figures: Figures) -> str | None:
    accuracy = figures.get("sample_accuracy")
    if accuracy is None or accuracy <= SAMPLE_ACCURACY:
        return None
    return (
        f"{accuracy:.0%} of the samples are the original, so that little is left to detect: the "
        "auxiliary model outruns the main one; raise objective.sampling_temperature, lower "
        "objective.mlm_weight (each also as a schedule, ..._end), or take fewer model.aux_layers"
    )


def _no_gain(figures: Figures) -> str | None:
    accuracy, majority = figures.get("rtd_accuracy"), figures.get("rtd_majority")
    if accuracy is None or majority is None or accuracy - majority >= RTD_GAIN:
        return None
    return (
        f"RTD accuracy is {accuracy:.2%}, that of always saying 'original' {majority:.2%}: the "
        "main model does not yet detect replaced tokens; if it stays so, raise "
        "objective.rtd_weight or objective.sampling_temperature, or train for longer"
    )


def _overconfident(figures: Figures) -> str | None:
    loss, nats = figures.get("mlm_loss"), figures.get("sample_nats")
    if loss is None or nats is None or nats >= ENTROPY_SHARE * loss:
        return None
    return (
        f"the auxiliary model's entropy is {nats:.2f} nats at a loss of {loss:.2f}: it is far "
        "surer than it is right and its samples repeat themselves; lower optim.lr, raise "
        "model.aux_dropout, or give it more text"
    )


def _gradients(figures: Figures) -> str | None:
    auxiliary, main = figures.get("grad_norm_auxiliary"), figures.get("grad_norm_main")
    if (
        auxiliary is None
        or main is None
        or not 0 < min(auxiliary, main) * GRADIENT_RATIO < max(auxiliary, main)
    ):
        return None
    ahead = "auxiliary" if auxiliary > main else "main"
    return (
        f"the gradient norms are {auxiliary:.3g} (auxiliary) and {main:.3g} (main): under one "
        f"clip_norm the {ahead} model takes all of the step; set the weights objective.mlm_weight "
        "and objective.rtd_weight nearer to each other"
    )


_CHECKS = {
    "outrun": _outrun,
    "rtd": _no_gain,
    "entropy": _overconfident,
    "gradients": _gradients,
}
