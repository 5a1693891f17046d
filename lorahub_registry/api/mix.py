"""Compose: from a recipe to a written, proven, registered (and published) mixture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorahub_registry.adapters.compat import Member
from lorahub_registry.api.bases import load_found
from lorahub_registry.api.gates_figure import draw_gates
from lorahub_registry.api.output import new_folder
from lorahub_registry.api.papers import dataset_id, finite, scores_of
from lorahub_registry.api.prepare import (
    Prepared,
    agreed_license,
    other_licenses,
    pinned_recipe,
    prepare,
)
from lorahub_registry.api.resume import means_of
from lorahub_registry.api.trace import draw_trace
from lorahub_registry.api.written import add_digests
from lorahub_registry.card import RECIPE_NAME, RESULTS_NAME, write_card
from lorahub_registry.errors import BaseModelError, LoraregError, UsageError
from lorahub_registry.lock import LOCK_NAME
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes import Recipe, RecipeFile, to_yaml
from lorahub_registry.refs import AdapterRef, expand
from lorahub_registry.registry.index import card_beside, record_of_folder
from lorahub_registry.registry.records import (
    BaseRecord,
    MemberRecord,
    MixtureRecord,
    StoredAdapter,
)
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.compose.encoder import Rows
    from lorahub_registry.compose.run import Composition
    from lorahub_registry.evaluate.base import LoadedBase

_PLAIN_STEMS = frozenset({"test", "heldout", "held_out", "held-out", "eval", "valid", "data"})


@dataclass(frozen=True)
class Mixture:
    """What :func:`compose` made.

    Attributes:
        path: the mixture's folder, loadable by stock PEFT.
        results: what ``results.json`` holds: coefficients, scores, verdict, versions.
        url: where it was published; None where it was not.
    """

    name: str
    path: Path
    results: dict[str, Any]
    stored: StoredAdapter
    url: str | None = None

    @property
    def coefficients(self) -> dict[str, float]:
        """By adapter name, in the recipe's order."""
        return {m["name"]: m["coefficient"] for m in self.results["members"]}

    @property
    def verdict(self) -> str | None:
        """Whether it helps, in words; None where nothing was measured."""
        found = self.results.get("verdict")
        return found["text"] if found else None


def compose(
    recipe: str | Path | Mapping[str, Any] | RecipeFile,
    *,
    registry: Registry | None = None,
    base: tuple[Any, Any] | None = None,
    push: bool = True,
    force: bool = False,
    lock: Path | None = None,
    jobs: int | None = None,
    progress: Progress = silent,
) -> Mixture:
    """Run a recipe.

    A search that is stopped leaves its evaluations in a journal beside the registry; the same
    recipe on the same files goes on from there, to the same result.

    Args:
        recipe: a file, plain data, or one read already.
        registry: where adapters are known and the mixture is entered; None: the default one.
        base: (model, tokenizer) already loaded, in place of the recipe's own loading.
        push: publish where the recipe says so.
        force: replace a mixture that stands at the output's place.
        lock: a ``lorareg.lock`` that everything must agree with.
        jobs: measure so many candidates at once, each in a worker process of one thread; the
            result is the same for any number. None: in this process, with torch's threads.

    Raises:
        UsageError: ``jobs`` with a base that is already loaded, which cannot travel to a worker.
        LoraregError: what went wrong; nothing was written then.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return compose(
                recipe, registry=opened, base=base, push=push, force=force, lock=lock, jobs=jobs,
                progress=progress,
            )  # fmt: skip
    if jobs is not None and base is not None:
        raise UsageError(
            "jobs cannot be used with a base that is already loaded",
            hint="let the recipe name the base's folder or repo: each worker loads it from there",
        )
    ready = prepare(recipe, registry=registry, base=base, force=force, lock=lock, progress=progress)
    loaded = _loaded(ready, base, progress)
    with new_folder(ready.out, force=force) as folder:
        from lorahub_registry.compose import run
        from lorahub_registry.evaluate.quiet import threads_for

        rows = _rows(ready, loaded)
        with threads_for(loaded.model), means_of(ready, loaded, registry, jobs, progress) as means:
            made = run.compose(
                ready.recipe, ready.members, loaded, rows, folder, means=means, progress=progress
            )
            results = _results(ready, loaded, made)
            add_digests(results, folder)
            _write_papers(folder, ready, loaded, results)
    means.journal.forget()
    stored = _enter(ready, results, registry)
    url = _publish(ready, progress) if ready.recipe.publish and push else None
    return Mixture(ready.recipe.name, ready.out, results, stored, url)


def _loaded(ready: Prepared, base: tuple[Any, Any] | None, progress: Progress) -> LoadedBase:
    from lorahub_registry.evaluate.base import adopt

    facts, recipe = ready.base.facts, ready.recipe
    if base:
        return adopt(*base, name=facts.name, revision=facts.revision)
    return load_found(ready.base, recipe.device, recipe.dtype, progress)


def _rows(ready: Prepared, loaded: LoadedBase) -> Rows:
    """The recipe's rows, and where those lie that were stored before.

    Raises:
        BaseModelError: they were stored at another hidden state than the router reads.
    """
    from lorahub_registry.compose.encoder import Rows
    from lorahub_registry.evaluate.hidden import middle_layer

    wanted = middle_layer(loaded)
    for name, one in ready.known.items():
        if one.layer != wanted:
            raise BaseModelError(
                f"{name}: what is stored of its rows is of hidden state {one.layer}, and a router "
                f"of prompts reads hidden state {wanted} of {loaded.name}",
                hint=f"lorareg route --learn {name} --rows … stores it again",
            )
    known = {name: np.frombuffer(one.vector, "<f4").tolist() for name, one in ready.known.items()}
    return Rows(ready.train, ready.test, ready.examples, known)


def _results(ready: Prepared, loaded: LoadedBase, made: Composition) -> dict[str, Any]:
    from lorahub_registry.compose.results import results

    recipe = ready.recipe
    # Pinned, as its method may name files of this machine's.
    found = results(pinned_recipe(recipe, ready.base, ready.members), loaded, made)
    found["base"]["digest"] = ready.base.facts.digest
    found["notes"] += [f"allow_base: {note}" for note in ready.notes]
    found["license"] = agreed_license(recipe, ready.members)
    if overridden := other_licenses(recipe, ready.members):
        found["notes"].append(f"the recipe says {found['license']}, but {overridden}")
    found["task"] = _task(recipe, ready.folder)
    found["datasets"] = sorted({d for m in ready.members for d in _datasets(m)})
    return finite(found)


def _datasets(member: Member) -> list[str]:
    """The Hub datasets that the adapter's card names."""
    found = []
    for name in card_beside(member.folder).datasets:
        try:
            ref = AdapterRef.parse(name)
        except LoraregError:
            continue  # a title in words, which the Hub would refuse as an id
        found.append(ref.repo)
    return found


