"""HTML from elements: text is escaped unless it is HTML already, so that none can slip through."""

import re
from collections.abc import Iterable, Sequence
from html import escape

# Control characters, which HTML does not allow, and lone surrogates, which UTF-8 cannot hold.
_NOT_ALLOWED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = {"meta", "link", "br", "line", "rect", "circle", "polyline", "path"}


class Html(str):
    """Text that is HTML; any other string is text."""


def text(value: object) -> Html:
    """A value as HTML; what HTML cannot hold becomes U+FFFD."""
    if isinstance(value, Html):
        return value
    return Html(escape(_NOT_ALLOWED.sub("\ufffd", str(value))))


def element(name: str, /, *content: object, **attributes: object) -> Html:
    """`<name attribute="value">content</name>`.

    Content and values are escaped. In names of attributes `_` stands for `-`, one at the end is
    dropped (`class_`); an attribute that is None or False is left out, one that is True has no
    value.
    """
    written = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written.append(key)
        elif value is not None and value is not False:
            written.append(f'{key}="{text(value)}"')
    opened = f"<{' '.join(written)}>"
    if name in _VOID:
        return Html(opened.replace(">", " />") if name not in ("meta", "link", "br") else opened)
    return Html(f"{opened}{join(content)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Html:
    """Values one after the other; `between` is HTML."""
    return Html(between.join(text(part) for part in parts))


def table(head: Sequence[object], rows: Sequence[Sequence[object]], caption: str) -> Html:
    """A table whose first column names its rows; in a box of its own, which alone scrolls."""
    columns = join(element("th", cell, scope="col") for cell in head)
    body = join(
        element(
            "tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])
        )
        for row in rows
    )
    made = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", columns)),
        element("tbody", body),
    )
    return element("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)
