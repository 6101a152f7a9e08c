"""Warnings about a run: each once, with a remedy, none for a healthy one or in warm-up."""

import pytest

from metro_ext.config_schema import FIELDS
from metro_ext.health import PATIENCE, Health

HEALTHY = {
    "sample_accuracy": 0.4, "rtd_accuracy": 0.93, "rtd_majority": 0.91, "mlm_loss": 3.0,
    "sample_nats": 2.8, "grad_norm_auxiliary": 0.3, "grad_norm_main": 1.5,
}  # fmt: skip
LATE = 100 * PATIENCE


@pytest.mark.parametrize(
    ("changes", "symptom"),
    [
        ({"sample_accuracy": 0.8}, "80% of the samples are the original"),
        ({"rtd_accuracy": 0.91}, "does not yet detect replaced tokens"),
        ({"sample_nats": 0.9}, "entropy is 0.90 nats at a loss of 3.00"),
        ({"grad_norm_auxiliary": 200.0}, "the auxiliary model takes all of the step"),
        ({"grad_norm_main": 90.0}, "the main model takes all of the step"),
    ],
)
def test_each_symptom_is_told_once_with_a_remedy(changes, symptom):
    health = Health(warm_up=10, at_temperature_1=True)
    assert health.warnings(5, HEALTHY | changes) == []  # in the warm-up
    assert health.warnings(LATE, HEALTHY) == []
    (sentence,) = health.warnings(LATE, HEALTHY | changes)
    assert sentence.startswith(f"step {LATE}: ") and symptom in sentence
    named = [key for key in FIELDS if key in sentence]
    assert named, "the remedy names no option"
    assert health.warnings(LATE + 1, HEALTHY | changes) == []


def test_the_discriminator_is_given_time():
    health = Health(warm_up=10, at_temperature_1=True)
    assert health.warnings(10 * PATIENCE, HEALTHY | {"rtd_accuracy": 0.91}) == []
    assert len(health.warnings(10 * PATIENCE + 1, HEALTHY | {"rtd_accuracy": 0.91})) == 1


def test_entropy_is_judged_at_temperature_1_alone():
    health = Health(warm_up=0, at_temperature_1=False)
    assert health.warnings(LATE, HEALTHY | {"sample_nats": 0.1}) == []


@pytest.mark.parametrize("absent", [None, "missing"])
def test_objectives_without_an_auxiliary_model_have_no_symptoms(absent):
    figures = dict.fromkeys(HEALTHY) if absent is None else {}
    assert Health(0, True).warnings(LATE, figures) == []
