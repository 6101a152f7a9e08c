"""bench/ops.py: its cases, what it times of them, and a small run."""

import sys
from pathlib import Path

import pytest
import torch
from bench_scripts import records

# Last, so that an installed metro_ext is found before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import op_worker, ops
from bench.cases import FAMILIES, all_cases
from bench.cases.common import BACKWARD, BOTH, FORWARD
from bench.ceilings import Ceilings
from bench.peers.sampling import SAMPLING
from bench.timing import Work
from bench.workers import Crew, WorkerError
from metro_ext.errors import UserError

CPU = torch.device("cpu")


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
    ours = op_worker.Bench(case, case.contenders["ours"], dtype, CPU)
    eager = op_worker.Bench(case, case.contenders["eager"], dtype, CPU)
    for bench in (ours, eager):
        for mode in case.modes:
            results, peak = bench.prepare(mode)
            assert results > 0 and (peak is None or peak >= 0)
            assert bench.run(mode) > 0
    torch.testing.assert_close(ours.forward()[0], eager.forward()[0], rtol=1e-4, atol=1e-5)
    if case.gradients:
        count = len(case.gradients)
        for mine, other in zip(ours.both()[-count:], eager.both()[-count:], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_attention_on_cuda_meets_flex_attention_and_itself_without_bias():
    plain, dropout = (c for c in all_cases("cuda", True) if c.family == "attention")
    assert not plain.contenders["flex attention"].absent
    assert dropout.contenders["flex attention"].absent == "has no dropout"
    bench = op_worker.Bench(plain, plain.contenders["ours no bias"], "fp32", CPU)
    assert bench.leaves_out_work
    bench.prepare(BOTH)
    out, grad_qkv, grad_bias = bench.both()
    assert grad_bias is None and grad_qkv.norm() > 0
    (with_bias, *_) = op_worker.Bench(plain, plain.contenders["ours"], "fp32", CPU).forward()
    assert out.shape == with_bias.shape and not torch.allclose(out, with_bias)


def case_named(start: str):
    """The first of the small ones."""
    return next(case for case in all_cases("cpu", True) if case.name.startswith(start))


def test_backward_alone_is_the_backward_of_both():
    case = case_named("bias_gelu")
    bench = op_worker.Bench(case, case.contenders["ours"], "fp32", CPU)
    bench.prepare(BACKWARD)
    # What waits for its backward pass outgrows a cache, or is as many as there may be.
    assert bench.depth == op_worker.MOST_COPIES
    bench.run(BACKWARD)
    forwards = []
    bench.function = lambda **inputs: (
        forwards.append(1) or case.contenders["ours"].build()(**inputs)
    )
    bench._ready(BACKWARD)
    assert len(bench.graphs) == bench.depth and len(forwards) == 1
    alone = bench.backward()
    assert len(forwards) == 1  # none of its own: that is what makes it the backward pass alone
    assert len(bench.graphs) == bench.depth - 1
    for mine, other in zip(alone, bench.both()[1:], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_depth_counts_what_the_forward_pass_keeps(monkeypatch):
    monkeypatch.setattr(op_worker, "COLD_BYTES", 1_000_000)
    case = case_named("bias_gelu")
    x, bias = 64 * 48 * 4, 48 * 4
    for name, kept in (("ours", x + bias), ("eager", 2 * x + bias)):  # eager keeps the sum
        bench = op_worker.Bench(case, case.contenders[name], "fp32", CPU)
        bench.prepare(BACKWARD)
        assert bench.depth == min(op_worker.MOST_COPIES, 1 + -(-1_000_000 // kept))


def test_gradients_that_come_from_the_forward_pass_are_not_timed_alone():
    assert case_named("vocab_head 16x32x128 sampled").modes == (FORWARD, BOTH)
    assert case_named("bias_gelu").modes == (FORWARD, BACKWARD, BOTH)
    assert case_named("mask_tokens").modes == (FORWARD,)


@pytest.mark.parametrize("variant", ["bias + dropout + residual", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_s_floor_is_what_the_operator_reads_and_writes(variant, dtype):
    case = case_named(f"layer_norm 64x32 {variant}")
    inputs = case.inputs(dtype, CPU)
    x, weight, seed = inputs["x"], inputs["weight"], inputs.get("seed")
    p = 0.1 if seed is not None else 0.0
    read = [tensor for name, tensor in inputs.items() if name != "seed"]
    op, back = torch.ops.metro.layer_norm, torch.ops.metro.layer_norm_backward
    written = op(
        x, inputs.get("bias"), inputs["residual"], weight, inputs["shift"], seed, p, 0, 1e-5
    )
    assert case.work(FORWARD, dtype.itemsize).bytes == nbytes(*read, *written)
    _, *kept = written
    kept += [weight]
    gradients = list(back(torch.ones_like(x), *kept, seed, p, 0))
    if "bias" not in inputs:
        gradients.pop(2)
    backward = case.work(BACKWARD, dtype.itemsize).bytes
    assert backward == nbytes(x, *kept, *gradients)  # the gradient of out is like x
    assert case.work(BOTH, dtype.itemsize).bytes == nbytes(*read, *written) + backward


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class StubWorker:
    """Answers as a contender or as the ceilings; the method named fails after some calls."""

    def __init__(self, fails: str = "", after: int = 0):
        self.fails, self.left, self.closed = fails, after, False

    def call(self, method: str, **_):
        if method == self.fails:
            self.left -= 1
            if self.left < 0:
                raise WorkerError("OutOfMemoryError: CUDA out of memory")
        answers = {"amounts": {"copy": 1e6, "linear 8x8x8 fp32": 1e9}, "seconds": 0.5,
                   "build": None, "prepare": (1.0, 2.0), "run": 0.25}  # fmt: skip
        return answers[method]

    def close(self):
        self.closed = True


def measure_with(workers: dict[str, StubWorker]):
    options = ops.parse(["attention", "--no-compile", "--rounds=3", "--warmup=1"])
    crew = Crew("no module", needed=["ours"])
    crew.workers = workers
    ceilings = Ceilings(StubWorker(), 1, 0, 0.0)
    return ops.measure_case(case_named("attention 2x32x2x32"), "fp32", crew, options, ceilings)


@pytest.mark.parametrize("fails, after, times", [("build", 0, 0), ("prepare", 1, 1), ("run", 9, 2)])
def test_a_peer_that_fails_leaves_the_case(fails, after, times, monkeypatch):
    """Four calls of ``run`` are a mode: the tenth is the second round of the third mode."""
    monkeypatch.setattr("bench.timing.time.sleep", lambda _: None)
    peer = StubWorker(fails, after)
    workers = {"ours": StubWorker(), "eager": peer, "sdpa bias": StubWorker()}
    workers["sdpa no bias"] = StubWorker()
    done = measure_with(workers)
    assert [case.figures["mode"] for case in done] == [FORWARD, BACKWARD, BOTH]
    reason = "absent: OutOfMemoryError: CUDA out of memory"
    found = [case.peers["eager"] for case in done]
    assert found == [0.25] * times + [reason] * (3 - times)
    assert peer.closed and "eager" not in workers  # the memory that it held is free again
    assert all(case.ours == case.peers["sdpa bias"] == 0.25 for case in done)
    assert all(case.peers["compiled"] == "absent: left out by --no-compile" for case in done)


def test_without_ours_there_is_no_case(monkeypatch):
    monkeypatch.setattr("bench.timing.time.sleep", lambda _: None)
    names = ("eager", "sdpa bias", "sdpa no bias")
    with pytest.raises(WorkerError, match="out of memory"):
        measure_with({"ours": StubWorker("run", 2), **{name: StubWorker() for name in names}})


def test_rates_by_mode():
    """Published rates of flash attention count the scores that are computed again, ours do not."""
    case = next(c for c in all_cases("cuda", False) if c.name == "attention 64x512x12x64")
    forward = 4 * 64 * 512 * 512 * 12 * 64
    for mode, useful, flash in ((FORWARD, 1, None), (BACKWARD, 2, 2.5), (BOTH, 3, 3.5)):
        work = case.work(mode, 2)
        assert work.flops == useful * forward
        rates = ops._rates(case, mode, work, 1.0)
        assert rates["gflop_per_s"] == pytest.approx(useful * forward / 1e9)
        expected = None if flash is None else pytest.approx(flash * forward / 1e9)
        assert rates.get("flash_gflop_per_s") == expected
    assert case.work(BOTH, 2) == Work(12 * 64 * 512 * 12 * 64 * 2, 3 * forward)


@pytest.mark.parametrize(
    "argv, sentence", [(["gelo"], "no operator family 'gelo'"), (["--rounds", "0"], "--rounds")]
)
def test_mistakes_get_a_sentence(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        ops.main(argv)


def test_ops_script_runs_small():
    options = ["gelu", "--small", "--no-compile", "--rounds", "2", "--warmup", "0"]
    options += ["--dtype", "fp32", "--threads", "1", "--running-record"]
    *_, before, record = records("bench/ops.py", *options)
    assert before["cases"] == record["cases"]  # one case, and so one line before the last
    forward, backward, both = record["cases"]
    assert forward["name"].endswith("fp32 forward")
    assert backward["name"].endswith("fp32 backward")
    assert both["name"].endswith("fp32 forward + backward")
    for case in (forward, backward, both):
        assert case["ours"] > 0
        assert case["peers"]["eager"] > 0
        assert case["peers"]["compiled"].startswith("absent: ")
        assert case["floor_seconds"] > 0
    assert record["machine"]["threads"] == 1
