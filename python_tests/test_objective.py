import math

import pytest
import reference_model
import torch
import torch.nn.functional as F
from op_checks import relative_error
from test_model import excite, make_model, packed

from metro_ext.config_schema import ObjectiveConfig
from metro_ext.objective import FIGURES, Objective, mask_count, scheduled

SPECIAL = torch.tensor([0, 1, 2, 3, 4])
MASK_ID = 4
LENGTHS = [40, 1, 17, 3]
NAMES = ["metro", "electra", "clm-all", "mlm"]


def run(name, model=None, seed=9, **changes):
    model = model or excite(make_model(name)).eval()
    config = ObjectiveConfig(name=name, **changes)
    tokens, packing = packed()
    packing = packing.__class__(
        packing.positions, packing.cu_seqlens, packing.max_seqlen, torch.tensor(seed)
    )
    objective = Objective(config, SPECIAL, MASK_ID, torch.float32)
    return model, tokens, objective(model, tokens, packing)


def encode(encoder, tokens):
    return torch.cat([reference_model.encode(encoder, s) for s in tokens.split(LENGTHS)])


def vocabulary_loss(encoder, head, hidden, target):
    """Sum of the cross-entropies of the tied head, float64."""
    rows = reference_model.transform(hidden, head.transform, encoder.config.layer_norm_eps)
    logits = rows @ encoder.embeddings.token.double().T + head.bias.double()
    return F.cross_entropy(logits, target, reduction="sum")


def reference_loss(model, tokens, out, config):
    count = len(out.target)
    if model.objective == "mlm":
        hidden = encode(model.main, out.masked)[out.position]
        return vocabulary_loss(model.main, model.main_head, hidden, out.target) / count
    hidden = encode(model.auxiliary, out.masked)[out.position]
    loss = vocabulary_loss(model.auxiliary, model.auxiliary_head, hidden, out.target) / count
    hidden = encode(model.main, out.corrupted)
    if model.rtd_head is not None:
        head = model.rtd_head
        rows = reference_model.transform(hidden, head.transform, model.config.layer_norm_eps)
        logit = rows @ head.weight.double() + head.bias.double()
        label = (out.corrupted != tokens).double()
        rtd = F.binary_cross_entropy_with_logits(logit, label)
        loss = loss + config.rtd_weight * rtd
    if model.main_head is not None:
        everywhere = model.objective == "clm-all"
        rows, target = (hidden, tokens) if everywhere else (hidden[out.position], out.target)
        clm = vocabulary_loss(model.main, model.main_head, rows, target) / len(target)
        loss = loss + config.clm_weight * clm
    return loss


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_the_reference(name):
    model, tokens, out = run(name)
    out.loss.backward()
    ours = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    expected = reference_loss(model, tokens, out, ObjectiveConfig(name=name))
    expected.backward()
    assert relative_error(out.loss, expected) < 1e-5
    for key, parameter in model.named_parameters():
        # The gradient of the key part of a qkv bias is zero but for rounding.
        scale = max(float(parameter.grad.norm()), 1e-3)
        assert float((ours[key] - parameter.grad).norm()) < 1e-4 * scale, key


def test_corruption():
    _, tokens, out = run("metro")
    count = mask_count(len(tokens), 0.15)
    assert len(out.position) == count == 9
    assert torch.equal(tokens[out.position], out.target)
    untouched = torch.ones(len(tokens), dtype=torch.bool)
    untouched[out.position] = False
    assert torch.equal(out.corrupted[untouched], tokens[untouched])
    assert torch.equal(out.masked[untouched], tokens[untouched])
    # A sample equal to the original counts as original.
    assert torch.equal(out.label == 1, out.corrupted != tokens)
    figures = dict(zip(FIGURES, out.metrics.tolist(), strict=True))
    assert figures["replaced_count"] == (out.corrupted != tokens).sum()
    assert figures["mlm_count"] == count and figures["rtd_count"] == len(tokens)


def test_a_certain_auxiliary_model_replaces_nothing():
    model = make_model("metro")
    original = packed()[0]
    constant = int(original[0])
    with torch.no_grad():
        model.auxiliary_head.bias[constant] = 1e4
    _, tokens, out = run("metro", model.eval())
    assert torch.equal(out.corrupted[out.position], torch.full_like(out.target, constant))
    assert torch.equal(out.label == 1, out.corrupted != tokens)


def test_no_gradient_flows_through_the_samples():
    model, _, out = run("metro", excite(make_model("metro", share_embeddings="none")), mlm_weight=0)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("auxiliary"):
            assert parameter.grad is None or torch.count_nonzero(parameter.grad) == 0, name
    assert torch.count_nonzero(model.main.layers[0].qkv.weight.grad) > 0


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_other_seed_other_corruption(name):
    _, _, first = run(name)
    _, _, again = run(name)
    _, _, other = run(name, seed=10)
    assert torch.equal(first.loss, again.loss) and torch.equal(first.masked, again.masked)
    assert not torch.equal(first.masked, other.masked)


