"""A repo as the Hub describes it, in a listing or alone, read as untrusted data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import yaml

from lorahub_registry.adapters.readme import Card, read_card
from lorahub_registry.errors import HubError, UsageError
from lorahub_registry.refs import AdapterRef, is_commit
from lorahub_registry.registry.records import AdapterRecord, RepoRecord

# What a listing is asked for. It refuses some names that it grants for a single model.
EXPAND = (
    *("sha", "lastModified", "tags", "siblings", "cardData"),
    *("downloads", "likes", "gated"),
)
_MOST_TAGS = 500


@dataclass(frozen=True)
class Listed:
    """What one entry says.

    Attributes:
        names: of all files; None where the entry does not tell.
        card: what ``cardData`` says; it has no prose.
        private: whether only some see it.
    """

    repo: RepoRecord
    names: tuple[str, ...] | None
    card: Card
    private: bool = False


def read_entry(entry: Any) -> Listed:
    """Read one entry. Odd values in it are left out.

    Raises:
        HubError: it names no repo, or no commit.
    """
    if not isinstance(entry, Mapping):
        raise HubError(f"a listing holds {str(entry)[:40]!r} in place of a repo")
    name = repo_id(entry.get("id"))
    commit = entry.get("sha")
    if not isinstance(commit, str) or not is_commit(commit):
        raise HubError(f"{name}: the Hub names no commit of it", hint="is it an empty repo?")
    tags = _texts(entry.get("tags"))[:_MOST_TAGS]
    card = card_of(entry.get("cardData"))
    repo = RepoRecord(
        kind="hub",
        name=name,
        commit=commit,
        last_modified=moment(entry.get("lastModified")),
        license=card.license or _tagged(tags, "license:"),
        downloads=_count(entry.get("downloads")),
        likes=_count(entry.get("likes")),
        tags=tags,
    )
    return Listed(repo, _names(entry.get("siblings")), card, entry.get("private") is True)


def repo_id(name: Any) -> str:
    """``name`` if it can be a repo's.

    Raises:
        HubError: it cannot.
    """
    try:
        ref = AdapterRef.parse(name if isinstance(name, str) else "")
    except UsageError:
        ref = AdapterRef("", "-")
    if ref.subfolder or ref.revision:
        raise HubError(f"a listing names a repo {str(name)[:100]!r}, which none can be called")
    return ref.repo


def card_of(metadata: Any) -> Card:
    """The card that a README with this front matter would have, without its prose."""
    if not isinstance(metadata, Mapping) or not metadata:
        return Card()
    try:
        text = yaml.safe_dump(dict(metadata), allow_unicode=True)
    except (yaml.YAMLError, RecursionError) as error:
        return Card(problem=f"cardData cannot be read ({type(error).__name__})")
    return read_card(f"---\n{text}---\n")


def finite(record: AdapterRecord) -> AdapterRecord:
    """``record`` without scores that are no numbers: a card may say ``.nan``."""
    scores = tuple(score for score in record.scores if math.isfinite(score.value))
    return replace(record, scores=scores)


def moment(text: Any) -> datetime | None:
    """A date in ISO form, with its zone; None for anything else."""
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _names(siblings: Any) -> tuple[str, ...] | None:
    if not isinstance(siblings, list):
        return None
    names = (s.get("rfilename") if isinstance(s, Mapping) else None for s in siblings)
    return tuple(name for name in names if isinstance(name, str))


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()


def _tagged(tags: tuple[str, ...], prefix: str) -> str | None:
    return next((tag.removeprefix(prefix) for tag in tags if tag.startswith(prefix)), None)


def _count(value: Any) -> int | None:
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if fits else None
