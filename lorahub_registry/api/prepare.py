"""A recipe with everything found, pinned, read and checked, before it costs time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.base_files import BaseFacts
from lorahub_registry.adapters.compat import Member, check_base, check_factors, check_sum
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.dynamic import folder_to_run
from lorahub_registry.adapters.tensors import WEIGHTS_NAME, file_sha256
from lorahub_registry.api.bases import ResolvedBase, resolve_base
from lorahub_registry.api.output import check_output
from lorahub_registry.api.resolve import resolve_members
from lorahub_registry.card import RECIPE_NAME
from lorahub_registry.errors import RecipeError
from lorahub_registry.lock import Lock, Pin
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes import (
    Recipe,
    RecipeFile,
    RefEntry,
    digest,
    from_mapping,
    pinned,
    read_rows,
    to_yaml,
)
from lorahub_registry.recipes import load as load_recipe
from lorahub_registry.recipes.model import Split
from lorahub_registry.recipes.routed import PromptRouter
from lorahub_registry.recipes.rows import Row
from lorahub_registry.refs import expand, looks_like_path
from lorahub_registry.registry.records import AdapterRecord, CentroidRecord
from lorahub_registry.registry.store import Registry


@dataclass(frozen=True)
class Prepared:
    """A recipe with everything found, read and checked, before any model is loaded.

    Attributes:
        fresh: member name → its record, of those to be indexed along with the mixture.
        examples: see :class:`~lorahub_registry.compose.encoder.Rows`.
        known: adapter → what the registry has stored of its rows, where there are no examples.
    """

    recipe: Recipe
    folder: Path
    base: ResolvedBase
    members: tuple[Member, ...]
    train: Sequence[Row]
    test: Sequence[Row]
    out: Path
    lock: Lock
    notes: tuple[str, ...]
    fresh: Mapping[str, AdapterRecord]
    examples: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    known: Mapping[str, CentroidRecord] = field(default_factory=dict)


def read_recipe(recipe: str | Path | Mapping[str, Any] | RecipeFile) -> RecipeFile:
    """A recipe from a file or from plain data; the latter's paths count from here."""
    if isinstance(recipe, RecipeFile):
        return recipe
    if isinstance(recipe, Mapping):
        made = from_mapping(recipe)
        return RecipeFile(made, Path.cwd() / RECIPE_NAME, to_yaml(made))
    return load_recipe(recipe)


def prepare(
    recipe: str | Path | Mapping[str, Any] | RecipeFile,
    *,
    registry: Registry,
    base: tuple[Any, Any] | None = None,
    force: bool = False,
    lock: Path | None = None,
    progress: Progress = silent,
) -> Prepared:
    """Find, pin and check all that a recipe names. No model is loaded, nothing is written.

    Raises:
        LoraregError: whatever is wrong with it, before it costs time.
    """
    file = read_recipe(recipe)
    wanted = file.recipe
    out = file.resolve(wanted.output.path)
    check_output(out, force=force)
    found = _given_base(wanted.base, base) if base else resolve_base(
        wanted.base, registry=registry, beside=file.folder, progress=progress
    )  # fmt: skip
    resolved = resolve_members(
        wanted, beside=file.folder, base=found.facts.name, registry=registry, progress=progress
    )
    members = resolved.members
    check_sum(members)
    file.check_names([m.name for m in members])
    if getattr(wanted.method, "form", None) == "factor":
        check_factors(members)
    notes = check_base(members, found.facts, allow=wanted.allow_base)
    for note in notes:
        progress.warn(f"allow_base: {note}")
    for member in members:
        if folder_to_run(member.folder) != member.folder:
            progress.warn(
                f"{member.name} decides while it runs; its plain LoRA is taken, another model"
            )
    if agreed_license(wanted, members) is None:
        progress.warn("its licence is unknown, so it cannot be pushed; license: … in the recipe")
    train, test = (
        read_rows(split, seed=wanted.seed, beside=file.folder) if split else ()
        for split in (wanted.data.train if wanted.method.reads_train else None, wanted.data.test)
    )
    examples, known = _own_rows(file, found, members, registry)
    if not test:
        progress.warn("no data.test: the mixture will be written without proof that it helps")
    now = _lock(file, found, members, known)
    if lock is not None:
        Lock.load(lock).check(now)
    fresh = {name: resolved.records[name] for name in sorted(resolved.fresh)}
    return Prepared(
        wanted, file.folder, found, members, train, test, out, now, tuple(notes), fresh, examples,
        known,
    )  # fmt: skip