def _task(recipe: Recipe, beside: Path) -> str:
    """What the test set is called: its file, or where that says nothing its folder or recipe."""
    if recipe.data.test is None:
        return recipe.name
    path = expand(recipe.data.test.path, beside=beside)
    if path.stem.lower() not in _PLAIN_STEMS:
        return path.stem
    # The recipe's own folder says no more than the recipe; a home may be a person's name.
    home = Path.home()
    plain = {beside.absolute(), home, *home.parents}
    return recipe.name if path.parent in plain else path.parent.name


def _write_papers(
    folder: Path, ready: Prepared, loaded: LoadedBase, results: dict[str, Any]
) -> None:
    text = to_yaml(pinned_recipe(ready.recipe, ready.base, ready.members))
    (folder / RECIPE_NAME).write_text(text, encoding="utf-8")
    (folder / LOCK_NAME).write_text(ready.lock.dumps(), encoding="utf-8")
    (folder / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if "search" in results:
        draw_trace(folder, results)
    if "routing" in results:
        draw_gates(folder, results, ready, loaded)
    publish = ready.recipe.publish
    write_card(folder, repo=publish.repo if publish else None)


def _enter(ready: Prepared, results: dict[str, Any], registry: Registry) -> StoredAdapter:
    """The mixture, its lineage and every measured score go into the registry."""
    facts = ready.base.facts
    verdict = results["verdict"]["text"] if "verdict" in results else "not evaluated"
    # The words of its card are ours: they tell of no skill.
    record = replace(
        record_of_folder(ready.out, name=ready.recipe.name),
        base=BaseRecord(facts.name, "given", facts.name, facts.revision, facts.digest),
        description=f"{len(results['members'])} adapters by {ready.recipe.method.type}: {verdict}",
        skills=(),
        scores=(),
    )
    known = {m.name: m for m in ready.members}
    members = [
        MemberRecord(m.ref, m.name, row["coefficient"], adapter_id=m.adapter_id, digest=m.digest)
        for row in results["members"]
        for m in [known[row["name"]]]
    ]
    lineage = MixtureRecord(
        name=ready.recipe.name,
        method=ready.recipe.method.type,
        recipe_yaml=(ready.out / RECIPE_NAME).read_text("utf-8"),
        recipe_digest=ready.lock.recipe,
        seed=ready.recipe.seed,
        verdict=verdict,
        members=tuple(members),
    )
    stored = registry.add_mixture(record, lineage, ready.fresh)
    if ready.base.local and ready.base.folder is not None and "/" not in facts.name:
        registry.place_base(facts.name, ready.base.folder)
    keys = {m.name: m.key for m in ready.members}
    for row in results.get("test", ()):
        pin = ready.lock.data["test"]
        dataset = dataset_id(pin.ref, pin.files[pin.ref])
        task = _score_name(row, results)
        ref = keys[row["name"]] if row["kind"] == "adapter" else stored.ref
        for score in scores_of(row, task, dataset, facts.revision, facts.digest):
            registry.score(ref, score)
    return registry.get(stored.ref)


def _score_name(row: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """What a row of the table is called among the scores of its adapter or of the mixture.

    Base and uniform average are no adapters: their scores stand with the mixture's. Of a mixture
    that decides, the entry's tensors (its digest, what stock PEFT loads) are the plain LoRA's, so
    the task's bare name is for that one's scores, as on its card; what decides is "…, dynamic".
    """
    task: str = results["task"]
    decides = "routing" in results
    if row["kind"] in {"adapter", "plain" if decides else "mixture"}:
        return task
    return f"{task}, {'dynamic' if row['kind'] == 'mixture' else row['name']}"


def _publish(ready: Prepared, progress: Progress) -> str:
    from lorahub_registry.api.publish import push

    publish = ready.recipe.publish
    assert publish is not None
    try:
        done = push(
            ready.out,
            publish.repo,
            private=publish.private,
            create_pr=publish.create_pr,
            progress=progress,
        )
    except LoraregError:
        progress.warn(f"the mixture is whole in {ready.out}; only the push failed")
        raise
    return done.pr_url or done.url
