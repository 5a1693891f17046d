"""Which base is meant: a folder, a Hub id, or a family name that the registry knows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lorahub_registry.adapters.base_files import BaseFacts, base_digest, read_base
from lorahub_registry.errors import AmbiguousRef
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import expand, looks_like_path
from lorahub_registry.registry.store import Registry
from lorahub_registry.settings import Settings


@dataclass(frozen=True)
class ResolvedBase:
    """A base found: its facts and its folder.

    Attributes:
        folder: None where the model was given as loaded objects.
        local: it is a folder of the user's, not a pulled snapshot; its path is never published.
    """

    facts: BaseFacts
    folder: Path | None
    local: bool = False


def resolve_base(
    text: str,
    *,
    registry: Registry,
    beside: Path | None = None,
    progress: Progress = silent,
) -> ResolvedBase:
    """The base that ``text`` means, pulled where needed.

    Args:
        text: a path (counted from ``beside``), a Hub id, or a family name; ``@revision`` pins a
            Hub id.

    Raises:
        AmbiguousRef: a family name that more than one known base answers to.
        BaseModelError: no base there.
        HubError: the Hub has none of that name, or cannot be reached.
    """
    folder = expand(text, beside=beside)
    if looks_like_path(text) or (folder / "config.json").is_file():
        facts = read_base(folder)
        digest = base_digest(folder, progress=progress)
        return ResolvedBase(replace(facts, digest=digest), folder, True)
    name, _, revision = text.partition("@")
    if "/" not in name:
        name = _by_family(name, registry)
    if (known := registry.base_folder(name)) is not None and not revision:
        facts = replace(read_base(known, name=name), digest=base_digest(known, progress=progress))
        return ResolvedBase(facts, known, True)
    from lorahub_registry.hub.base import pull_base

    settings = Settings.from_environment()
    folder, commit = pull_base(name, revision or None, settings=settings, progress=progress)
    facts = read_base(folder, name=name, revision=commit)
    return ResolvedBase(
        replace(facts, digest=base_digest(folder, progress=progress)), folder, False
    )


def _by_family(name: str, registry: Registry) -> str:
    matches = registry.bases_matching(name)
    if name in matches:
        return name
    if len(matches) > 1:
        raise AmbiguousRef(
            f"{name!r} may be any of {len(matches)} bases: {', '.join(matches)}",
            hint="write the one you mean in full",
        )
    return matches[0] if matches else name
