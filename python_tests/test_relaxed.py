"""Relaxed synchronisation: against a plain simulation of its workers, resumed, counted, refused."""

import shutil
from pathlib import Path

import pytest
import torch
from test_distributed import SHARED, launch, records, refused, train_on

from metro_ext.batches import micro_batch_index, training_source
from metro_ext.checkpoint import load_checkpoint
from metro_ext.config import SyncConfig, load_config
from metro_ext.distributed import Traffic, World
from metro_ext.errors import UserError
from metro_ext.held_out import pack
from metro_ext.model import PAD_ID, PretrainingModel
from metro_ext.objective import FIGURES, Objective, mask_count
from metro_ext.optim import AdamW, learning_rate
from metro_ext.prepare import prepare
from metro_ext.relaxed import OuterOptimizer, check
from metro_ext.wire import BLOCK, encoded_bytes

RANKS, STEPS, INTERVAL, WARMUP = 2, 12, 4, 3
RELAXED = [
    *SHARED, "--sync=relaxed", f"--steps={STEPS}", f"--sync.interval={INTERVAL}",
    f"--sync.warmup_steps={WARMUP}", "--sync.momentum=0.8", "--sync.final_momentum=0.2",
    "--run.keep_checkpoints=9",
]  # fmt: skip


@pytest.fixture(scope="module")
def relaxed(text, tmp_path_factory) -> Path:
    """12 steps of 2 ranks, with outer steps after 3 (the warm-up), 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("relaxed") / "run"
    train_on(RANKS, folder, *RELAXED, *text)
    return folder


@pytest.fixture(scope="module")
def rounded(text, tmp_path_factory) -> Path:
    """The same in four bits."""
    folder = tmp_path_factory.mktemp("rounded") / "run"
    train_on(RANKS, folder, *RELAXED, "--sync.wire=int4", *text)
    return folder


class Worker:
    """A rank's model, inner optimizer and share of the micro-batches, in this process."""

    def __init__(self, config, prepared, rank):
        self.config, self.rank = config, rank
        self.model = PretrainingModel(config.model, "metro", config.run.seed).train()
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = AdamW(self.model, config.optim)
        self.special = torch.tensor(prepared.tokenizer.special_ids)
        mask_id = prepared.tokenizer.mask_id
        self.objective = Objective(config.objective, self.special, mask_id, torch.float32)
        self.source = training_source(
            prepared.train,
            config.run.tokens_per_batch,
            config.model.sequence_length,
            config.run.seed,
        )

    def batches(self, step):
        own = self.config.run.accumulation // RANKS
        indices = (micro_batch_index(step - 1, m, self.rank, RANKS, own) for m in range(own))
        return [self.source.batch(index) for index in indices]

    def counts(self, step):
        """Masked tokens, tokens that RTD scores, and masked tokens again for CLM."""
        found = torch.zeros(3)
        for batch in self.batches(step):
            maskable = int((~torch.isin(batch.tokens, self.special)).sum())
            fraction = self.config.objective.mask_fraction
            masked = min(mask_count(len(batch.tokens), fraction), maskable)
            scored = int((batch.tokens != PAD_ID).sum())
            found += torch.tensor([masked, scored, masked], dtype=torch.float32)
        return found

    def gradients(self, step, counts):
        self.optimizer.zero_grad()
        for batch in self.batches(step):
            tokens, packing = pack(batch, torch.device("cpu"))
            self.objective(self.model, tokens, packing, counts).loss.backward()

    def update(self, step):
        config = self.config.optim
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step(learning_rate(step, STEPS, config))


@torch.no_grad()
def outer_step(step, workers, anchor, velocity, config) -> None:
    share = max(0, step - WARMUP) / (STEPS - WARMUP)
    momentum = config.momentum + share * (config.final_momentum - config.momentum)
    for name in anchor:
        everyone = torch.stack([worker.parameters[name] for worker in workers])
        delta = anchor[name] - everyone.double().mean(0)
        velocity[name] = momentum * velocity[name] + delta
        if step <= WARMUP:
            anchor[name] = everyone[0].double()
        else:
            anchor[name] = anchor[name] - config.lr * (delta + momentum * velocity[name])
        for worker in workers:
            worker.parameters[name].copy_(anchor[name])


