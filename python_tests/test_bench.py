"""The benchmarks' own logic: a wrong harness makes every figure wrong."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Last, so that an installed metro_ext is found before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import harness, ops, step
from bench.cases import FAMILIES, all_cases
from bench.harness import Case, emit
from bench.peers.sampling import SAMPLING
from bench.timing import (
    LEAST_ROUNDS,
    CopyCeiling,
    MatrixCeiling,
    Stopwatch,
    Work,
    interleave,
    map_large_blocks,
    medians,
    peak_memory,
    peak_of_call,
    start_peak,
)
from bench.workers import Worker, WorkerError
from metro_ext.errors import UserError
from metro_ext.hardware import keep_freed_memory

REPOSITORY = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
CASE_KEYS = {
    "name", "ours", "peers", "ratio", "ratios", "lesser", "floor_seconds", "floor_share",
    "peak_mb", "peers_peak_mb", "peak_ratios", "spread", "figures",
}  # fmt: skip
MACHINE_KEYS = {"cpu", "cores", "isa", "memory_gb", "gpu", "torch", "python", "threads"}

TINY_WORKER = """
import os, signal, sys
from bench.workers import serve

calls = 0

def count(by):
    global calls
    calls += by
    print("noise of a library")  # must not reach the parent
    os.write(1, b"noise of a kernel\\n")
    return {"name": sys.argv[2], "calls": calls, "extra": sys.argv[3:]}

def fail():
    raise ValueError("first line\\nsecond line")

if __name__ == "__main__":
    serve({"count": count, "fail": fail, "die": lambda: os.kill(os.getpid(), signal.SIGKILL)})
"""


@pytest.fixture
def tiny_worker(tmp_path, monkeypatch):
    """The name of a module whose workers count their calls."""
    (tmp_path / "tiny_worker.py").write_text(TINY_WORKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "tiny_worker"


def example() -> Case:
    return Case(
        name="example",
        ours=2.0,
        peers={"slow": 6.0, "quick": 3.0, "cheat": 1.0, "gone": "absent: not installed"},
        lesser={"cheat": "the work"},
        floor_seconds=0.5,
        peak_mb=100.0,
        peers_peak_mb={"slow": 400.0, "quick": 200.0},
        spread={"ours": (1.9, 2.2)},
        figures={"tokens_per_s": {"ours": 10.0}, "odd": 1 / 3},
    )


def test_ratio_is_to_the_best_peer_that_does_all_the_work():
    case = example()
    assert case.ratio == 1.5
    assert case.ratios == {"slow": 3.0, "quick": 1.5, "cheat": 0.5}
    assert case.floor_share == 0.25
    assert case.peak_ratios == {"slow": 0.25, "quick": 0.5}


def test_ratio_without_a_peer_is_none():
    case = Case("alone", 1.0, peers={"gone": "absent: CUDA only"})
    assert (case.ratio, case.floor_share, case.peak_ratios) == (None, None, {})


def test_last_line_is_the_record(capsys, tmp_path):
    path = tmp_path / "record.json"
    emit("example", [example()], ceilings={"copy GB/s": 12.5}, threads=3, output=path)
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert set(record) == {"script", "date", "commit", "device", "machine", "ceilings", "cases"}
    assert set(record["machine"]) == MACHINE_KEYS
    assert record["machine"]["threads"] == 3
    assert record["device"] == "cpu"
    assert record["date"].endswith("+00:00")
    assert record["ceilings"] == {"copy GB/s": 12.5}
    (case,) = record["cases"]
    assert set(case) == CASE_KEYS
    assert case["peers"]["gone"] == "absent: not installed"
    assert case["figures"]["odd"] == 0.333333
    assert json.loads(path.read_text()) == record
    assert any("cheat" in line and "without: the work" in line for line in lines)


def test_bare_output_name_lies_in_results(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    emit("example", [], output="machine.json")
    assert json.loads((tmp_path / "results" / "machine.json").read_text())["cases"] == []


def test_output_into_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        emit("example", [], output=tmp_path / "nowhere" / "record.json")


def test_a_figure_that_is_not_a_number_is_refused(capsys):
    with pytest.raises(ValueError, match="JSON compliant"):
        emit("example", [Case("broken", math.nan)])


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.345, "12.35 s"), (0.0123, "12.30 ms"), (4.2e-6, "4.200 us")]
)
def test_seconds_carry_their_unit(seconds, text):
    assert harness.seconds_text(seconds) == text


class FakeClock:
    """Stands still until it is told to pass."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_medians_on_a_fake_clock():
    clock = FakeClock()
    watch = Stopwatch(CPU, clock=clock)
    turns, durations = [], {"a": [9, 9, 1, 5, 3], "b": [9, 9, 2, 2, 8]}

    def contender(name):
        def work():
            turns.append(name)
            clock.now += durations[name][turns.count(name) - 1]

        return lambda: watch.time(work)

    times = interleave({name: contender(name) for name in "ab"}, rounds=3, warmup=2)
    assert turns == ["a", "b"] * 5
    assert times == {"a": [1, 5, 3], "b": [2, 2, 8]}
    assert medians(times) == {"a": 3, "b": 2}


