"""A model card read as untrusted data: bounded YAML front matter, and prose without boilerplate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_FRONT_MATTER = 64 << 10
MAX_CARD = 1 << 20
MAX_DESCRIPTION = 600
_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_NOISE = re.compile(r"<!--.*?(?:-->|\Z)|```.*?(?:```|\Z)|<[^<>\n]{0,300}>", re.DOTALL)
_NO_PROSE = re.compile(r"[#|!>=-]|\*(?!\*)|\d+[.)] |\[ ?\]\(")
_MARKS = re.compile(
    r"(?<!\\)\*\*(?=\S)([^*]+)(?<=\S)\*\*|(?<!\\)`([^`]+)(?<!\\)`"
    r"|(?<!\\)\[([^\[\]]+)\]\([^()\s]*\)"
)
_ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")
_END = re.compile(r"[.!?](?=\s)")
# Lines of the Hub's unfilled template and of trainers' generated cards: they say nothing.
_BOILERPLATE = re.compile(
    r"more information needed|\[optional\]|model card for|this modelcard aims|mlco2"
    r"|use the code below|^the following .*config was used|^cite trl|^this model was trained with"
    r"|machine learning impact|codecarbon|users \(both direct|carbon emissions can be"
    r"|this model is a fine-tuned version of|it has been trained using|generated from trainer"
    r"|following hyperparameters|^\*\*(bibtex|apa):|automatically generated|it achieves the f",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Card:
    """A ``README.md``, read.

    Attributes:
        title: its first heading, without the template's.
        description: the first prose paragraphs, without marks of bold, code and links; at
            most 600 characters.
        scores: (task, dataset, metric, value) of its ``model-index``.
        problem: why the front matter could not be read; "" where it could.
    """

    license: str | None = None
    base: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    title: str = ""
    description: str = ""
    scores: tuple[tuple[str, str, str, float], ...] = ()
    problem: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """YAML without anchors, so that a small file cannot grow."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses YAML aliases")
        return super().compose_node(parent, index)


def read_card(text: str) -> Card:
    """Read a card. Never raises: what cannot be read is named in ``problem``."""
    text = text[:MAX_CARD]
    metadata, problem = _front_matter(text)
    title, description = _prose(_FRONT.sub("", text, count=1))
    base = metadata.get("base_model")
    names = _strings(base)
    return Card(
        license=_first(metadata.get("license")),
        base=names[0] if names else None,
        datasets=_strings(metadata.get("datasets")),
        tags=_strings(metadata.get("tags")),
        languages=_strings(metadata.get("language")),
        tasks=_tasks(metadata),
        title=title,
        description=description,
        scores=tuple(_scores(metadata)),
        problem=problem,
        metadata=metadata,
    )


def _front_matter(text: str) -> tuple[dict[str, Any], str]:
    match = _FRONT.match(text)
    if not match:
        return {}, ""
    if len(match[1]) > MAX_FRONT_MATTER:
        return {}, f"its front matter is larger than {MAX_FRONT_MATTER >> 10} KiB"
    try:
        loaded = yaml.load(match[1], _Loader)
        if loaded is None or isinstance(loaded, dict):
            return {str(k): v for k, v in (loaded or {}).items()}, ""
    except Exception as error:  # PyYAML's constructors stumble over much (`!!bool foo`: KeyError)
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return {}, f"its front matter is not valid YAML ({said})"
    return {}, "its front matter is no mapping"


def _prose(body: str) -> tuple[str, str]:
    """The title, and the first paragraphs of prose."""
    lines = _NOISE.sub(" ", body).splitlines()
    title, paragraphs, current = "", [], ""
    for line in (*(raw.strip() for raw in lines), ""):
        if not line or _NO_PROSE.match(line):
            if current:
                paragraphs.append(current)
            current = ""
            if line.startswith("# ") and not title and not _BOILERPLATE.search(line):
                title = line.lstrip("# ").strip()[:200]
        elif not _BOILERPLATE.search(line):
            current = f"{current} {line}".strip()
    return title, _cut(_plain(" ".join(paragraphs)[: 2 * MAX_DESCRIPTION]))


def _plain(text: str) -> str:
    """Without the marks of bold, code and links, and what was escaped as it is read."""
    return _ESCAPED.sub(r"\1", _MARKS.sub(lambda found: next(filter(None, found.groups())), text))


def _cut(text: str) -> str:
    """Whole sentences, where most of what fits is some."""
    if len(text) <= MAX_DESCRIPTION:
        return text
    ends = [end.end() for end in _END.finditer(text, 0, MAX_DESCRIPTION + 1)]
    whole = ends and ends[-1] >= MAX_DESCRIPTION // 2
    return text[: ends[-1] if whole else MAX_DESCRIPTION]


def sentences(text: str, most: int) -> str:
    """The first ``most`` of ``text``."""
    ends = [end.end() for end in _END.finditer(text)]
    return text[: ends[most - 1]] if len(ends) >= most else text


def _tasks(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    found = set(_strings(metadata.get("pipeline_tag")))
    for result in _results(metadata):
        found.update(_strings(_get(result, "task", "type")), _strings(_get(result, "task", "name")))
    return tuple(sorted(found))


def _scores(metadata: Mapping[str, Any]) -> list[tuple[str, str, str, float]]:
    scores = []
    for result in _results(metadata):
        metrics = result.get("metrics")
        for metric in metrics if isinstance(metrics, list) else []:
            value, kind = _get(metric, "value"), _first(_get(metric, "type"))
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and abs(value) < 1e300 and kind:  # neither infinite nor NaN
                dataset = _first(_get(result, "dataset", "name")) or ""
                task = dataset or _first(_get(result, "task", "type")) or ""
                scores.append((task, dataset, kind, float(value)))
    return scores


def _results(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    index = metadata.get("model-index")
    found: list[Mapping[str, Any]] = []
    for model in index if isinstance(index, list) else []:
        results = _get(model, "results")
        found += [r for r in results if isinstance(r, dict)] if isinstance(results, list) else []
    return found


def _get(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _strings(value: Any) -> tuple[str, ...]:
    """One text, or the texts of a list; whatever else is there is left out."""
    values = value if isinstance(value, list) else [value]
    # YAML can write half of a surrogate pair, which nothing can store.
    texts = [re.sub("[\ud800-\udfff]", "\ufffd", v) for v in values if isinstance(v, str)]
    return tuple(v.strip()[:300] for v in texts if v.strip())[:200]


def _first(value: Any) -> str | None:
    return next(iter(_strings(value)), None)