def simulate(folder: Path) -> tuple[dict, dict]:
    """(weights, outer momentum) of the run in a folder, its ranks taken in turn."""
    config = load_config(toml_path=folder / "config.toml")
    prepared = prepare(config, print)
    workers = [Worker(config, prepared, rank) for rank in range(RANKS)]
    anchor = {name: p.detach().double() for name, p in workers[0].parameters.items()}
    velocity = {name: torch.zeros_like(value) for name, value in anchor.items()}
    for step in range(1, STEPS + 1):
        counts = [worker.counts(step) for worker in workers]
        synchronised = step <= WARMUP
        for worker, own in zip(workers, counts, strict=True):
            worker.gradients(step, sum(counts) if synchronised else own)
        if synchronised:
            for name in anchor:
                total = sum(worker.parameters[name].grad for worker in workers)
                for worker in workers:
                    worker.parameters[name].grad = total.clone()
        for worker in workers:
            worker.update(step)
        if step in (WARMUP, 4, 8, 12):
            outer_step(step, workers, anchor, velocity, config.sync)
    return anchor, velocity


def test_ranks_give_the_weights_of_simulated_workers(relaxed):
    weights, velocity = simulate(relaxed)
    found = load_checkpoint(relaxed / "checkpoints").tensors
    for name, expected in weights.items():
        close = 1e-5 * (float(expected.abs().max()) + 1e-3)
        assert float((found[f"model.{name}"] - expected).abs().max()) < close, name
        # A difference of weights has their rounding.
        close += 1e-3 * float(velocity[name].abs().max())
        assert float((found[f"outer.{name}"] - velocity[name]).abs().max()) < close, name
    name = "optimizer.exp_avg.main.layers.0.qkv.weight"
    assert not torch.equal(found[f"rank.0.{name}"], found[f"rank.1.{name}"])


