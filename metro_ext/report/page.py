"""The page: summary, warnings, plots, samples, configuration; styles and script are within it."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from metro_ext.config import differences, to_dict, to_toml
from metro_ext.errors import UserError
from metro_ext.monitor import EVALUATION_FILE, METRICS_FILE, TIMING_FILE
from metro_ext.presets import parameter_count
from metro_ext.report.chart import figure, shown
from metro_ext.report.markup import Html, element, join, table
from metro_ext.report.panels import MOST_POINTS, PANELS, curves
from metro_ext.report.runs import Run, finite
from metro_ext.report.samples import Samples, Token, samples
from metro_ext.tokenizer import SPACE_PIECE
from metro_ext.train import TABLE

SHADES = 9  # of the colour behind a token, by the probability that it was replaced
_SHARES = {
    "replaced_share", "rtd_accuracy", "rtd_majority", "rtd_auc", "rtd_f1", "clm_accuracy",
}  # fmt: skip
# No font, image or script from elsewhere: the browser itself is told to refuse any.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_OUTCOMES = {
    "found": "replaced, and said to be",
    "missed": "replaced, but taken for the original",
    "alarm": "the original, but said to be replaced",
}


def page(runs: Sequence[Run], count: int) -> tuple[str, list[str]]:
    """The report of runs as an HTML document, and what it could not or should not show.

    Args:
        count: passages of corrupted text a run; 0 leaves them out.
    """
    runs = list(runs)
    remarks = _comparison_remarks(runs)
    shown_samples: list[Samples | str] = []
    for run in runs if count else ():
        try:
            shown_samples.append(samples(run.folder, count))
        except UserError as error:
            shown_samples.append(str(error))
            remarks.append(f"{run.name}: no samples ({error})")
    names = [run.name for run in runs]
    title = f"Run {names[0]}" if len(runs) == 1 else "Runs " + ", ".join(names)
    path = element("p", runs[0].folder, class_="path") if len(runs) == 1 else ""
    body = [
        element("header", element("h1", title), path),
        _keys(runs),
        element(
            "main",
            _notes("remarks", "Remarks", remarks),
            _summary(runs),
            _health(runs),
            _plots(runs),
            _samples_section(runs, shown_samples) if count else Html(""),
            _configuration(runs),
        ),
        element("script", Html(_asset("script.js"))),
    ]
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Html(_asset("style.css"))),
    ]
    document = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{document}\n", remarks


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _comparison_remarks(runs: list[Run]) -> list[str]:
    if len({run.tokenizer for run in runs if run.tokenizer}) < 2:
        return []
    return [
        "The runs have different tokenizers: their losses and accuracies are of other tokens, and "
        "cannot be compared with each other."
    ]


def _keys(runs: list[Run]) -> Html:
    """Of several runs, the names in their colours: buttons that hide and show a run."""
    if len(runs) == 1:
        return Html("")
    buttons = [
        element(
            "button",
            element("span", class_="swatch", aria_hidden="true"),
            run.name,
            type="button",
            class_=f"key run{number}",
            data_run=number,
            aria_pressed="true",
            title="hide or show in the plots",
        )
        for number, run in enumerate(runs)
    ]
    return element("div", *buttons, class_="keys", role="group", aria_label="Runs in the plots")


def _notes(identifier: str, heading: str, notes: Sequence[object]) -> Html:
    if not notes:
        return Html("")
    items = [element("li", note) for note in notes]
    return element(
        "section", element("h2", heading), element("ul", *items), id=identifier, class_="notes"
    )


def _health(runs: list[Run]) -> Html:
    notes = []
    for run in runs:
        before = f"{run.name}: " if len(runs) > 1 else ""
        notes += [before + sentence for sentence in run.warnings()]
    return _notes("health", "To look at", notes)


def _summary(runs: list[Run]) -> Html:
    rows: list[list[object]] = []

    def row(label: object, values: Sequence[object]) -> None:
        if any(value is not None for value in values):
            rows.append([label, *("–" if value is None else value for value in values)])

    configs = [run.config for run in runs]
    row("objective", [config.objective.name for config in configs])
    row("preset", [config.preset for config in configs])
    counts = [parameter_count(c.model, c.objective).total for c in configs]
    row("parameters", [shown(count) for count in counts])
    row("steps", [f"{run.step} of {run.config.run.steps}" for run in runs])
    trained = [finite(run.last(METRICS_FILE)) for run in runs]
    row("tokens read", [_shown(values.get("tokens")) for values in trained])
    rates = [
        [r["tokens_per_s"] for r in map(finite, run.records[TIMING_FILE]) if r.get("tokens_per_s")]
        for run in runs
    ]
    row("tokens a second (median)", [shown(median(rate)) if rate else None for rate in rates])
    use = [finite(run.last(TIMING_FILE)).get("mfu") for run in runs]
    row("FLOP/s of the peak (last)", [_shown(value, percent=True) for value in use])
    last = [finite(run.last(EVALUATION_FILE)) for run in runs]
    for key, label in TABLE:
        values = [_shown(figures.get(key), percent=key in _SHARES) for figures in last]
        beside = label.startswith(" ")  # a figure to compare the one above it with
        name = element("span", label.strip(), class_="sub") if beside else f"held-out {label}"
        row(name, values)
    made = table(["", *(run.name for run in runs)], rows, "The runs and their last figures")
    return element("section", element("h2", "Summary"), made, id="summary")


def _shown(value: float | None, percent: bool = False) -> str | None:
    return None if value is None else shown(value, percent)


def _plots(runs: list[Run]) -> Html:
    names = [run.name for run in runs]
    found = [(panel, curves(panel, runs)) for panel in PANELS]
    figures = [figure(panel, drawn, names) for panel, drawn in found if drawn]
    if not figures:
        figures = [element("p", "No step has been recorded yet.")]
    hint = "Point at a plot, or move through it with the arrow keys, for its values."
    if any(curve.is_long for _, drawn in found for curve in drawn):
        hint += (
            f" Lines of more than {MOST_POINTS} values are means of stretches; the shade behind "
            "them goes from the lowest value to the highest."
        )
    return element(
        "section",
        element("h2", "Plots"),
        element("p", hint, class_="hint"),
        element("div", *figures, class_="grid-of-plots"),
        id="plots",
    )


def _samples_section(runs: list[Run], found: list[Samples | str]) -> Html:
    blocks = []
    for run, one in zip(runs, found, strict=True):
        heading = element("h3", run.name) if len(runs) > 1 else Html("")
        if isinstance(one, str):
            blocks.append(join([heading, element("p", f"No samples: {one}.")]))
            continue
        passages = [_passage(number, tokens) for number, tokens in enumerate(one.passages, 1)]
        asked = element("p", f"The model after step {one.step}.", class_="hint")
        blocks.append(join([heading, asked, *passages]))
    return element(
        "section",
        element("h2", "What the main model sees"),
        element(
            "p",
            "Held-out text in which the auxiliary model has put its samples. The deeper the "
            "colour, the likelier the main model thinks that a token was replaced; a token that "
            "truly was is underlined and has the original above it. Point at a token, or tap it, "
            "for the figures.",
        ),
        _token_key(),
        *blocks,
        id="samples",
    )


def _token_key() -> Html:
    shades = [element("span", "\u00a0", class_=f"p{shade}") for shade in range(SHADES)]
    scale = element("li", "0 %", element("span", *shades, class_="shades"), "100 % replaced")
    items = [
        element("li", element("b", "token", class_=f"{outcome} p{shade}"), " ", meaning)
        for (outcome, meaning), shade in zip(_OUTCOMES.items(), (7, 1, 6), strict=True)
    ]
    return element("ul", scale, *items, class_="token-key")


def _passage(number: int, tokens: list[Token]) -> Html:
    outcomes = [token.outcome for token in tokens]
    total = {name: outcomes.count(name) for name in _OUTCOMES}
    replaced = total["found"] + total["missed"]
    caption = (
        f"Passage {number}: {len(tokens)} tokens, {replaced} replaced, of which {total['found']} "
        f"found; {total['alarm']} false alarms"
    )
    text = element("p", *(_token(token) for token in tokens), class_="passage")
    rows = [
        [
            _plain(token.piece),
            _plain(token.original or ""),
            f"{token.probability:.0%}",
            token.outcome,
        ]
        for token in tokens
        if token.original is not None or token.outcome == "alarm"
    ]
    listed = Html("")
    if rows:
        head = ["read", "original", "said to be replaced", "outcome"]
        listed = element(
            "details",
            element("summary", "As a table"),
            table(head, rows, f"Passage {number}: replaced tokens and false alarms"),
            class_="values",
        )
    readout = element("p", class_="readout", aria_live="polite")
    return element("article", element("h4", caption), text, readout, listed)


def _token(token: Token) -> Html:
    """A token with its verdict; what follows a space is a word's beginning."""
    shade = min(int(token.probability * SHADES), SHADES - 1)
    word = content = _plain(token.piece)
    truth = "original, as sampled" if token.masked else "original"
    if token.original is not None:
        truth = f"replaced, was {_plain(token.original)}"
        content = element("ruby", word, element("rt", _plain(token.original)))
    elif token.piece == SPACE_PIECE:
        content = "\u00a0"
    marked = element(
        "span" if token.outcome == "kept" else "b",
        content,
        class_=f"{token.outcome} p{shade}",
        title=f"{word}: {truth}; the model: {token.probability:.1%} replaced",
    )
    return join([" ", marked]) if len(token.piece) > 1 and token.piece[0] == SPACE_PIECE else marked


def _plain(piece: str) -> str:
    """A piece without the mark of its leading space; a bare mark is shown as what it is."""
    return piece.removeprefix(SPACE_PIECE) or "␣"


def _configuration(runs: list[Run]) -> Html:
    parts = [element("h2", "Configuration")]
    if len(runs) > 1:
        keys = list(
            dict.fromkeys(
                key for run in runs[1:] for key in differences(runs[0].config, run.config)
            )
        )
        plain = [to_dict(run.config) for run in runs]
        rows = [[key, *(_value(one, key) for one in plain)] for key in keys]
        if rows:
            parts.append(table(["key", *(run.name for run in runs)], rows, "What differs"))
        else:
            parts.append(element("p", "The runs have the same configuration."))
    for run in runs:
        summary = element("summary", f"All of {run.name}")
        parts.append(element("details", summary, element("pre", to_toml(run.config), tabindex="0")))
    return element("section", *parts, id="configuration")


def _value(plain: dict, key: str) -> str:
    section, _, name = key.partition(".")
    value = plain[section][name] if name else plain[section]
    if isinstance(value, list):
        return ", ".join(value) or "–"
    return str(value).lower() if isinstance(value, bool) else f"{value}" or "–"
