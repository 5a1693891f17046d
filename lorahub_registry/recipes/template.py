"""From a row to the prompt: a Jinja template over the row's columns, in a sandbox.

A template sees each column by its name, the input column also as ``input``, and all of them as
``row`` (``{{ row["my column"] }}``). It never sees the answer. Recipes travel, so the language is
cut down to what prompts need: conditions, one loop, :data:`FILTERS` and :data:`METHODS`; nothing
random, nothing that reads a file, nothing that makes text without end.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorahub_registry.errors import DataError, RecipeError
from lorahub_registry.recipes.fields import did_you_mean
from lorahub_registry.recipes.rows import Row

DEFAULT = "{{ input }} "
CHAT = "chat"
"""Instead of a template: the tokenizer's own chat template, with the input as the user's words."""
PRESETS = {
    "alpaca": "Below is an instruction that describes a task"
    "{% if 'instruction' in row and row.get('input') %}"
    ", paired with an input that provides further context"
    "{% endif %}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ row.get('instruction') or input }}\n\n"
    "{% if 'instruction' in row and row.get('input') %}"
    "### Input:\n{{ row.get('input') }}\n\n"
    "{% endif %}### Response:\n"
}
"""Templates that have a name. ``alpaca``: Alpaca's words over the columns ``instruction`` and,
where it is not empty, ``input``; over the input column where there is no ``instruction``."""

FILTERS = (
    "trim lower upper capitalize title string int float length count first last join default d "
    "tojson replace sort list"
).split()
METHODS = (
    "strip lstrip rstrip lower upper capitalize title split splitlines startswith endswith "
    "get items keys values"
).split()
MAX_TEMPLATE = 20_000
MAX_PROMPT = 1_000_000

_REFUSED: dict[type[nodes.Node], str] = {
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "import",
    nodes.Extends: "extends",
    nodes.Block: "block",
    nodes.Macro: "macro",
    nodes.CallBlock: "call",
    nodes.FilterBlock: "filter blocks",
    nodes.Assign: "set",
    nodes.AssignBlock: "set",
    nodes.With: "with",
    nodes.Mul: "the operator *",
    nodes.Pow: "the operator **",
    nodes.Mod: "the operator %",
}


def _bounded(text: str, more: int = 0) -> str:
    if len(text) + more > MAX_PROMPT:
        raise jinja2.TemplateRuntimeError(f"the text grows over {MAX_PROMPT} characters")
    return text


def _shown(value: Any) -> Any:
    """What may stand in a prompt: text and numbers."""
    if isinstance(value, str | int | float | jinja2.Undefined):
        return value
    kind = {type(None): "empty (null)", list: "a list", dict: "an object"}.get(type(value))
    raise jinja2.TemplateRuntimeError(
        f"a value that it shows is {kind or 'not text'}; join, tojson or default can make it text"
    )


def _replace(value: Any, old: str, new: str) -> str:
    text = str(_shown(value))
    _bounded(text, text.count(old) * len(new))
    return text.replace(old, new)


def _join(values: Any, separator: str = "") -> str:
    parts = [str(_shown(v)) for v in values]
    _bounded(separator, sum(len(p) + len(separator) for p in parts))
    return separator.join(parts)


def _tojson(value: Any) -> str:
    return _bounded(json.dumps(value, ensure_ascii=False))


def _environment() -> ImmutableSandboxedEnvironment:
    sandbox = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        optimized=False,
        finalize=_shown,
    )
    sandbox.globals.clear()
    ours = {"replace": _replace, "join": _join, "tojson": _tojson}
    sandbox.filters = {name: ours.get(name, sandbox.filters[name]) for name in FILTERS}
    return sandbox


_SANDBOX = _environment()


def _check_tree(tree: nodes.Template) -> None:
    for node in tree.find_all(nodes.Node):
        if type(node) in _REFUSED:
            raise ValueError(f"uses {_REFUSED[type(node)]}, which prompts do without")
        if isinstance(node, nodes.Call) and (
            not isinstance(node.node, nodes.Getattr) or node.node.attr not in METHODS
        ):
            raise ValueError(f"calls something else than {', '.join(METHODS)}")
        if isinstance(node, nodes.For) and next(node.find_all(nodes.For), None):
            raise ValueError("has a loop inside a loop")


@lru_cache(maxsize=32)
def _compiled(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    """The template, given as such or by a preset's name, and the names it uses.

    Raises:
        ValueError: it cannot be compiled, or does what a prompt may not.
    """
    source = PRESETS.get(source, source)
    if len(source) > MAX_TEMPLATE:
        raise ValueError(f"is {len(source)} characters long; {MAX_TEMPLATE} are the most")
    try:
        tree = _SANDBOX.parse(source)
        _check_tree(tree)
        return _SANDBOX.from_string(source), frozenset(meta.find_undeclared_variables(tree))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"is not a Jinja template: {error.message} (its line {error.lineno})"
        ) from None
    except (RecursionError, MemoryError, SyntaxError, OverflowError):
        raise ValueError("is nested too deeply") from None


def names_used(source: str) -> frozenset[str]:
    """The columns that a template names, also under a condition.

    Raises:
        ValueError: it does not compile; the message says where and why.
    """
    return frozenset() if source == CHAT else _compiled(source)[1]


def check_template(source: str) -> str:
    """``source`` if it can make prompts.

    Raises:
        ValueError: it does not compile, or shows the answer.
    """
    if not source.strip():
        raise ValueError("is empty; write it over the columns, as in '{{ input }} '")
    if "output" in names_used(source):
        raise ValueError("shows the answer (output) in the prompt")
    return source


def render(template: str, row: Row) -> str:
    """The prompt for ``row``, exactly as the template gives it (ending newlines are kept).

    Raises:
        RecipeError: the template does not compile.
        DataError: it names a column that the row has not, or one that is empty.
        ValueError: it is ``"chat"``, which only a tokenizer can render.
    """
    if template == CHAT:
        raise ValueError("the chat template is the tokenizer's to render")
    try:
        compiled, names = _compiled(template)
    except ValueError as error:
        raise RecipeError(f"data.template {error}") from None
    columns = {k: v for k, v in row.columns.items() if k != row.output_column}
    context = {**columns, "input": row.input, "row": columns}
    try:
        return _bounded(compiled.render(context))
    except jinja2.UndefinedError as error:
        missing = sorted(names - set(context))
        near = did_you_mean(missing[0], columns) if missing else ""
        what = f"there is no column {missing[0]!r}{near}" if missing else str(error.message)
        raise DataError(
            f"{row.place}: data.template cannot be filled: {what}",
            hint=f"a template may use: {', '.join(dict.fromkeys(['input', *columns]))}",
        ) from None
    except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError) as error:
        raise DataError(f"{row.place}: data.template cannot be filled: {error}") from None