@pytest.mark.parametrize("kind", ["relaxed", "rounded"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(kind, request, text, tmp_path):
    unbroken, folder = request.getfixturevalue(kind), tmp_path / "run"
    shutil.copytree(unbroken, folder)
    for step in (8, 12):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    wire = "--sync.wire=fp32" if kind == "relaxed" else "--sync.wire=int4"
    train_on(RANKS, folder, *RELAXED, wire, *text)
    left, right = (load_checkpoint(f / "checkpoints").tensors for f in (unbroken, folder))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        assert (unbroken / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_yet_to_be_sent_is_saved_with_each_rank(relaxed, rounded):
    exact, found = (load_checkpoint(f / "checkpoints").tensors for f in (relaxed, rounded))
    keys = [f"rank.{rank}.outer.residual" for rank in range(RANKS)]
    assert found.keys() - exact.keys() == set(keys)
    one, other = (found[key] for key in keys)
    assert one.any() and other.any() and not torch.equal(one, other)


@pytest.mark.parametrize("kind, bits", [("relaxed", 32), ("rounded", 4)])
def test_bytes_are_those_of_the_exchanges(kind, bits, request):
    """Two ranks: a ring sends each buffer's size once for a sum, half of it for a gather."""
    folder = request.getfixturevalue(kind)
    found = load_checkpoint(folder / "checkpoints").tensors
    weights = sum(4 * value.numel() for key, value in found.items() if key.startswith("model."))
    outer = weights
    if bits == 4:  # half of the vector to the other rank, and the sum of half of it back
        residual = found["rank.0.outer.residual"]
        assert weights / 4 <= residual.numel() < weights / 4 + RANKS * BLOCK
        outer = encoded_bytes(residual.numel(), bits)
    # Sums of the loss and the figures, three norms, two counts of faults, whether one is to stop.
    counts, figures, failures = 3 * 8, (1 + len(FIGURES) + 3 + 2 + 1) * 8, 5 * 8 * RANKS // 2
    # Gradients of the warm-up, the next step's counts but for its last; figures at every line.
    expected = WARMUP * weights + (WARMUP - 1) * counts + STEPS * (figures + failures)
    expected += 3 * outer  # outer steps 4, 8 and 12
    assert records(folder)[-1]["sent_bytes"] == expected
    assert records(folder, "evaluation.jsonl")[-1]["sent_bytes"] == expected
    per_step = [r["sent_bytes_per_step"] for r in records(folder)]
    assert sum(per_step) == expected and per_step[5] == figures + failures


def test_a_run_of_another_number_of_ranks_is_refused(relaxed, text, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(relaxed, folder)
    line = refused(launch(1, folder, *RELAXED, *text))
    assert "of 2 ranks" in line and "found 1" in line


def test_one_rank_that_fails_ends_all(text, tmp_path):
    done = launch(2, tmp_path / "run", *RELAXED, *text, "--optim.lr=1e30", "--optim.warmup_steps=0")
    assert "expected a finite loss" in refused(done)


def parameters(seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(5, 3, generator=generator) for name in ("a", "b")}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_outer_step_is_torchs_nesterov(momentum):
    config = SyncConfig(
        interval=2, warmup_steps=0, lr=0.7, momentum=momentum, final_momentum=momentum
    )
    own = parameters()
    outer = OuterOptimizer(own, config, 100, World())
    theirs = {name: value.clone().requires_grad_() for name, value in own.items()}
    sgd = torch.optim.SGD(theirs.values(), lr=0.7, momentum=momentum, nesterov=momentum > 0)
    for step in (2, 4, 6):
        moved = parameters(step)
        for name, value in own.items():
            theirs[name].grad = theirs[name].detach() - (value + moved[name])
            value += moved[name]
        outer.step(step)
        sgd.step()
        for name, value in own.items():
            torch.testing.assert_close(value, theirs[name].detach())


@pytest.mark.parametrize("wire", ["fp32", "int4"])
def test_weights_that_are_not_finite_are_told(wire):
    own = parameters()
    outer = OuterOptimizer(own, SyncConfig(interval=2, warmup_steps=0, wire=wire), 100, World())
    own["b"][3, 1] = float("inf")
    with pytest.raises(UserError, match=r"outer step after step 2: expected finite .* in b; try"):
        outer.step(2)


def test_the_warm_up_gathers_momentum_and_moves_nothing():
    config = SyncConfig(interval=5, warmup_steps=10, momentum=0.5, final_momentum=0.0)
    own = parameters()
    start = own["a"].clone()
    outer = OuterOptimizer(own, config, 30, World())
    for step in (5, 10):
        own["a"] += step
        before = own["a"].clone()
        outer.step(step)
        assert torch.equal(own["a"], before) and torch.equal(outer.anchor["a"], before)
    torch.testing.assert_close(outer.velocity["a"], torch.full_like(start, -0.5 * 5 - 10))


def test_the_schedule():
    config = SyncConfig(interval=4, warmup_steps=6, momentum=0.9, final_momentum=0.5)
    outer = OuterOptimizer({}, config, 26, World())
    assert [step for step in range(1, 27) if outer.due(step)] == [4, 6, 8, 12, 16, 20, 24, 26]
    assert [step for step in range(1, 27) if outer.exchanged(step)] == [1, 2, 3, 4, 5, 6]
    assert [outer.momentum(step) for step in (1, 6, 16, 26)] == pytest.approx([0.9, 0.9, 0.7, 0.5])


def test_a_ring_sends_what_it_must():
    traffic = Traffic()
    traffic.all_reduce(800, ranks=4)
    traffic.part(800, ranks=4)
    assert traffic.sent == 2 * 600 + 600
    alone = Traffic()
    alone.all_reduce(800, ranks=1)
    assert alone.sent == 0


@pytest.mark.parametrize(
    "option, expected",
    [
        ("--parallel=fsdp2", r"sync.mode=relaxed needs .*parallel.mode=ddp; found fsdp2"),
        (
            "--run.eval_interval=6",
            r"run.eval_interval must be a multiple of sync.interval.*6 for 4",
        ),
        ("--run.checkpoint_interval=2", r"run.checkpoint_interval must be a multiple"),
    ],
)
def test_what_does_not_go_together_is_refused(option, expected):
    options = ["--sync=relaxed", "--sync.interval=4", "--run.eval_interval=8", option]
    config = load_config(["--run.checkpoint_interval=8", *options])
    with pytest.raises(UserError, match=expected):
        check(config)


def exchange_in_bfloat16(rank: int, port: int, results) -> None:
    import os

    from metro_ext.distributed import connect, disconnect

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    world = connect("gloo", 60)
    own = parameters()
    config = SyncConfig(
        interval=1, warmup_steps=0, lr=1.0, momentum=0.0, final_momentum=0.0, wire="bf16"
    )
    outer = OuterOptimizer(own, config, 9, world)
    for value in own.values():
        value += 1e-3 * (1 + rank)
    outer.step(1)
    results.put((rank, world.traffic.sent, {name: value.tolist() for name, value in own.items()}))
    disconnect()


def test_deltas_in_bfloat16_are_half_the_bytes_and_the_same_on_all_ranks():
    from test_distributed import free_port

    context = torch.multiprocessing.get_context("spawn")
    results, port = context.SimpleQueue(), free_port()
    ranks = [context.Process(target=exchange_in_bfloat16, args=(r, port, results)) for r in (0, 1)]
    for process in ranks:
        process.start()
    (_, sent, left), (_, _, right) = sorted(
        (results.get() for _ in ranks), key=lambda found: found[0]
    )
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert left == right and sent == 2 * 2 * 15
    for name, value in parameters().items():
        torch.testing.assert_close(torch.tensor(left[name]), value + 1.5e-3, rtol=0, atol=1e-5)
