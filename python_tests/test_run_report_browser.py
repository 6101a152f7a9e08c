"""The report in a real browser: headless Chromium, where one is installed."""

import re
import shutil
import subprocess
from html import escape

import pytest
from matplotlib.image import imread
from pages import read_page

from metro_ext.report.page import page
from metro_ext.report.runs import read_runs

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

# Played inside the page: what a reader does, and what the page then shows.
PROBE = """
<script>
window.addEventListener("load", () => {
  const told = {};
  const fire = (node, kind, options) =>
    node.dispatchEvent(new (options.key ? KeyboardEvent : PointerEvent)(
      kind, {bubbles: true, cancelable: true, ...options}));
  const chart = document.querySelector(".chart");
  const box = chart.getBoundingClientRect();
  fire(chart, "pointermove", {clientX: box.right - 1, clientY: box.top + 5});
  const tip = chart.parentElement.querySelector(".tip");
  told.tip = tip.innerText.replace(/\\s+/g, " ");
  const edge = tip.getBoundingClientRect();
  told.inside = edge.left >= 0 && edge.right <= innerWidth;
  fire(chart, "keydown", {key: "Home"});
  told.first = chart.parentElement.querySelector(".tip div").innerText;
  fire(chart, "keydown", {key: "Escape"});
  told.hidden = chart.parentElement.querySelector(".tip") === null;
  const shown = () => [...chart.querySelectorAll(".curve")]
    .filter((curve) => getComputedStyle(curve).display !== "none").length;
  told.curves = shown();
  const key = document.querySelector(".key");
  if (key) { key.click(); told.left = shown(); key.click(); told.again = shown(); }
  const token = document.querySelector(".passage .missed, .passage .found");
  token.click();
  told.token = token.title;
  told.readout = token.closest("article").querySelector(".readout").innerText;
  told.overflow = document.documentElement.scrollWidth - innerWidth;
  told.width = innerWidth;
  const result = parent.document.createElement("pre");
  for (const [name, value] of Object.entries(told))
    result.textContent += name + "=" + value + "\\n";
  parent.document.body.append(result);
});
</script>
"""


def browse(folder, *options):
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--enable-logging=stderr", profile, *options]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert not console, console  # no error of the script, nothing that the policy refused
    return done.stdout


@pytest.fixture(scope="module")
def document(finished, tmp_path_factory) -> str:
    other = tmp_path_factory.mktemp("browser") / "other"
    shutil.copytree(finished, other)
    return page(read_runs([finished, other]), count=1)[0]


def test_a_reader_on_a_phone(document, tmp_path):
    inner = escape(document.replace("</body>", PROBE + "</body>"))
    frame = f'<iframe width="360" height="700" srcdoc="{inner}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html>\n<html><body>{frame}</body></html>")
    shown = browse(tmp_path, "--virtual-time-budget=5000", "--dump-dom",
                   (tmp_path / "frame.html").as_uri())  # fmt: skip
    result = re.search(r"<pre>(.*?)</pre>", shown.rpartition("</iframe>")[2], re.DOTALL)
    assert result, "the script of the page ended early"
    told = dict(line.split("=", 1) for line in result[1].strip().splitlines())
    figure = read_page(document).all("figure")[0]
    last = figure.all("g", "curve")[0].attributes["data-points"].split()[-1]
    step, value = last.split(":")
    assert told["tip"].startswith(f"step {step} unbroken, training {float(value):.5g}"), told
    assert "other, held-out" in told["tip"] and told["inside"] == "true"
    assert told["first"] == "step 3" and told["hidden"] == "true"
    assert (told["curves"], told["left"], told["again"]) == ("6", "3", "6")
    assert told["readout"] == told["token"] and "replaced, was" in told["readout"]
    assert told["overflow"] == "0" and told["width"] == "360"


def test_it_is_drawn(document, tmp_path):
    (tmp_path / "page.html").write_text(document)
    picture = tmp_path / "page.png"
    browse(tmp_path, "--window-size=1000,1400", f"--screenshot={picture}",
           (tmp_path / "page.html").as_uri())  # fmt: skip
    colours = (imread(picture)[:, :, :3] * 255).round().astype(int).reshape(-1, 3)
    assert len(colours) == 1000 * 1400
    for wanted in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # the two runs' colours
        assert (abs(colours - wanted).max(axis=1) <= 2).sum() > 100
