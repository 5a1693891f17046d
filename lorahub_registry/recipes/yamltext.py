"""YAML as data: plain values and the line of each, from text that nobody vouches for.

Anchors, aliases, tags, deep nesting, repeated keys and second documents are refused. Words mean
what YAML 1.2 says: ``1e-3`` is a number, ``no`` and ``010`` are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16

_NULL = frozenset(["", "~", "null", "Null", "NULL"])
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?\Z")
_SPECIAL = re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z")

Path = tuple[str | int, ...]


class YamlProblem(Exception):
    """Text that cannot be read as YAML at all; ``line`` counts from 1."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


@dataclass
class Located:
    """Plain data, and where its parts stand.

    Attributes:
        data: mappings, lists, text, numbers, true, false, None.
        lines: path of keys and indices → line, counted from 1.
        repeated: keys that stand twice in one mapping: (line, path, line of the first).
    """

    data: Any
    lines: dict[Path, int] = field(default_factory=dict)
    repeated: list[tuple[int, Path, int]] = field(default_factory=list)

    def line(self, path: Path) -> int:
        """The line of ``path``, or of the nearest part above it that is there."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def scalar(text: str) -> Any:
    """What an unquoted word is: None, true, false, a number, or the text itself."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    return float(text.replace(".", "")) if _SPECIAL.match(text) else text


class _Composer(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent) or event.anchor:
            sign = "*" if isinstance(event, AliasEvent) else "&"
            raise YamlProblem(
                line, f"anchors and aliases ({sign}{event.anchor}) are not read; repeat it"
            )
        if getattr(event, "tag", None):
            raise YamlProblem(line, f"tags ({event.tag}) are not read; write the value plainly")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise YamlProblem(line, f"nested more than {MAX_DEPTH} levels deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def read_yaml(text: str) -> Located:
    """The one document in ``text``.

    Raises:
        YamlProblem: it is not YAML, or more than plain data; says the line.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise YamlProblem(1, f"larger than {MAX_BYTES // 1024} KiB")
    loader: _Composer | None = None
    try:
        loader = _Composer(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(mark.line + 1 if mark else 1, _plain_words(error)) from None
    except yaml.reader.ReaderError as error:
        raise YamlProblem(
            text.count("\n", 0, error.position) + 1,
            f"holds a character that YAML does not allow (code {error.character!r})",
        ) from None
    except RecursionError:
        raise YamlProblem(1, "nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()
    located = Located(None)
    if node is not None:
        located.lines[()] = node.start_mark.line + 1
        located.data = _plain(node, (), located)
    return located


def _plain_words(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not YAML"
    if "'\\t'" in problem or "\\t" in problem:
        return "a tab; YAML is indented with spaces"
    if "single document" in (error.context or ""):
        return "a second document begins; a recipe is one"
    context = f"{error.context}: " if error.context else ""
    return f"not YAML: {context}{problem}"


def _plain(node: Node, path: Path, located: Located) -> Any:
    if isinstance(node, ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, SequenceNode):
        items = []
        for i, item in enumerate(node.value):
            located.lines[*path, i] = item.start_mark.line + 1
            items.append(_plain(item, (*path, i), located))
        return items
    assert isinstance(node, MappingNode)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, ScalarNode):
            raise YamlProblem(
                line, "a key must be plain text (a template that starts with {{ needs quotes)"
            )
        key = (*path, key_node.value)
        if key_node.value in mapping:
            located.repeated.append((line, key, located.lines[key]))
            continue
        located.lines[key] = line
        mapping[key_node.value] = _plain(value_node, key, located)
    return mapping