def test_denominators_split_a_step_into_micro_batches():
    """Two micro-batches with the step's counts give the loss of their union."""
    model = excite(make_model("metro")).eval()
    config = ObjectiveConfig()
    objective = Objective(config, SPECIAL, MASK_ID, torch.float32)
    batches = [packed(seed=seed) for seed in (1, 2)]
    alone = [objective(model, *batch) for batch in batches]
    sums = sum(out.metrics.double() for out in alone)
    m = dict(zip(FIGURES, sums.tolist(), strict=True))
    expected = (
        m["mlm_nll_sum"] / m["mlm_count"]
        + 50 * m["rtd_loss_sum"] / m["rtd_count"]
        + m["clm_nll_sum"] / m["clm_count"]
    )
    counts = torch.tensor([m["mlm_count"], m["rtd_count"], m["clm_count"]])
    total = sum(objective(model, *batch, counts).loss.item() for batch in batches)
    assert math.isclose(total, expected, rel_tol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near_float32(name):
    model, tokens, expected = run(name)
    objective = Objective(ObjectiveConfig(name=name), SPECIAL, MASK_ID, torch.bfloat16)
    out = objective(model, tokens, packed()[1])
    assert out.loss.dtype == torch.float32
    if name == "mlm":  # elsewhere a sample may differ, and with it the loss
        assert relative_error(out.loss, expected.loss) < 2e-2


@pytest.mark.parametrize("name", NAMES)
def test_compiled_whole_equals_eager(name):
    torch.compiler.reset()
    model = excite(make_model(name)).train()
    tokens, packing = packed()
    objective = Objective(ObjectiveConfig(name=name), SPECIAL, MASK_ID, torch.float32)
    compiled = torch.compile(objective, fullgraph=True, dynamic=False)
    expected, out = objective(model, tokens, packing), compiled(model, tokens, packing)
    assert relative_error(out.loss, expected.loss) < 1e-5
    assert torch.equal(out.masked, expected.masked)


def test_sample_nats_estimate_the_entropy():
    """Σ -ln p(sample) is that of the logits in float64, and its mean is near the entropy."""
    model, _, out = run("metro")
    figures = dict(zip(FIGURES, out.metrics.tolist(), strict=True))
    assert figures["samples_replaced"] == figures["replaced_count"]
    hidden = encode(model.auxiliary, out.masked)[out.position]
    head, eps = model.auxiliary_head, model.config.layer_norm_eps
    rows = reference_model.transform(hidden, head.transform, eps)
    logits = rows @ model.auxiliary.embeddings.token.double().T + head.bias.double()
    log_p = logits.detach().log_softmax(-1)
    sample = out.corrupted[out.position]
    counts = out.target != -100
    nats = -log_p[torch.arange(len(sample)), sample]
    assert figures["sample_nats_sum"] == pytest.approx(float(nats[counts].sum()), rel=1e-5)
    entropy = -(log_p.exp() * log_p).sum(-1)
    spread = (log_p.exp() * (log_p + entropy[:, None]) ** 2).sum()  # of the sum of the samples
    assert abs(float((nats - entropy).sum())) < 4 * math.sqrt(float(spread))


def test_a_schedule_moves_in_stages_from_start_to_end():
    values = [scheduled(1.0, 3.0, step, 200) for step in range(0, 260)]
    assert values[0] == 1.0 and values[200] == values[259] == 3.0
    assert len(set(values)) == 51 and values == sorted(values)
    assert all(abs(v - (1 + min(s, 200) / 100)) <= 2 / 50 for s, v in enumerate(values))


def test_schedules_reach_temperature_and_weight():
    config = ObjectiveConfig(
        sampling_temperature_end=2.0, mlm_weight=1.0, mlm_weight_end=0.5, schedule_steps=10
    )
    objective = Objective(config, torch.tensor([0]), 4, torch.float32)
    found = []
    for step in (1, 5, 10, 11):
        objective.set_step(step, total_steps=1000)
        found.append(objective.constants)
    assert found == [
        pytest.approx(pair) for pair in ((1.1, 0.95), (1.5, 0.75), (2.0, 0.5), (2.0, 0.5))
    ]
    constant = Objective(ObjectiveConfig(), torch.tensor([0]), 4, torch.float32)
    constant.set_step(5, total_steps=10)
    assert constant.constants == (1.0, 1.0)


@pytest.mark.parametrize("share", ["token", "all", "none"])
@pytest.mark.parametrize("name", ["metro", "electra", "clm-all"])
def test_going_backward_early_changes_no_gradient(name, share):
    model = excite(make_model(name, share_embeddings=share)).train()
    objective = Objective(ObjectiveConfig(name=name), SPECIAL, MASK_ID, torch.float32)
    tokens, packing = packed()

    def step(early_backward):
        model.zero_grad(set_to_none=True)
        out = objective(model, tokens, packing, early_backward=early_backward)
        out.loss.backward()
        return out, {name: p.grad for name, p in model.named_parameters()}

    expected, gradients = step(early_backward=False)
    out, early = step(early_backward=True)
    assert relative_error(out.loss, expected.loss) < 1e-6
    assert relative_error(out.metrics, expected.metrics) < 1e-6
    for parameter, gradient in gradients.items():
        assert relative_error(early[parameter], gradient) < 1e-5, parameter
