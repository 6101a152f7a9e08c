"""The report of runs: one page, well-formed and alone, that holds what the records hold."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import external_references, read_page
from training_runs import train

from metro_ext.batches import EvaluationSource
from metro_ext.config import load_config, to_toml
from metro_ext.corpus import Corpus
from metro_ext.errors import UserError
from metro_ext.monitor import read_records
from metro_ext.pretrained import load
from metro_ext.report.__main__ import main
from metro_ext.report.chart import Axis, axes, ticks
from metro_ext.report.markup import element, text
from metro_ext.report.page import page
from metro_ext.report.panels import MOST_POINTS, PANELS, curves, means, thinned
from metro_ext.report.runs import read_runs
from metro_ext.report.samples import samples
from metro_ext.text_encoder import EncodedTexts


@pytest.fixture(scope="module")
def other(finished, tmp_path_factory) -> Path:
    """The finished run without checkpoints, under a name and with settings that need escapes."""
    folder = tmp_path_factory.mktemp("other") / 'a <b>&"bold"<'
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints"))
    config = (folder / "config.toml").read_text()
    config = re.sub(r"^lr = .*", "lr = 0.125", config, count=1, flags=re.M)
    config = re.sub(
        r"^train = .*", 'train = ["</script><img src=x onerror=y>.txt"]', config, flags=re.M
    )
    (folder / "config.toml").write_text(config)
    return folder


@pytest.fixture(scope="module")
def document(finished, other) -> str:
    return page(read_runs([finished, other]), count=2)[0]


@pytest.fixture(scope="module")
def tree(document):
    return read_page(document)


def test_the_page_needs_nothing_from_elsewhere(document, tree):
    assert external_references(tree) == []
    policy = next(m for m in tree.all("meta") if "http-equiv" in m.attributes)
    assert policy.attributes["content"].startswith("default-src 'none'")
    assert len(document.encode()) < 400_000


def test_text_is_escaped(tree, other):
    assert not tree.all("img") and len(tree.all("script")) == 1
    assert "y>.txt" not in tree.all("script")[0].text
    assert other.name in tree.all("h1")[0].text
    assert [key.text for key in tree.all("button")] == ["unbroken", other.name]
    assert any("</script><img src=x" in pre.text for pre in tree.all("pre"))


def test_the_curves_hold_the_records(tree, finished):
    figures = {f.all("strong")[0].text: f for f in tree.all("figure")}
    for title in ("Masked-token loss (MLM)", "Samples equal to the original", "Gradient norm",
                  "Learning rate", "Throughput", "Replaced token detection: accuracy"):  # fmt: skip
        assert title in figures, list(figures)
    assert "Sampling temperature" not in figures  # it is not scheduled
    keys = {"Masked-token loss (MLM)": ("mlm_loss", "metrics"),
            "Gradient norm": ("grad_norm", "metrics"), "Learning rate": ("lr", "metrics"),
            "Throughput": ("tokens_per_s", "timing")}  # fmt: skip
    for title, (key, file) in keys.items():
        drawn = [g for g in figures[title].all("g", "curve") if "solid" in g.attributes["class"]]
        assert [g.attributes["data-run"] for g in drawn] == ["0", "1"]
        records = read_records(finished / f"{file}.jsonl")
        for group in drawn:
            pairs = [pair.split(":") for pair in group.attributes["data-points"].split()]
            assert [int(step) for step, _ in pairs] == [record["step"] for record in records]
            for (_, value), record in zip(pairs, records, strict=True):
                assert float(value) == pytest.approx(record[key], rel=1e-5)
            line = group.all("polyline")[0].attributes["points"].split()
            assert len(line) == len(records)


def test_plots_have_text_alternatives(tree):
    for figure in tree.all("figure"):
        svg = figure.all("svg", "chart")[0]
        assert svg.attributes["role"] == "img" and svg.attributes["aria-label"]
        assert svg.all("desc")[0].text.count("unbroken") >= 1
        rows = figure.all("tbody")[0].all("tr")
        assert len(rows) == len(svg.all("g", "curve"))
    for table in tree.all("table"):
        assert table.all("caption")[0].text


def test_configuration_and_differences(tree, finished):
    section = next(s for s in tree.all("section") if s.attributes.get("id") == "configuration")
    rows = [[c.text for c in r.all("th") + r.all("td")] for r in section.all("tbody")[0].all("tr")]
    assert [row[0] for row in rows] == ["optim.lr", "data.train"]
    assert rows[0] == ["optim.lr", "0.001", "0.125"]
    config = load_config(toml_path=finished / "config.toml")
    assert section.all("pre")[0].text == to_toml(config)


def test_the_summary_has_the_last_evaluation(tree, finished):
    section = next(s for s in tree.all("section") if s.attributes.get("id") == "summary")
    rows = {r.all("th")[0].text: [c.text for c in r.all("td")] for r in section.all("tr")}
    last = read_records(finished / "evaluation.jsonl")[-1]
    assert rows["held-out RTD AUC"] == [f"{last['rtd_auc']:.1%}"] * 2
    assert rows["steps"] == ["20 of 20"] * 2


def test_a_run_without_checkpoint_has_no_samples_and_says_so(tree, other):
    section = next(s for s in tree.all("section") if s.attributes.get("id") == "samples")
    assert len(section.all("article")) == 2
    assert "No samples:" in section.text and "with checkpoints, found none" in section.text
    remarks = next(s for s in tree.all("section") if s.attributes.get("id") == "remarks")
    assert f"{other.name}: no samples" in remarks.text


def test_verdicts_are_the_main_models(finished):
    """Each passage by itself, through the encoder and the RTD head in plain PyTorch."""
    pretrained = load(finished)
    tokenizer, model = pretrained.tokenizer, pretrained.model
    length = pretrained.config.model.sequence_length
    found = samples(finished, 3)
    assert found.step == 20 and len(found.passages) == 3
    corpus = Corpus.open(finished / "data" / "valid")
    batch = EvaluationSource(corpus, 6 * length, length).batch(0)
    held_out = " ".join(tokenizer.pieces(batch.tokens.tolist()))
    ids = {tokenizer.pieces([i])[0]: i for i in range(tokenizer.vocab_size)}
    replaced = 0
    for passage in found.passages:
        assert " ".join(token.original or token.piece for token in passage) in held_out
        assert all(token.masked for token in passage if token.original is not None)
        assert all(token.original != token.piece for token in passage)
        replaced += sum(token.original is not None for token in passage)
        row = [0, *(ids[token.piece] for token in passage), 2]
        packed = EncodedTexts.pack([row], length)
        with torch.no_grad():
            hidden = model.main(packed.tokens, packed.packing, model.main.table(torch.float32))
            hidden = model.rtd_head.transform(hidden)
            logit = (hidden @ model.rtd_head.weight.reshape(-1) + model.rtd_head.bias).reshape(-1)
        expected = logit.sigmoid()[1:-1].tolist()
        assert [token.probability for token in passage] == pytest.approx(expected, abs=1e-4)
        for token in passage:
            said = token.probability >= 0.5
            names = {(0, 0): "kept", (0, 1): "alarm", (1, 0): "missed", (1, 1): "found"}
            assert token.outcome == names[token.original is not None, said]
    assert replaced > 0


def test_each_token_is_on_the_page(finished):
    tree = read_page(page(read_runs([finished]), count=2)[0])
    articles = tree.all("article")
    for article, passage in zip(articles, samples(finished, 2).passages, strict=True):
        marks = [n for tag in ("span", "b") for n in article.all("p", "passage")[0].all(tag)]
        assert len(marks) == len(passage)
        originals = [token.original for token in passage if token.original is not None]
        shown = [rt.text for rt in article.all("rt")]
        assert shown == [piece.removeprefix("▁") or "␣" for piece in originals]
        assert f"{len(passage)} tokens, {len(originals)} replaced" in article.all("h4")[0].text
    assert not tree.all("button")  # one run has nothing to be told apart from


def test_objectives_without_verdicts_say_so(tmp_path, text):
    train(tmp_path / "mlm", "--objective=mlm", "--steps", "2", *text)
    document, remarks = page(read_runs([tmp_path / "mlm"]), count=1)
    assert "the objective mlm detects no replaced tokens" in remarks[0]
    titles = [figure.all("strong")[0].text for figure in read_page(document).all("figure")]
    assert "Masked-token loss (MLM)" in titles
    assert not [title for title in titles if "Replaced" in title or "Samples" in title]


def test_other_tokenizers_are_pointed_out(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    with open(tmp_path / "run" / "tokenizer.model", "ab") as file:
        file.write(b"\n")
    main([str(finished), str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    told = capsys.readouterr()
    assert told.out.strip() == str(tmp_path / "page.html")
    assert "the runs have different tokenizers" in told.err.lower()
    assert "run: no samples (" in told.err  # the tokenizer is not the checkpoint's
    read_page((tmp_path / "page.html").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "expected the folder of a run with config.toml, found none"),
        (["{run}", "{run}/."], "expected each run once"),
        (["{run}"] * 9, "expected at most 8 runs"),
    ],
)
def test_mistakes(arguments, message, finished, tmp_path):
    words = [word.format(empty=tmp_path, run=finished) for word in arguments]
    with pytest.raises(UserError, match=message):
        main([*words, f"--output={tmp_path / 'page.html'}"])
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_sentence(finished, tmp_path):
    command = [sys.executable, "-m", "metro_ext.report", "--samples=0", str(finished)]
    command += ["--output", str(tmp_path / "no" / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and "check the path" in done.stderr


def copy_records(finished, folder, change):
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints", "data"))
    records = read_records(folder / "metrics.jsonl")
    for record in records:
        change(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_numbers_that_are_none_break_the_curve(finished, tmp_path):
    def change(record):
        if record["step"] in (6, 9):
            record["mlm_loss"] = "nan"
            record["skipped_steps"] = 1

    copy_records(finished, tmp_path / "run", change)
    (run,) = read_runs([tmp_path / "run"])
    steps = [record["step"] for record in run.records["metrics.jsonl"]]
    curve = curves(PANELS[0], [run])[0]
    assert [step for step, _ in curve.points] == [step for step in steps if step not in (6, 9)]
    assert curve.gaps == {1}
    document, _ = page([run], 0)
    drawn = read_page(document).all("figure")[0].all("g", "curve")[0]
    assert len(drawn.all("polyline")) == 1 and len(drawn.all("circle")) == 1
    assert (
        "steps skipped for want of a finite loss and gradient: 2, the last up to step 9" in document
    )


def test_warnings_of_the_records_are_shown(finished, tmp_path):
    copy_records(finished, tmp_path / "run", lambda record: record.update(sample_accuracy=0.9))
    section = read_page(page(read_runs([tmp_path / "run"]), 0)[0])
    notes = next(s for s in section.all("section") if s.attributes.get("id") == "health")
    assert "90% of the samples are the original" in notes.text


def test_a_run_that_has_just_begun(finished, tmp_path):
    (tmp_path / "config.toml").write_bytes((finished / "config.toml").read_bytes())
    document, remarks = page(read_runs([tmp_path]), 1)
    assert "No step has been recorded yet" in read_page(document).text and len(remarks) == 1


def test_runs_of_one_name_are_told_apart(finished, tmp_path):
    for name in ("x/run", "y/run"):
        shutil.copytree(finished, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
    runs = read_runs([tmp_path / "x/run", tmp_path / "y/run", finished])
    assert [run.name for run in runs] == ["x/run", "y/run", "unbroken"]
    with pytest.raises(UserError, match="twice"):
        read_runs([finished, finished / ".." / finished.name])


values = st.one_of(st.none(), st.floats(-1e6, 1e6))


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=1, max_size=1500))
def test_thinning_keeps_ends_and_extremes(found):
    points = list(enumerate(found))
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS and kept == sorted(kept, key=lambda p: p[0])
    assert set(kept) <= set(points) and kept[0] == points[0] and kept[-1] == points[-1]
    assert (None in found) == any(value is None for _, value in kept)
    if None not in found:
        assert {min(found), max(found)} <= {value for _, value in kept}


def test_a_long_run_is_its_means_with_the_spikes_behind_them(finished, tmp_path):
    copy_records(finished, tmp_path / "run", lambda record: None)
    (last,) = read_records(tmp_path / "run" / "metrics.jsonl")[-1:]
    losses = [5 - step / 4000 for step in range(1, 5001)]
    losses[2999] = 9.0
    lines = (json.dumps(last | {"step": i, "mlm_loss": x}) + "\n" for i, x in enumerate(losses, 1))
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    (run,) = read_runs([tmp_path / "run"])
    curve = curves(PANELS[0], [run])[0]
    assert curve.is_long and len(curve.points) < MOST_POINTS and (3000, 9.0) in curve.extremes
    assert curve.extremes[0] == (1, losses[0]) and curve.extremes[-1] == (5000, losses[-1])
    size = 5000 / len(curve.points)
    for step, mean in curve.points:
        assert mean == pytest.approx(5 - (step - size / 2) / 4000, abs=0.01 if step < 3000 or
                                     step > 3030 else 0.3)  # fmt: skip
    document, _ = page([run], 0)
    assert "means of stretches" in document
    drawn = read_page(document).all("figure")[0].all("g", "curve")[0]
    assert len(drawn.all("polyline", "spread")) == 1 and len(drawn.all("polyline")) == 2
    row = read_page(document).all("figure")[0].all("tbody")[0].all("tr")[0]
    assert [cell.text for cell in row.all("td")][2] == "9 step 3000"


def test_means_of_nothing_are_nothing():
    values = [(step, None if step == 700 else 1.0) for step in range(1000)]
    found = means(values)
    assert sum(value is None for _, value in found) == 1
    assert found[-1] == (999, 1.0) and len(found) <= MOST_POINTS


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-12, 1e12), st.floats(1e-3, 1e9), st.booleans())
def test_ticks_lie_within_their_axis(low, width, logarithmic):
    axis = Axis(low, low * (1 + width), 200, 10, logarithmic)
    found = ticks(axis, 4)
    assert 1 <= len(found) <= 13 and found == sorted(set(found))
    for value in found:
        assert 10 - 1e-3 <= axis.place(value) <= 200 + 1e-3


def test_an_axis_holds_its_values(finished):
    (run,) = read_runs([finished])
    for panel in PANELS:
        if drawn := curves(panel, [run]):
            x, y = axes(panel, drawn)
            places = [(x.place(s), y.place(v)) for curve in drawn for s, v in curve.points]
            assert all(50 <= a <= 400 and 10 <= b <= 194 for a, b in places), panel.title


def test_markup():
    assert element("a", 'x<&">', b_c='"<', d=True, e=None, f_=1) == (
        '<a b-c="&quot;&lt;" d f="1">x&lt;&amp;&quot;&gt;</a>'
    )
    assert text("a\x00\x1b\ud800\n") == "a\ufffd\ufffd\ufffd\n"
    assert element("i", element("b", "<")) == "<i><b>&lt;</b></i>"


def luminance(color: str) -> float:
    """WCAG 2.2, relative luminance."""
    digits = color.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_can_be_read(tree):
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for what a graphic is read by; in light and in dark."""
    style = tree.all("style")[0].text
    light, dark = (dict(re.findall(r"--(\w+): (#\w+);", block)) for block in
                   re.findall(r":root \{(.*?)\}", style, re.DOTALL))  # fmt: skip
    assert len(dark) == len(light) > 14
    for scheme in (light, dark):
        for back in ("back", "card"):
            least = {"text": 4.5, "faint": 4.5} | {f"c{i}": 3.0 for i in range(8)}
            least |= dict.fromkeys(("found", "missed", "alarm"), 3.0)
            for name, ratio in least.items():
                one, two = sorted((luminance(scheme[name]), luminance(scheme[back])))
                assert (two + 0.05) / (one + 0.05) >= ratio, (name, back)
