"""The JSON forms of repos, files and commits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from .card import relation_of, texts
from .git import Blob, Commit, iso
from .store import Repo
from .wire import HubError

BRIEF = (
    "likes private downloads tags pipeline_tag library_name createdAt modelId trendingScore"
).split()
"""What a listing shows unasked."""

FULL = [*BRIEF, "author", "gated", "lastModified", "sha", "siblings"]

DETAIL = [*FULL, "disabled", "cardData", "config", "model-index", "spaces", "usedStorage"]
"""What the page of one model shows."""

LISTABLE = frozenset(
    "author cardData config createdAt disabled downloads downloadsAllTime evalResults gated gguf "
    "inference inferenceProviderMapping lastModified library_name likes mask_token model-index "
    "pipeline_tag private resourceGroup safetensors sha siblings spaces tags transformersInfo "
    "trendingScore widgetData".split()
)
"""What `?expand=` may name in a listing."""

EXPANDABLE = LISTABLE | {"baseModels", "childrenModelCount", "usedStorage"}
"""What it may name for one model."""


def model(repo: Repo, commit: Commit, fields: Iterable[str], *, blobs: bool = False) -> Any:
    """A model as JSON, with the fields asked for. Fields without a value are left out."""
    card = repo.card(commit) or {}
    given: dict[str, Any] = {
        "author": repo.id.partition("/")[0] if "/" in repo.id else None,
        "baseModels": _base_models(card, commit),
        "cardData": repo.card(commit),
        "childrenModelCount": 0,
        "config": _config(commit),
        "createdAt": iso(repo.created),
        "disabled": repo.disabled,
        "downloads": repo.downloads,
        "downloadsAllTime": repo.downloads,
        "gated": repo.gated,
        "lastModified": iso(commit.date),
        "library_name": repo.library_at(commit),
        "likes": repo.likes,
        "model-index": card.get("model-index"),
        "modelId": repo.id,
        "pipeline_tag": card.get("pipeline_tag"),
        "private": repo.private,
        "sha": commit.oid,
        "siblings": siblings(commit, blobs=blobs),
        "spaces": [],
        "tags": repo.tags_at(commit),
        "trendingScore": repo.trending,
        "usedStorage": sum(blob.size for blob in commit.files.values()),
    }
    shown = {name: given[name] for name in fields if given.get(name) is not None}
    wrong = {name: value for name, value in repo.overrides.items() if name in fields}
    return {"_id": _object_id(repo.id), "id": repo.id, **shown, **wrong}


def _object_id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def _base_models(card: dict[str, Any], commit: Commit) -> dict[str, Any] | None:
    bases = texts(card.get("base_model"))
    if not bases:
        return None
    models = [{"_id": _object_id(base), "id": base} for base in bases]
    return {"relation": relation_of(card, commit.files), "models": models}


def _config(commit: Commit) -> dict[str, Any] | None:
    """For an adapter, the Hub shows two fields of its config under `peft`."""
    blob = commit.files.get("adapter_config.json")
    if blob is None:
        return None
    try:
        config = json.loads(blob.read())
    except ValueError:
        return None
    if not isinstance(config, dict):
        return None
    names = ("base_model_name_or_path", "task_type")
    return {"peft": {name: config[name] for name in names if name in config}}


def siblings(commit: Commit, *, blobs: bool) -> list[dict[str, Any]]:
    """All files by name; with `?blobs=true` also their sizes and ids."""
    found: list[dict[str, Any]] = []
    for path, blob in commit.files.items():
        entry: dict[str, Any] = {"rfilename": path}
        if blobs:
            entry |= {"blobId": blob.oid, "size": blob.size}
            if blob.lfs:
                entry["lfs"] = {
                    "sha256": blob.sha256,
                    "size": blob.size,
                    "pointerSize": len(blob.pointer),
                }
        found.append(entry)
    return found


def file_entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file of a tree. (Here the sha256 is called `oid`, among siblings it is `sha256`.)"""
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return entry


def folder_entry(path: str, oid: str) -> dict[str, Any]:
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


def tree(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The entries of a folder, in order of their paths."""
    if folder not in commit.folders:
        message = f"{folder} does not exist on {commit.oid}"
        raise HubError(404, message, code="EntryNotFound")
    start = f"{folder}/" if folder else ""

    def within(path: str) -> bool:
        inside = path.startswith(start) and path not in ("", folder)
        return inside and (recursive or "/" not in path[len(start) :])

    entries = [folder_entry(p, oid) for p, oid in commit.folders.items() if within(p)]
    entries += [file_entry(p, blob) for p, blob in commit.files.items() if within(p)]
    return sorted(entries, key=lambda entry: str(entry["path"]))


def path_entry(commit: Commit, path: str) -> dict[str, Any] | None:
    """A file or a folder by its path, None where there is none."""
    if path in commit.files:
        return file_entry(path, commit.files[path])
    if path in commit.folders:
        return folder_entry(path, commit.folders[path])
    return None


def last_commit(repo: Repo, commit: Commit, path: str) -> dict[str, Any]:
    """The commit that last changed a file or folder (`expand` of a tree)."""
    here = path_entry(commit, path)
    changed = commit
    for older in repo.history(commit):
        if path_entry(older, path) != here:
            break
        changed = older
    return {"id": changed.oid, "title": changed.title, "date": iso(changed.date)}


def commit_entry(commit: Commit) -> dict[str, Any]:
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.description,
        "authors": [{"user": commit.author}],
        "date": iso(commit.date),
    }
