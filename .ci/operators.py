"""Writes metro_ext/docs/operators.md from the docstrings of metro_ext.ops.

    python .ci/operators.py [--update]

Without --update it says whether the page is what the docstrings make, and exits with 1 if not.
"""

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # for `python .ci/operators.py`

import torch  # noqa: E402

from metro_ext import ops  # noqa: E402

PAGE = ROOT / "metro_ext" / "docs" / "operators.md"
WIDTH = 100
SECTIONS = ("Args", "Returns", "Raises", "Attributes")
INTRODUCTION = """\
# The operators

Made from the docstrings of `metro_ext.ops` by `python .ci/operators.py --update`. How the kernels
work and what they reach is in [kernels.md](kernels.md).

"""
# Families in the order in which a training step meets them.
FAMILIES = (
    "attention", "layer_norm", "gelu", "linear", "vocab_head", "rtd_head", "corruption", "loss",
    "token_table",
)  # fmt: skip


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION + paragraphs(inspect.getdoc(ops).split("\n", 2)[2])]
    parts.append(contents())
    described = set()
    for family in FAMILIES:
        module = sys.modules[f"metro_ext.ops.{family}"]
        parts.append(f"## {inspect.getdoc(module).splitlines()[0].rstrip('.')}")
        for name, thing in members(module):
            described.add(name)
            parts.append(f"### `{name}`\n\n{entry(name, thing)}")
        parts += [f"Schemas:\n\n```\n{found}\n```" for found in [schemas(module)] if found]
    missing = set(ops.__all__) - described - {"_C"}
    if missing:
        raise SystemExit(f"error: no family of .ci/operators.py has {sorted(missing)}")
    return "\n\n".join(parts) + "\n"


def contents() -> str:
    lines = []
    for family in FAMILIES:
        module = sys.modules[f"metro_ext.ops.{family}"]
        links = ", ".join(f"[`{name}`](#{name.lower()})" for name, _ in members(module))
        title = inspect.getdoc(module).splitlines()[0].rstrip(".")
        lines.append(wrapped(f"- {links}: {title}", "  "))
    return "\n".join(lines)


def members(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The public names that a module defines, in the order of its text."""
    text = inspect.getsource(module)
    found = []
    for name in ops.__all__:
        at = re.search(rf"^(?:def|class) {name}\b|^{name} = ", text, re.MULTILINE)
        if at:
            found.append((at.start(), name))
    for _, name in sorted(found):
        yield name, getattr(ops, name)


def entry(name: str, thing: object) -> str:
    """What there is to say of a function, a class or a constant."""
    if not callable(thing):
        return f"Names of what `pretrain_loss` counts, in their order:\n\n{wrapped(listed(thing))}"
    is_class = inspect.isclass(thing)
    parts = []
    if not (is_class and issubclass(thing, tuple)):
        parts.append(signature(name, thing))
    parts.append(markdown(inspect.getdoc(thing)))
    if is_class:
        for method, function in vars(thing).items():
            function = getattr(function, "__func__", function)  # of a static method
            if not method.startswith("_") and inspect.isfunction(function):
                parts.append(f"#### `{name}.{method}`")
                parts += [signature(method, function), markdown(inspect.getdoc(function))]
    return "\n\n".join(parts)


def listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names) + "."


def signature(name: str, function: Callable) -> str:
    """A definition as one would write it, a line an argument where it is long."""
    found = inspect.signature(function)
    arguments, starred = [], False
    for argument in found.parameters.values():
        if argument.name == "self":
            continue
        if argument.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            arguments.append("*")
            starred = True
        arguments.append(plain_types(str(argument)))
    gives = found.return_annotation
    kind = "" if gives is inspect.Signature.empty else f" -> {plain_types(type_name(gives))}"
    line = f"{name}({', '.join(arguments)}){kind}"
    if len(line) > WIDTH:
        inner = "".join(f"    {argument},\n" for argument in arguments)
        line = f"{name}(\n{inner}){kind}"
    return f"```\n{line}\n```"


def type_name(kind: object) -> str:
    return inspect.formatannotation(kind).strip("'\"")


def plain_types(text: str) -> str:
    """Types by their last names."""
    return re.sub(r"\btorch\.(?=Tensor)|\bmetro_ext\.(?:\w+\.)*", "", text).replace("'", "")


def schemas(module: ModuleType) -> str:
    """The operators whose fake kernels a module registers, as torch knows them."""
    names = re.findall(r'register_fake\("metro::(\w+)"\)', inspect.getsource(module))
    return "\n".join(
        textwrap.fill(
            str(getattr(torch.ops.metro, name).default._schema), WIDTH, subsequent_indent="    "
        )
        for name in names
    )


def markdown(docstring: str) -> str:
    """A docstring's paragraphs, and its sections as lists."""
    chunks, title = [], ""
    gathered: list[str] = []
    for line in [*docstring.splitlines(), None]:
        heading = line is not None and re.fullmatch(rf"({'|'.join(SECTIONS)}):", line)
        ends = title and line is not None and line and not line.startswith(" ")
        if line is None or heading or ends:
            text = "\n".join(gathered).strip("\n")
            if text:
                chunks.append(section(title, text) if title else paragraphs(text))
            title, gathered = (heading[1] if heading else ""), []
            if heading or line is None:
                continue
        gathered.append(line)
    return "\n\n".join(chunks)


def section(title: str, text: str) -> str:
    """The entries `name: what it is` of a section as a list; other text under its name."""
    text = textwrap.dedent(text)
    items, rest = [], []
    for paragraph in re.split(r"\n(?=\S)", text):
        found = re.match(r"([\w][\w, ]*): (.+)", paragraph, re.DOTALL)
        if found and all(re.fullmatch(r"\w+", name) for name in found[1].split(", ")):
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            items.append(wrapped(f"- {names}: {inline(one_line(found[2]))}", "  "))
        else:
            rest.append(paragraph)
    body = [wrapped(inline(one_line(" ".join(rest))))] if rest else []
    body += ["\n".join(items)] if items else []
    return f"**{title}**\n\n" + "\n\n".join(body)


def paragraphs(text: str) -> str:
    """Paragraphs filled anew; what is indented after `::` is code."""
    parts = []
    for block in re.split(r"\n\s*\n", text):
        if block.startswith("    "):
            parts.append(f"```\n{textwrap.dedent(block)}\n```")
        else:
            parts.append(wrapped(re.sub(r"::$", ":", inline(one_line(block)))))
    return "\n\n".join(parts)


def one_line(text: str) -> str:
    return " ".join(text.split())


def inline(text: str) -> str:
    """reStructuredText's marks as Markdown's."""
    text = re.sub(
        r":(?:func|class):`(\w+)`", lambda found: f"[`{found[1]}`](#{found[1].lower()})", text
    )
    # Subscripts and products are no emphasis.
    return re.sub(r"``([^`]+)``", r"`\1`", text).replace("*", r"\*")


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the page")
    text = page()
    if parser.parse_args().update:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.name} is not what the docstrings make: python .ci/operators.py --update")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
