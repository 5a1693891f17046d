"""Which base is meant: a folder, a Hub id, or a family name that the registry knows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorahub_registry.adapters.base_files import BaseFacts, base_digest, base_stamp, read_base
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.tensors import file_sha256
from lorahub_registry.errors import AmbiguousRef, BaseModelError, HubError, UnknownRef
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import expand, looks_like_path
from lorahub_registry.registry.records import AdapterRecord
from lorahub_registry.registry.store import Registry
from lorahub_registry.settings import Settings

if TYPE_CHECKING:
    from lorahub_registry.evaluate.base import LoadedBase


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

    @property
    def key(self) -> dict[str, str | None]:
        """What changes when it does, for those that go on where they were."""
        assert self.folder is not None
        config = file_sha256(self.folder / "config.json")
        return {**self.facts.named, "stamp": base_stamp(self.folder), "config": config}


def resolve_base(
    text: str,
    *,
    registry: Registry,
    beside: Path | None = None,
    hashed: bool = True,
    progress: Progress = silent,
) -> ResolvedBase:
    """The base that ``text`` means, pulled where needed.

    Args:
        text: a path (counted from ``beside``), a Hub id, or a family name; ``@revision`` pins a
            Hub id.
        hashed: its digest is wanted, though it may take a minute; otherwise it stands in the facts
            only where it is known.

    Raises:
        AmbiguousRef: a family name that more than one known base answers to.
        BaseModelError: no base there, or the name is an adapter's.
        HubError: the Hub has none of that name, or cannot be reached.
    """
    folder = expand(text, beside=beside)
    here = any((folder / name).is_file() for name in ("config.json", CONFIG_NAME))
    if looks_like_path(text) or here:
        return ResolvedBase(_facts(folder, None, None, registry, hashed, progress), folder, True)
    name, _, revision = text.partition("@")
    if "/" not in name:
        name = _by_family(name, registry)
    # A Hub id is asked of the Hub; only what has no owner may be a folder of the user's.
    if "/" not in name and (known := registry.base_folder(name)) is not None and not revision:
        progress.say(f"base {name}: {known}")
        return ResolvedBase(_facts(known, name, None, registry, hashed, progress), known, True)
    from lorahub_registry.hub.base import pull_base

    settings = Settings.from_environment()
    try:
        folder, commit = pull_base(name, revision or None, settings=settings, progress=progress)
    except HubError as error:
        _no_adapter(name, registry)
        if "/" not in name:  # an adapter's page shows such names of bases that are folders
            error.hint = f"a folder is written as a path, ./{name}, and a Hub id with its owner"
        raise
    return ResolvedBase(_facts(folder, name, commit, registry, hashed, progress), folder)


def base_of(
    record: AdapterRecord, named: str | None, *, registry: Registry, progress: Progress = silent
) -> ResolvedBase:
    """The base that an adapter sits on: the one ``named``, else the one that its config names.

    Raises:
        BaseModelError: neither says any, or it is not there.
    """
    name = named or record.base.name
    if name is None:
        raise BaseModelError(
            f"{record.name} does not say which base it was made for", hint="name it: --base ID"
        )
    declared = expand(record.base.declared or "")
    if named is None and record.base.declared and (declared / "config.json").is_file():
        name = str(declared)
    pin = f"@{record.base.revision}" if record.base.revision and not named else ""
    return resolve_base(f"{name}{pin}", registry=registry, progress=progress)


def _facts(
    folder: Path,
    name: str | None,
    revision: str | None,
    registry: Registry,
    hashed: bool,
    progress: Progress,
) -> BaseFacts:
    """Facts with the digest, which is computed once for as long as the files do not change."""
    facts, stamp = read_base(folder, name=name, revision=revision), base_stamp(folder)
    digest = registry.known_digest(folder, stamp)
    if digest is None and hashed:
        digest = base_digest(folder, progress=progress)
        registry.remember_digest(folder, stamp, digest)
    return replace(facts, digest=digest)


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


def _no_adapter(name: str, registry: Registry) -> None:
    """Say so where a model is wanted and the name is that of an adapter.

    Raises:
        BaseModelError: it is.
    """
    try:
        record = registry.get(name).record
    except UnknownRef:
        return
    except AmbiguousRef:
        raise BaseModelError(
            f"{name} is the name of adapters in the registry, and a model is wanted here",
            hint="a model's folder or Hub id",
        ) from None
    said = f"{name} is an adapter in the registry ({record.peft_type}), and a model is wanted here"
    if record.peft_type == "LORA":
        hint = f"make a model of it: lorareg merge --base BASE --adapter {name} --out FOLDER"
    else:
        hint = f"a model's folder or Hub id, such as its base's: {record.base.name or 'unknown'}"
    raise BaseModelError(said, hint=hint) from None


def load_found(
    found: ResolvedBase,
    device: str,
    dtype: str,
    progress: Progress = silent,
    *,
    quantization: str | None = None,
) -> LoadedBase:
    """The base that was found, loaded.

    Raises:
        BaseModelError: it cannot be.
    """
    from lorahub_registry.evaluate.base import load_base

    assert found.folder is not None
    with progress.task(f"Loading {found.facts.name}"):
        return load_base(
            found.folder,
            name=found.facts.name,
            revision=found.facts.revision,
            device=device,
            dtype=dtype,
            quantization=quantization,
        )
