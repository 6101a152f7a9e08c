"""The step on memory that stays in place: filled by copy, read without a synchronisation."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metro_ext.batches import PAD_POSITION, Batch
from metro_ext.config_schema import Config, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from metro_ext.distributed import World
from metro_ext.held_out import pack
from metro_ext.objective import Objective
from metro_ext.ops import METRICS
from metro_ext.optim import AdamW
from metro_ext.parallel import engine
from metro_ext.tally import Tally
from metro_ext.train_step import StepInputs, TrainStep

CPU = torch.device("cpu")
SPECIAL, MASK_ID = torch.tensor([0, 1, 2, 3, 4]), 4
MODEL = ModelConfig(
    layers=1, hidden=16, ffn=32, heads=2, aux_layers=1, vocab_size=40, sequence_length=16
)


def batch(seed, tokens=48, length=16) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        tokens=torch.randint(5, MODEL.vocab_size, (tokens,), generator=generator),
        positions=torch.arange(tokens) % length + PAD_POSITION + 1,
        cu_seqlens=torch.arange(0, tokens + 1, length, dtype=torch.int32),
        max_seqlen=length,
        index=seed,
        seed=torch.tensor(seed),
    )


class Run:
    """Everything that a step needs, with `accumulation` micro-batches of 48 tokens."""

    def __init__(self, objective="metro", accumulation=1, device=CPU):
        self.config = Config(
            model=MODEL,
            objective=ObjectiveConfig(name=objective),
            optim=OptimConfig(clip_norm=0.5),
            run=RunConfig(tokens_per_batch=48, accumulation=accumulation),
        )
        head = Objective(self.config.objective, SPECIAL.to(device), MASK_ID, torch.float32)
        self.engine = engine(self.config, head, device, World())
        self.model = self.engine.model.train()
        self.optimizer = AdamW(self.engine, self.config.optim)
        self.accumulation, self.device = accumulation, device
        self.inputs = StepInputs(self.batches(1), device)
        self.tally = Tally(device)
        self.step = TrainStep(
            self.config, self.engine, self.optimizer, World(), self.inputs, self.tally
        )

    def batches(self, number):
        return [batch(100 * number + micro) for micro in range(self.accumulation)]

    def take(self, number, rate=0.01):
        self.inputs.fill(number, self.batches(number), torch.full((3,), 7.0).double(), rate)
        self.step()

    def parameters(self):
        return [p.detach().clone() for p in self.model.parameters()]


class NoSynchronisation(TorchDispatchMode):
    """Fails on what makes the host wait for a device: reading a value, a shape that follows one."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not any(name.startswith(wait) for wait in self.WAITS), f"{function} waits"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("objective", ["metro", "electra", "clm-all", "mlm"])
def test_no_step_reads_a_value(objective, accumulation):
    run = Run(objective, accumulation)
    for number in (1, 2):
        run.inputs.fill(number, run.batches(number), torch.ones(3, dtype=torch.float64), 0.01)
        with NoSynchronisation():
            run.step()
    assert run.tally.skipped[0] == 0 and run.tally.norms.isfinite().all()


def test_the_check_sees_a_read():
    with pytest.raises(AssertionError, match="waits"), NoSynchronisation():
        float(torch.ones(()))


def addresses(inputs: StepInputs) -> list[int]:
    found = [inputs.counts, inputs.upcoming, inputs.rate, inputs.number]
    for tokens, packing in inputs.batches:
        found += [tokens, packing.positions, packing.cu_seqlens, packing.seed]
    return [tensor.data_ptr() for tensor in found]


def test_inputs_stay_in_place_and_own_their_memory():
    run = Run(accumulation=2)
    before = addresses(run.inputs)
    given = run.batches(3)
    run.inputs.fill(3, given, torch.tensor([1.0, 2.0, 3.0]).double(), 0.25)
    assert addresses(run.inputs) == before
    given_memory = {tensor.data_ptr() for one in given for tensor in (one.tokens, one.seed)}
    assert not given_memory & set(before)
    for (tokens, packing), one in zip(run.inputs.batches, given, strict=True):
        assert torch.equal(tokens, one.tokens) and torch.equal(packing.seed, one.seed)
        assert torch.equal(packing.positions, one.positions)
        assert torch.equal(packing.cu_seqlens, one.cu_seqlens)
    assert run.inputs.rate == 0.25 and run.inputs.number == 3
    assert run.inputs.upcoming.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "wrong",
    [
        batch(1, tokens=32),
        batch(1, length=12),
        dataclasses.replace(batch(1), cu_seqlens=torch.zeros(1, dtype=torch.int32)),
        dataclasses.replace(batch(1), tokens=batch(1).tokens.int()),
    ],
    ids=["tokens", "length", "sequences", "dtype"],
)
def test_another_shape_is_refused(wrong):
    run = Run()
    with pytest.raises(ValueError, match="StepInputs: expected"):
        run.inputs.fill(1, [wrong], torch.zeros(3, dtype=torch.float64), 0.01)


def test_the_step_hands_the_next_ones_counts_on():
    run = Run(accumulation=2)
    run.inputs.counts.fill_(14.0)
    run.inputs.fill(1, run.batches(1), torch.tensor([4.0, 5.0, 6.0]).double(), 0.01)
    run.step()
    assert run.inputs.counts.tolist() == [4.0, 5.0, 6.0]


def test_accumulation_gives_the_step_of_one_large_batch():
    """Its gradient is the mean over all masked tokens, however these fall into micro-batches.

    The reference takes each micro-batch alone, with the mean over its own masked tokens, and
    weights it by their number. The two micro-batches have different numbers.
    """
    alone, together = Run("mlm", accumulation=2), Run("mlm", accumulation=2)
    micro = [batch(1), batch(2)]
    micro[1].tokens[:44] = 0  # special: not to be masked, which leaves 4
    gradients, counts = [], []
    for one in micro:
        alone.optimizer.zero_grad()
        tokens, packing = pack(one, CPU)
        out = alone.engine.run(alone.model, tokens, packing, None)
        out.loss.backward()
        gradients.append([p.grad.double().clone() for p in alone.model.parameters()])
        counts.append(float(out.metrics[METRICS.index("mlm_count")]))
    assert 0 < counts[1] < counts[0]
    total = sum(counts)
    expected = [sum(c / total * g for c, g in zip(counts, pair, strict=True))
                for pair in zip(*gradients, strict=True)]  # fmt: skip
    norm = torch.stack([g.norm() for g in expected]).norm()
    together.inputs.counts.copy_(torch.tensor([total, 96.0, total]))
    together.inputs.fill(1, micro, torch.ones(3, dtype=torch.float64), 0.01)
    together.step()
    assert float(together.tally.norms[0]) == pytest.approx(float(norm), rel=1e-5)
    scale = min(1.0, 0.5 / float(norm))  # clipped
    for found, g in zip(together.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.grad.double(), scale * g, rtol=1e-4, atol=1e-7)


def test_sums_are_those_of_the_steps():
    alone = []
    for steps in ([1, 2], [2]):
        run = Run("mlm")
        for number in (1, 2):
            if number == steps[0]:
                run.tally.sums.zero_()
            run.take(number)
        alone.append(run.tally.sums.clone())
    first = Run("mlm")
    first.take(1)
    assert torch.equal(first.tally.sums + alone[1], alone[0])
