"""Get base models: config, tokenizer and safetensors, pinned; no pickles, no code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lorahub_registry.adapters.base_files import weight_files
from lorahub_registry.errors import BaseModelError
from lorahub_registry.hub import cache
from lorahub_registry.hub.client import Hub, heard
from lorahub_registry.hub.discover import RemoteFile, list_files
from lorahub_registry.hub.failures import offline
from lorahub_registry.hub.listing import read_entry
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import is_commit, safe_path
from lorahub_registry.settings import Settings

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors\Z")
_WORDS = re.compile(r"[\w.-]+\.(json|txt|model|tiktoken|jinja)\Z|tokenizer[\w.-]*\Z")
_TEMPLATES = re.compile(r"additional_chat_templates/[\w.-]+\.jinja\Z")
# Names that fit and are not wanted: what was trained, not what is needed to run.
_UNWANTED = re.compile(r"(trainer_state|training_args|(all|train|eval)_results)\.json\Z")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


def pull_base(
    name: str,
    revision: str | None = None,
    *,
    settings: Settings,
    jobs: int = 8,
    progress: Progress = silent,
) -> tuple[Path, str]:
    """Get a base model into the cache; its folder and commit.

    Offline, what the cache has is taken if it is whole.

    Raises:
        HubError: the repo, its revision or its files cannot be had.
        BaseModelError: it is no model, or has no safetensors.
        OutputError: the disk is full, or the cache may not be written.
    """
    hub = Hub(settings, progress)
    if settings.offline:
        return _offline(hub, name, revision)
    listed = read_entry(hub.info(name, revision)).repo
    repo, commit = listed.name, listed.commit
    if repo.lower() != name.lower():
        progress.warn(f"{name} is called {repo} now")
    files = choose(repo, list_files(hub, repo, commit))
    total = cache.total_bytes(files)
    with heard(progress), progress.task(f"Pulling {repo}", total, "B") as task:
        fetcher = cache.Fetcher(hub, repo, commit, task, jobs=jobs, recheck=False)
        with fetcher.start(sorted(files, key=lambda f: (-f.size, f.path))) as futures:
            for file in files:
                futures[file.path].result()
    cache.remember_commit(repo, revision, commit)
    return cache.snapshot(repo, commit), commit


def choose(repo: str, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The files that a model needs to be loaded without running any code of its repo.

    Raises:
        BaseModelError: it is no model, or it has no safetensors.
    """
    names = {file.path for file in files}
    if "config.json" not in names:
        raise BaseModelError(
            f"{repo}: no config.json there, so no base model",
            hint="is it an adapter? its base is what its adapter_config.json names",
        )
    chosen = [f for f in files if _wanted(f.path)]
    if not any(_WEIGHTS.match(file.path) for file in chosen):
        pickled = any(name.endswith(_PICKLES) for name in names)
        raise BaseModelError(
            f"{repo}: its weights are pickles only, which lorareg does not load"
            if pickled
            else f"{repo}: no model.safetensors there",
            hint="look for a revision or a copy with safetensors (often refs/pr/1), "
            "or convert it to a local folder",
        )
    return chosen


def _wanted(path: str) -> bool:
    if not safe_path(path) or _UNWANTED.match(path):
        return False
    return bool(_WEIGHTS.match(path) or _WORDS.match(path) or _TEMPLATES.match(path))


def _offline(hub: Hub, name: str, revision: str | None) -> tuple[Path, str]:
    commit = revision if is_commit(revision) else cache.known_commit(name, revision)
    folder = cache.snapshot(name, commit) if commit else None
    if not commit or not folder or not (folder / "config.json").is_file():
        raise offline(hub.where(name, revision=revision))
    try:
        found = weight_files(folder)
    except BaseModelError as error:
        raise offline(hub.where(name, revision=revision)) from error
    if not found:
        raise offline(hub.where(name, revision=revision))
    return folder, commit
