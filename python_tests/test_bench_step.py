"""bench/step.py: both contenders are the same model, their turns, and a small run."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from bench_scripts import records

# Last, so that an installed metro_ext is found before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import step, step_profile, step_worker
from bench.workers import Crew, WorkerError
from metro_ext.cuda_graph import WARM_UP_STEPS
from metro_ext.errors import UserError
from metro_ext.objective import mask_count
from metro_ext.presets import flops_per_token

TINY_STEP = [
    "--layers=1", "--aux-layers=1", "--hidden=32", "--heads=2", "--vocab=128", "--tokens=64",
    "--seq=16", "--steps=1", "--warmup=0", "--threads=1",
]  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_script_runs_small(precision):
    peers = {"fp32": ["hf eager"], "bf16": ["hf eager autocast", "hf eager masters"]}[precision]
    options = [*TINY_STEP, "--precision", precision, "--running-record", "--contenders", *peers]
    first, *_, record = records("bench/step.py", *options)
    (alone,) = first["cases"]
    assert alone["ours"] > 0 and alone["peers"] == {}
    (case,) = record["cases"]
    assert set(case["peers"]) == set(peers)
    assert all(seconds > 0 for seconds in case["peers"].values())
    assert set(case["peers_peak_mb"]) == set(peers)
    assert case["floor_seconds"] > 0
    assert case["figures"]["masked"] == 10
    # Both start at the loss of knowing nothing: ln V for MLM and CLM, 50 ln 2 for RTD.
    blank = 2 * math.log(128) + 50 * math.log(2)
    for first, _ in case["figures"]["first_and_last_loss"].values():
        assert first == pytest.approx(blank, rel=0.01)


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_the_peer_is_the_same_model():
    """As many parameters as ours, and the same hidden states from the same weights."""
    from bench.peers.hf_mpnet import MetroFromMPNet

    options = step.parse([*TINY_STEP, "--precision", "fp32"])
    ours = step_worker.OurStep(options).model.eval()
    model_config, objective, _ = step.configs(options)
    peer = MetroFromMPNet(
        model_config, objective, torch.arange(5), step_worker.MASK_ID, "gumbel"
    ).eval()
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in ours.parameters())
    copy_encoder(ours.main, peer.main)
    batch = step_worker.random_batches(options)[0]
    tokens, packing = step_worker.OurStep._pack(batch, seed=0)
    with torch.no_grad():
        mine = ours.main(tokens, packing, ours.main.table(torch.float32))
        other = peer._encode(peer.main, batch)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def copy_encoder(ours, theirs) -> None:
    """Our encoder's weights into an MPNetModel."""
    embeddings = theirs.embeddings
    embeddings.word_embeddings.weight.copy_(ours.embeddings.token)
    embeddings.position_embeddings.weight.copy_(ours.embeddings.position)
    embeddings.LayerNorm.load_state_dict(ours.embeddings.norm.state_dict())
    theirs.encoder.relative_attention_bias.weight.copy_(ours.relative_bias)
    for mine, other in zip(ours.layers, theirs.encoder.layer, strict=True):
        attention = other.attention.attn
        for part, weight, bias in zip(
            (attention.q, attention.k, attention.v),
            mine.qkv.weight.chunk(3),
            mine.qkv.bias.chunk(3),
            strict=True,
        ):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        attention.o.load_state_dict(mine.attention_out.state_dict())
        other.attention.LayerNorm.load_state_dict(mine.attention_norm.state_dict())
        other.intermediate.dense.load_state_dict(mine.ffn_in.state_dict())
        other.output.dense.load_state_dict(mine.ffn_out.state_dict())
        other.output.LayerNorm.load_state_dict(mine.ffn_norm.state_dict())


def test_mfu_is_useful_work_over_the_data_sheet(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    options = step.parse(["--precision", "bf16"])
    assert step._utilisation(options, 1e12, {"ours": 1.0}) == {}
    options.device = "cuda"
    figures = step._utilisation(options, 989e12, {"ours": 2.0, "hf": 4.0})
    assert figures == {"mfu": {"ours": 0.5, "hf": 0.25}}


def test_the_graphed_step_takes_the_steps_of_the_eager_one(monkeypatch):
    """With the graph's launch replaced by a call of what it would have captured."""

    class Called:
        def __init__(self, take, device):
            self.take = take

        def __call__(self):
            self.take()

    monkeypatch.setattr(step_worker, "GraphedStep", Called)
    options = step.parse([*TINY_STEP, "--precision", "fp32"])
    eager, graphed = step_worker.OurStep(options), step_worker.OurGraphedStep(options)
    next(eager.batches)  # the one whose shapes the graph was made for

    def warm_up_and_capture():
        batch = next(eager.batches)
        losses = [eager._take(*batch, eager.optim.lr) for _ in range(WARM_UP_STEPS + 1)]
        assert float(graphed()) == pytest.approx(float(losses[-1]), rel=1e-5)

    for _ in range(2):
        warm_up_and_capture()
        for _ in range(3):
            assert float(graphed()) == pytest.approx(float(eager()), rel=1e-5)
        graphed.park()
        assert graphed.graphed is None  # and with it goes the memory of its step


def test_a_turn_on_cuda_fetches_its_memory_untimed_and_gives_it_back(monkeypatch):
    events = []

    class Step:
        class optimizer:
            zero_grad = staticmethod(lambda: events.append("gradients freed"))

        def __call__(self):
            events.append("step")
            return torch.zeros(())

    class Watch:
        seconds = iter(range(100))

        def time(self, function):
            function()
            return float(next(self.seconds))

    monkeypatch.setattr(step_worker, "make_step", lambda *_: Step())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("given back"))
    turns = step_worker.Turns("hf eager", step.parse(["--precision", "bf16"]))
    turns.device, turns.watch = torch.device("cuda"), Watch()
    parked = ["gradients freed", "given back"]
    assert turns.prepare() == 0.0
    assert events == ["step", *parked]
    events.clear()
    assert turns.turn() == 3.0  # the last of the three
    assert events == ["step"] * 3 + parked
    events.clear()
    turns.device = torch.device("cpu")
    assert turns.turn() == 4.0
    assert events == ["step"]
    assert len(turns.losses) == 5


