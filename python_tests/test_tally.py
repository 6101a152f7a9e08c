"""Steps without a finite loss and gradient are left out, counted, and end a run that has too many;
losses that jump are counted, but for those of the warm-up."""

import math
import statistics

import pytest
import torch
from test_train_step import CPU, Run

from metro_ext.objective import FIGURES
from metro_ext.tally import SPIKE_DEVIATIONS, SPIKE_SHARE, WINDOW, Tally

NAN, INF = math.nan, math.inf


def add(tally: Tally, number: int, loss: float, norm: float = 1.0) -> float:
    sums = torch.full((1 + len(FIGURES),), 2.0, dtype=torch.float64)
    sums[0] = loss
    number = torch.tensor(float(number), dtype=torch.float64)
    return float(tally.add(number, sums, torch.tensor([norm, norm / 2, norm / 2])))


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1), (INF, 1), (-INF, 1), (1, NAN), (1, INF)])
def test_a_step_that_is_not_finite_leaves_no_trace_but_its_count(loss, norm):
    tally, clean = Tally(CPU), Tally(CPU)
    for number in (1, 2, 3):
        bad = number == 2
        assert add(tally, number, loss if bad else 3.0, norm if bad else 1.0) == bad
        if not bad:
            add(clean, number, 3.0)
    assert torch.equal(tally.sums, clean.sums) and torch.equal(tally.norms, clean.norms)
    assert torch.equal(tally.losses, clean.losses)
    count, in_row, number, *found = tally.skipped.tolist()
    assert (count, in_row, number) == (1, 0, 2)
    for value, given in zip(found, (loss, norm), strict=True):
        assert value == given or (math.isnan(value) and math.isnan(given))
    figures, sentences = tally.report(3, has_samples=True)
    assert figures["skipped_steps"] == 1 and figures["loss"] == 3.0
    assert len(sentences) == 1 and sentences[0].startswith("step 2 was skipped: loss ")


def test_too_many_in_a_row_freeze_the_run():
    tally = Tally(CPU, limit=3)
    given = [NAN, NAN, 1.0, NAN, INF, NAN, 1.0, 2.0]
    skips = [add(tally, number, loss) for number, loss in enumerate(given, 1)]
    assert skips == [1, 1, 0, 1, 1, 1, 1, 1]
    # The last that was not finite, not the finite ones that came before the host looked.
    assert tally.skipped.tolist()[:3] == [5, 3, 6]
    assert tally.sums[0] == 1.0


def test_an_interval_without_a_step_taken_has_no_loss():
    tally = Tally(CPU)
    add(tally, 1, NAN)
    figures, _ = tally.report(1, has_samples=True)
    assert figures["loss"] is None and figures["mlm_loss"] is None


def noisy(count: int) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    return (20 + 0.5 * torch.randn(count, generator=generator)).tolist()


def test_spikes_are_those_of_the_definition():
    """Held against a plain running median over a list."""
    losses = noisy(400)
    for step in (150, 151, 300):
        losses[step] += 12
    losses[200], losses[201] = NAN, 21.0
    tally, window, expected = Tally(CPU, warm_up=10), {}, []
    for number, loss in enumerate(losses, 1):
        if len(window) == WINDOW:
            recent = list(window.values())
            # torch's median is the lower of the two in the middle.
            median = statistics.median_low(recent)
            spread = 1.4826 * statistics.median_low([abs(x - median) for x in recent])
            margin = max(SPIKE_DEVIATIONS * spread, SPIKE_SHARE * abs(median))
            if loss - median > margin:
                expected.append((number, loss, median))
        add(tally, number, loss)
        if math.isfinite(loss):
            window[number % WINDOW] = loss
        count, *last = tally.spikes.tolist()
        assert count == len(expected)
        if expected:
            assert last == pytest.approx(expected[-1])
    assert [number for number, *_ in expected] == [151, 152, 301]
    figures, sentences = tally.report(400, has_samples=True)
    assert figures["loss_spikes"] == 3
    assert sentences[-1].startswith("step 301: the loss jumped to ")


def test_no_alarm_in_warm_up_nor_for_losses_that_fall_or_stay():
    falling = [30 * math.exp(-n / 50) + x / 40 for n, x in enumerate(noisy(250))]
    for losses in (falling, [20.0] * 150, [20 + 1e-9 * (n % 3) for n in range(150)], noisy(250)):
        tally = Tally(CPU)
        for number, loss in enumerate(losses, 1):
            add(tally, number, loss)
        assert tally.spikes[0] == 0
    tally = Tally(CPU, warm_up=100)
    for number in range(1, 102):
        add(tally, number, 100.0 if number in (80, 101) else 20.0)
    assert tally.spikes.tolist() == [1, 101, 100, 20]


def test_the_window_outlasts_an_interval_and_a_checkpoint():
    unbroken, first, resumed = Tally(CPU), Tally(CPU), Tally(CPU)
    losses = noisy(200)
    losses[150] = 40
    for number, loss in enumerate(losses, 1):
        add(unbroken, number, loss)
        add(first if number <= 100 else resumed, number, loss)
        if number == 100:
            for name, value in resumed.tensors().items():
                value.copy_(first.tensors()[name])
    for name, value in unbroken.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name
    assert unbroken.spikes[0] == 1
    unbroken.clear()
    assert unbroken.spikes.tolist()[0] == 0 and unbroken.losses.isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_goes_on_as_if_the_bad_step_had_not_been(where, value, monkeypatch):
    """Weights and Adam's state after steps 1, bad, 3 have the bits of a run of 1, 3."""
    broken, clean = Run(), Run()
    broken.take(1)
    clean.take(1)
    run, handle = broken.engine.run, None

    def injected(*arguments):
        out = run(*arguments)
        return out.__class__(**{**vars(out), "loss": out.loss * value})

    with monkeypatch.context() as patch:
        if where == "loss":
            patch.setattr(broken.engine, "run", injected)
        else:
            parameter = broken.model.main.layers[0].qkv.weight
            handle = parameter.register_hook(lambda gradient: gradient + value)
        broken.take(2)
    if handle is not None:
        handle.remove()
    for run in (broken, clean):
        run.take(3)
    assert broken.tally.skipped[0] == 1 and clean.tally.skipped[0] == 0
    assert all(
        torch.equal(a, b) for a, b in zip(broken.parameters(), clean.parameters(), strict=True)
    )
    for name, state in broken.optimizer.tensors().items():
        assert torch.equal(state, clean.optimizer.tensors()[name]), name


def test_gradient_norms_of_both_models():
    run = Run()
    seen = {}
    for name, parameter in run.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.update({name: p.grad.detach().double().clone()})
        )
    run.take(1)

    def norm(keep):
        return math.sqrt(sum(float((g**2).sum()) for name, g in seen.items() if keep(name)))

    expected = [
        norm(lambda name: True),
        norm(lambda name: name.startswith("auxiliary")),
        norm(lambda name: not name.startswith("auxiliary")),
    ]
    assert run.tally.norms.tolist() == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 0
