"""Publish: an adapter's card, and the push of its folder in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry.adapters.dynamic import FOLDER, PEFT_TYPE, folder_to_run
from lorahub_registry.adapters.facts import read_config
from lorahub_registry.adapters.tensors import WEIGHTS_NAME
from lorahub_registry.api.written import check_tensors
from lorahub_registry.card import (
    GATES_NAME,
    holds_experts,
    is_converted,
    is_generated,
    is_trained,
    read_results,
    write_card,
)
from lorahub_registry.errors import (
    BaseModelError,
    OutputError,
    RecipeError,
    UnknownRef,
)
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import expand, looks_like_path
from lorahub_registry.registry.store import Registry
from lorahub_registry.settings import Settings

if TYPE_CHECKING:
    from lorahub_registry.hub.push import PushResult


def folder_of(place: str | Path, registry: Registry | None = None) -> Path:
    """The folder that a path or a registered name means.

    Raises:
        UnknownRef: no such folder, and nothing is registered under that name.
    """
    folder = expand(str(place))
    if folder.is_dir():
        return folder
    if isinstance(place, Path) or looks_like_path(place):
        raise UnknownRef(f"{place}: no such folder")
    if registry is None:
        with Registry() as opened:
            return folder_of(place, opened)
    stored = registry.get(place)
    if stored.record.local_path is None or not Path(stored.record.local_path).is_dir():
        raise UnknownRef(
            f"{place}: its files are not on this machine", hint=f"lorareg pull {stored.ref}"
        )
    return Path(stored.record.local_path)


def card(place: str | Path, *, registry: Registry | None = None, repo: str | None = None) -> Path:
    """Write the card of a mixture or an adapter again, from its other files; its path.

    Args:
        repo: the Hub id it will have, for the code that loads it.
    """
    return write_card(folder_of(place, registry), repo=repo)


def push(
    place: str | Path,
    repo: str,
    *,
    registry: Registry | None = None,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    message: str | None = None,
    progress: Progress = silent,
) -> PushResult:
    """Publish a mixture, a trained or a converted adapter: one atomic commit with its parent
    checked, its card made for ``repo``.

    Args:
        place: its folder, or its name in the registry.
        private: make the repo private where it is new.
        create_pr: open a pull request instead of committing.
        dry_run: check everything and list the files; nothing leaves this machine.

    Raises:
        RecipeError: no licence is known for it.
        OutputError: something in it may not be published: a local path, a token.
        BaseModelError: nothing tells the base of a converted adapter.
        BrokenAdapter: its tensors are not those that its results are about; or it decides while it
            runs, and what does that is damaged or missing.
        HubError: the Hub refused, or the branch moved meanwhile.
    """
    from lorahub_registry.hub.push import push as commit

    folder = folder_of(place, registry)
    facts = read_results(folder)
    if not facts.get("license"):
        made = ("factory", "train") if is_trained(facts) else ("recipe", "compose")
        hint = "say it in the {} (license: …), and {} again with --force".format(*made)
        if is_converted(facts):
            hint = "convert again with --license ID --force"
        raise RecipeError(
            f"{facts['name']}: its licence is unknown, and the unknown is not published", hint=hint
        )
    # Of what was converted, the base may be on the Hub and only its revision unknown.
    if not facts["base"]["revision"] and not (is_converted(facts) and not facts["base"]["digest"]):
        progress.warn(
            f"its base, {facts['base']['name']}, is a folder of yours: others can load it only "
            "if they have it, too; the card says so"
        )
    if "routing" in facts:
        from lorahub_registry.weights.dynamic import load_dynamic
        from lorahub_registry.weights.mixlora import read_mixlora

        if folder_to_run(folder) == folder:
            raise OutputError(
                f"{folder / FOLDER} is not there, and the card promises it",
                hint="compose it again with --force",
            )
        if (folder / FOLDER / WEIGHTS_NAME).is_file():
            # Damaged gates and experts are not published.
            if read_config(folder / FOLDER).peft_type == PEFT_TYPE:
                load_dynamic(folder / FOLDER)
            else:
                read_mixlora(folder / FOLDER)
            check_tensors(folder / FOLDER, facts["routing"], facts)
    if holds_experts(facts):
        _check_experts(folder, facts)
    check_tensors(folder, facts, facts)
    if (folder / GATES_NAME).is_file():
        progress.say(f"{GATES_NAME} shows one of your rows, and is published with the rest")
    if not is_generated(folder):
        progress.say("README.md was edited by hand: it is published as it is")
    elif not dry_run:
        write_card(folder, repo=repo)
    return commit(
        folder,
        repo,
        settings=Settings.from_environment(),
        private=private,
        create_pr=create_pr,
        message=message,
        dry_run=dry_run,
        progress=progress,
    )


def _check_experts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Whether a converted adapter is what its card says."""
    from lorahub_registry.weights.mixlora import read_mixlora

    if facts["base"]["name"] is None:
        raise BaseModelError(
            f"{facts['name']}: nothing tells its base, and nobody could load it",
            hint="lorareg add SOURCE --base ID, and convert it again with --force",
        )
    read_mixlora(folder)