def _own_rows(
    file: RecipeFile, base: ResolvedBase, members: Sequence[Member], registry: Registry
) -> tuple[dict[str, Sequence[Row]], dict[str, CentroidRecord]]:
    """Of a router of prompts: rows that each adapter is known by, or where they lie.

    Raises:
        RecipeError: of an adapter neither is known, or a name is none of the adapters'.
    """
    method = file.recipe.method
    if not isinstance(method, PromptRouter):
        return {}, {}
    names = [m.name for m in members]
    examples: dict[str, Sequence[Row]] = {
        name: read_rows(Split(path=path), seed=0, beside=file.folder)
        for name, path in method.examples.items()
    }
    stored = {
        one.id: c
        for one, c in registry.centroids()
        if c.base_digest == base.facts.digest and c.template == file.recipe.data.template
    }
    known = {
        m.name: stored[m.adapter_id]
        for m in members
        if m.name not in examples and m.adapter_id in stored
    }
    if absent := [name for name in names if name not in examples and name not in known]:
        raise RecipeError(
            f"method prompt_router: nothing tells what prompts {absent[0]} is for",
            hint=f"give rows of its own under method: examples: {{{absent[0]}: rows.jsonl}}, or "
            f"store them by `lorareg route --learn {absent[0]} --rows rows.jsonl`, with the "
            "recipe's template",
        )
    return examples, known


def agreed_license(recipe: Recipe, members: Sequence[Member]) -> str | None:
    """The mixture's licence: the recipe's word, else the adapters' own where they agree.

    Raises:
        RecipeError: it is to be published, and neither tells.
    """
    if recipe.declared_license:
        return recipe.declared_license
    said = {m.name: (m.license or "").strip().lower() for m in members}
    if len(set(said.values())) == 1 and all(said.values()):
        return next(iter(said.values()))
    if recipe.publish is None:
        return None
    each = ", ".join(f"{name}: {text or 'unknown'}" for name, text in said.items())
    raise RecipeError(
        f"the adapters do not agree on a licence ({each})",
        hint="read them, and say the mixture's own in the recipe: publish: {license: …}",
    )


def other_licenses(recipe: Recipe, members: Sequence[Member]) -> str:
    """Who says another licence than the recipe does; "" where nobody does."""
    wanted = (recipe.declared_license or "").lower()
    said = [(m.name, (m.license or "").strip().lower()) for m in members]
    others = [f"{name} says {text}" for name, text in said if wanted and text not in {"", wanted}]
    return ", ".join(others)


def _given_base(name: str, base: tuple[Any, Any]) -> ResolvedBase:
    from lorahub_registry.evaluate.base import check_plain

    model, _ = base
    check_plain(model)
    text, _, revision = name.partition("@")
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    short = expand(text).name if looks_like_path(text) else text
    return ResolvedBase(BaseFacts(short, shapes, revision or None), None)


def _lock(
    file: RecipeFile,
    base: ResolvedBase,
    members: Sequence[Member],
    known: Mapping[str, CentroidRecord],
) -> Lock:
    recipe = file.recipe
    data = {}
    for split, spec in (("train", recipe.data.train), ("test", recipe.data.test)):
        if spec is not None and (split == "test" or recipe.method.reads_train):
            path = file.resolve(spec.path)
            data[split] = Pin(path.name, files={path.name: file_sha256(path)})
    for name, place in getattr(recipe.method, "examples", {}).items():
        path = file.resolve(place)
        data[f"examples of {name}"] = Pin(path.name, files={path.name: file_sha256(path)})
    for name, one in known.items():
        said = f"{one.layer} {one.rows_digest} ".encode() + one.vector
        pin = Pin("stored by lorareg route", files={"centroid": sha256(said).hexdigest()})
        data[f"rows of {name}"] = pin
    return Lock(
        recipe=_settings_digest(pinned_recipe(recipe, base, members)),
        base=Pin(base.facts.name, base.facts.revision, digest=base.facts.digest),
        adapters={
            m.name: Pin(
                m.ref,
                m.revision or None,
                {name: file_sha256(m.folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME)},
                m.digest,
            )
            for m in members
        },
        data=data,
    )


def _settings_digest(recipe: Recipe) -> str:
    """Over all that decides what is computed: not where it is written or published."""
    output = recipe.output.model_copy(update={"path": "anywhere"})
    return digest(recipe.model_copy(update={"output": output, "publish": None, "license": None}))


def pinned_recipe(recipe: Recipe, base: ResolvedBase, members: Sequence[Member]) -> Recipe:
    """The recipe as it ran: base and adapters resolved and pinned, no path of this machine."""
    facts = base.facts
    if base.local:
        named = f"./{facts.name}" if looks_like_path(recipe.base) else recipe.base
    else:
        named = f"{facts.name}@{facts.revision}" if facts.revision else facts.name
    entries = [RefEntry(ref=m.ref, name=m.name, coefficient=m.coefficient) for m in members]
    return pinned(recipe, base=named, adapters=entries)
