"""The page of the operators is what their docstrings make, and those say what they must."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from metro_ext import ops

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "operators.py"
FUNCTIONS = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]


@pytest.fixture(scope="module")
def script():
    if not SCRIPT.exists():
        pytest.skip("not in a checkout")
    spec = importlib.util.spec_from_file_location("operators", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_docstrings_make(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), (
        "make it anew: python .ci/operators.py --update"
    )


def test_it_has_every_operator_once(script):
    text = script.page()
    for name in set(ops.__all__) - {"_C"}:
        assert text.count(f"\n### `{name}`\n") == 1, name
    links = set(re.findall(r"\]\(#(\w+)\)", text))
    assert links <= {heading.lower() for heading in re.findall(r"^#+ `(\w+)`$", text, re.M)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_names_every_argument_and_the_errors(name, script):
    function = getattr(ops, name)
    text = script.entry(name, function)
    arguments, _, rest = text.partition("**Args**")[2].partition("**Returns**")
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^- (.*?):", arguments, re.M))))
    assert named == set(inspect.signature(function).parameters)
    assert rest and ("**Raises**" in rest or name == "row_gradient")  # torch arithmetic alone


def test_sections_and_marks(script):
    text = script.markdown(
        "Does ``x`` (:func:`attention`).\n\nArgs:\n    a, b: of\n        two lines.\n\nReturns:\n"
        "    int64 [N], all.\n\nMore.\n\nRaises:\n    UserError: a: b.\n"
    )
    assert text == (
        "Does `x` ([`attention`](#attention)).\n\n**Args**\n\n- `a`, `b`: of two lines.\n\n"
        "**Returns**\n\nint64 [N], all.\n\nMore.\n\n**Raises**\n\n- `UserError`: a: b."
    )