def test_no_turn_begins_after_the_time_is_up():
    clock = FakeClock()

    def contender():
        clock.now += 1.0
        return 1.0

    for seconds, rounds in ((3.0, LEAST_ROUNDS), (12.5, 12), (100.0, 20)):
        times = interleave({"a": contender}, 20, 1, seconds=seconds, clock=clock)
        assert times == {"a": [1.0] * rounds}


def test_rest_before_each_call(monkeypatch):
    rests = []
    monkeypatch.setattr("bench.timing.time.sleep", rests.append)
    interleave({"a": lambda: 1.0, "b": lambda: 1.0}, rounds=2, warmup=1, pause=0.5)
    assert rests == [0.5] * 6


def test_floor_is_the_longer_of_memory_and_arithmetic():
    work = Work(bytes=100.0, flops=60.0)
    assert work.floor(bytes_per_s=10.0, flops_per_s=20.0) == 10.0
    assert work.floor(bytes_per_s=100.0, flops_per_s=20.0) == 3.0
    assert Work(bytes=1.0).floor(1.0, math.inf) == 1.0


def test_ceilings_state_the_work_that_they_time(monkeypatch):
    monkeypatch.setattr("bench.timing.COPY_BYTES", {"cpu": 1 << 16})
    copy, product = CopyCeiling(CPU), MatrixCeiling(8, 4, 16, torch.bfloat16, CPU)
    assert copy() > 0
    assert torch.equal(copy.target, copy.source)
    assert copy.bytes == 2 * copy.source.numel() * 4
    assert product() > 0
    assert product.flops == 2 * 8 * 4 * 16


