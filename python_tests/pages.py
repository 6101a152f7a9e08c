"""HTML documents as a strict reader has them: every element closed, nothing from elsewhere."""

from html import unescape
from html.parser import HTMLParser

VOID = {"meta", "link", "br"}


class Node:
    def __init__(self, tag: str, attributes: dict[str, str | None]):
        self.tag, self.attributes = tag, attributes
        self.children: list[Node | str] = []

    def all(self, tag: str, class_: str = "") -> "list[Node]":
        """Elements of that name (and class) below this one, in order."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                classes = (child.attributes.get("class") or "").split()
                if child.tag == tag and (not class_ or class_ in classes):
                    found.append(child)
                found += child.all(tag, class_)
        return found

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice: {attrs}"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        assert not {"<", "&"} & set(data) or self.open[-1].tag in ("script", "style"), data
        self.open[-1].children.append(data)

    def handle_entityref(self, name):
        character = unescape(f"&{name};")
        assert len(character) == 1, f"&{name}; is no character"
        self.open[-1].children.append(character)

    def handle_charref(self, name):
        self.open[-1].children.append(unescape(f"&#{name};"))


def read_page(document: str) -> Node:
    """The document as a tree; AssertionError where an element is left open or closed wrongly."""
    assert document.startswith("<!DOCTYPE html>\n")
    reader = _Reader()
    reader.feed(document)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is never closed"
    return reader.root


def external_references(root: Node) -> list[str]:
    """What in a page would make a browser fetch something."""
    found = []
    for node in everything(root):
        for name in ("src", "srcset", "href", "action", "data", "poster", "xlink:href", "style"):
            value = node.attributes.get(name) or ""
            if value and not value.startswith(("data:", "#")):
                found.append(f"<{node.tag} {name}={value}>")
        if node.tag in ("style", "script"):
            words = ("url(", "@import", "http:", "https:", "fetch(", "XMLHttpRequest", "import(")
            allowed = node.text.replace("http://www.w3.org/2000/svg", "")  # a name space
            found += [f"<{node.tag}> {word}" for word in words if word in allowed]
    return found


def everything(node: Node) -> list[Node]:
    below = [child for child in node.children if isinstance(child, Node)]
    return below + [one for child in below for one in everything(child)]