class StubWorker:
    """A contender, or the ceilings; its steps fail after some, for want of memory."""

    def __init__(self, seconds: float = 1.0, steps: int = 1000):
        self.seconds, self.steps, self.closed = seconds, steps, False

    def call(self, method: str, **_):
        if method == "step":
            self.steps -= 1
            if self.steps < 0:
                raise WorkerError("hf eager autocast: OutOfMemoryError: CUDA out of memory")
        answers = {"step": self.seconds, "peak": 5e6, "losses": [2.0, 1.0], "names": ["linear"],
                   "measure": 0.5, "flops": 1e9, "threads": 2}  # fmt: skip
        return answers[method]

    def close(self):
        self.closed = True


def measure_with(**workers: StubWorker) -> dict:
    options = step.parse([*TINY_STEP, "--precision=bf16", "--steps=3", "--warmup=1"])
    crew = Crew("no module", needed=["ours"])
    crew.workers = {name.replace("_", " "): worker for name, worker in workers.items()}
    crew.muster(list(crew.workers))
    names = list(crew.present)
    return step._measure_present(options, crew, names, StubWorker(), {"ours": 1.0})


def test_a_peer_that_runs_out_of_memory_leaves_the_run():
    lost = StubWorker(steps=2)  # one round more than the warm-up
    measured = measure_with(
        ours=StubWorker(2.0), hf_eager_autocast=lost, hf_compiled_autocast=StubWorker(3.0)
    )
    (case,) = measured["cases"]
    assert lost.closed
    assert case.ours == 2.0 and case.ratios == {"hf compiled autocast": 1.5}
    assert case.peers["hf eager autocast"] == (
        "absent: hf eager autocast: OutOfMemoryError: CUDA out of memory"
    )
    assert set(case.figures["tokens_per_s"]) == {"ours", "hf compiled autocast"}
    assert measured["ceilings"] == {"linear GFLOP/s": 2.0} and measured["threads"] == 2
    with pytest.raises(WorkerError, match="out of memory"):
        measure_with(ours=StubWorker(steps=2), hf_eager_autocast=StubWorker())


def test_a_graph_that_fails_is_named_among_the_figures():
    (case,) = measure_with(ours=StubWorker(2.0), ours_graphed=StubWorker(1.5))["cases"]
    assert case.figures["ours_graphed_seconds"] == 1.5 and case.peers == {}
    (case,) = measure_with(ours=StubWorker(2.0), ours_graphed=StubWorker(steps=0))["cases"]
    assert case.figures["ours_graphed_seconds"].startswith("absent: ") and case.peers == {}


@pytest.mark.parametrize(
    "argv, sentence",
    [(["--tokens", "100", "--seq", "64"], "multiple of --seq"), (["--steps", "0"], "--steps")],
)
def test_mistakes_get_a_sentence(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        step.main(argv)


def test_a_graph_is_for_cuda_and_the_step_as_it_is():
    options = step.parse(["--precision", "bf16"])
    assert step.own_names(options) == ["ours"]
    options.device = "cuda"
    assert step.own_names(options) == ["ours", "ours graphed"]
    options.compile_ours = True
    assert step.own_names(options) == ["ours"]


def test_the_profile_books_every_product_and_operator():
    options = step.parse(["--precision", "bf16"])
    model, objective, _ = step.configs(options)
    masked = mask_count(options.tokens, objective.mask_fraction)
    flops = step_profile.products(model, options.tokens, masked)
    expected = flops_per_token(model, objective) * options.tokens
    assert sum(flops.values()) == pytest.approx(expected, rel=1e-3)
    assert set(flops) < set(step_profile.PARTS)
    (record,) = records("bench/step_profile.py", *TINY_STEP, "--precision", "fp32")
    whole, *parts = record["cases"]
    assert whole["ours"] > 0
    shares = [part["figures"]["share_of_step"] for part in parts]  # of six digits each
    assert sum(shares) == pytest.approx(1, rel=1e-5)
    assert {"attention", "layer_norm", "vocabulary heads", "AdamW"} <= {p["name"] for p in parts}