@pytest.mark.skipif(start_peak(CPU) is None, reason="this system cannot reset a peak")
def test_peak_memory_sees_what_was_freed():
    size = 64 << 20
    held = start_peak(CPU)
    block = torch.ones(size // 4)
    del block
    peak = peak_memory(CPU) - held
    assert size * 0.95 <= peak <= size * 1.5
    held = start_peak(CPU)
    assert peak_memory(CPU) - held < size / 4


@pytest.mark.skipif(start_peak(CPU) is None, reason="this system cannot reset a peak")
def test_peak_of_a_call_does_not_depend_on_what_the_allocator_kept():
    size = 64 << 20
    assert keep_freed_memory()
    try:
        torch.ones(size)  # freed, and kept
        peak = peak_of_call(CPU, lambda: torch.ones(size // 4))
    finally:
        map_large_blocks()
    assert size * 0.95 <= peak <= size * 1.5


def test_workers_keep_their_state_and_answer_in_turns(tiny_worker):
    with Worker(tiny_worker, "one", ["--x", "1"]) as one, Worker(tiny_worker, "two") as two:
        assert one.call("count", by=1) == {"name": "one", "calls": 1, "extra": ["--x", "1"]}
        assert two.call("count", by=5)["calls"] == 5
        assert one.call("count", by=1)["calls"] == 2
    assert one.process.returncode == two.process.returncode == 0


def test_a_worker_outlives_an_error(tiny_worker, capfd):
    with Worker(tiny_worker, "one") as worker:
        with pytest.raises(WorkerError, match=r"^one: ValueError: first line$"):
            worker.call("fail")
        assert worker.call("count", by=1)["calls"] == 1
    assert "second line" in capfd.readouterr().err


def test_a_worker_that_dies_is_named(tiny_worker):
    with Worker(tiny_worker, "one") as worker:
        with pytest.raises(WorkerError, match="one: killed by SIGKILL"):
            worker.call("die")
        with pytest.raises(WorkerError, match="one: killed by SIGKILL"):
            worker.call("count", by=1)


@pytest.mark.parametrize("how", SAMPLING)
def test_peers_sample_from_the_softmax(how):
    chances = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    count = 40_000
    torch.manual_seed(3)
    drawn = SAMPLING[how](chances.log().expand(count, -1).contiguous())
    counts = torch.bincount(drawn, minlength=len(chances)).double()
    assert counts[1] == 0
    expected = chances.double() * count
    possible = expected > 0
    statistic = ((counts - expected) ** 2 / expected)[possible].sum()
    assert statistic < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_every_family_is_covered_by_cases_of_its_name():
    for device in ("cpu", "cuda"):
        for small in (False, True):
            cases = all_cases(device, small)
            assert {case.family for case in cases} == set(FAMILIES)
            names = [case.name for case in cases]
            assert len(set(names)) == len(names)
            assert all("ours" in case.contenders for case in cases)


@pytest.mark.parametrize("case", all_cases("cpu", True), ids=lambda case: case.name)
def test_contenders_do_the_same_work(case):
    """Where nothing is random, ours and eager torch give the same result and gradients."""
    if "dropout" in case.name or "sampled" in case.name or case.name.startswith("mask_tokens"):
        pytest.skip("draws differ")
    dtype = "int64" if case.dtypes == ("int64",) else "fp32"
    ours = ops.Bench(case, case.contenders["ours"], dtype, CPU)
    eager = ops.Bench(case, case.contenders["eager"], dtype, CPU)
    mode = ops.BOTH if case.gradients else ops.FORWARD
    for bench in (ours, eager):
        results, peak = bench.prepare(mode)
        assert results > 0 and (peak is None or peak >= 0)
        assert bench.run(mode) > 0
    torch.testing.assert_close(ours.forward()[0], eager.forward()[0], rtol=1e-4, atol=1e-5)
    if case.gradients:
        count = len(case.gradients)
        for mine, other in zip(ours.both()[-count:], eager.both()[-count:], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("main", "argv", "sentence"),
    [
        (ops.main, ["gelo"], "no operator family 'gelo'"),
        (ops.main, ["--rounds", "0"], "--rounds"),
        (step.main, ["--tokens", "100", "--seq", "64"], "multiple of --seq"),
        (step.main, ["--steps", "0"], "--steps"),
    ],
)
def test_mistakes_get_a_sentence(main, argv, sentence):
    with pytest.raises(UserError, match=sentence):
        main(argv)


def last_line(*command: str) -> dict:
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_ops_script_runs_small():
    options = ["gelu", "--small", "--no-compile", "--rounds", "2", "--warmup", "0"]
    record = last_line("bench/ops.py", *options, "--dtype", "fp32", "--threads", "1")
    forward, both = record["cases"]
    assert forward["name"].endswith("fp32 forward")
    assert both["name"].endswith("fp32 forward + backward")
    for case in (forward, both):
        assert case["ours"] > 0
        assert case["peers"]["eager"] > 0
        assert case["peers"]["compiled"].startswith("absent: ")
        assert case["floor_seconds"] > 0
    assert record["machine"]["threads"] == 1


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
    record = last_line(
        "bench/step.py", *TINY_STEP, "--precision", precision, "--contenders", *peers
    )
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
    ours = step.OurStep(options).model.eval()
    model_config, objective, _ = step.configs(options)
    peer = MetroFromMPNet(model_config, objective, torch.arange(5), step.MASK_ID, "gumbel").eval()
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in ours.parameters())
    copy_encoder(ours.main, peer.main)
    batch = step.random_batches(options)[0]
    tokens, packing = step.OurStep._pack(batch, seed=0)
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


def test_attention_on_cuda_meets_flex_attention_and_itself_without_bias():
    plain, dropout = (c for c in all_cases("cuda", True) if c.family == "attention")
    assert not plain.contenders["flex attention"].absent
    assert dropout.contenders["flex attention"].absent == "has no dropout"
    bench = ops.Bench(plain, plain.contenders["ours no bias"], "fp32", CPU)
    assert bench.leaves_out_work
    bench.prepare(ops.BOTH)
    out, grad_qkv, grad_bias = bench.both()
    assert grad_bias is None and grad_qkv.norm() > 0
    (with_bias, *_) = ops.Bench(plain, plain.contenders["ours"], "fp32", CPU).forward()
    assert out.shape == with_bias.shape and not torch.allclose(out, with_bias)


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

    monkeypatch.setattr(step, "GraphedStep", Called)
    options = step.parse([*TINY_STEP, "--precision", "fp32"])
    eager, graphed = step.OurStep(options), step.OurGraphedStep(options)
    next(eager.batches)  # the one whose shapes the graph was made for
    for _ in range(step.WARM_UP_STEPS + 1):
        eager()
    for _ in range(3):
        assert float(graphed()) == pytest.approx(float(eager()), rel=1e-5)


def test_a_graph_is_for_cuda_and_the_step_as_it_is():
    options = step.parse(["--precision", "bf16"])
    assert step.own_names(options) == ["ours"]
    options.device = "cuda"
    assert step.own_names(options) == ["ours", "ours graphed"]
    options.compile_ours = True
    assert step.own_names(options) == ["ours"]
