"""Pushing: what goes where, LFS objects, and the commit that ties them together."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Any

from ..access import proposable, require_write, signed_in, writable
from ..card import problems
from ..git import Blob, Commit, goes_to_lfs
from ..store import Repo
from ..wire import Call, HubError, Response, as_json, route
from .discussions import open_discussion

LFS_TYPE = {"Content-Type": "application/vnd.git-lfs+json"}


def _target(call: Call) -> Repo:
    """The repo to push to. A pull request may be opened by whoever can read it."""
    return proposable(call) if call.flag("create_pr") else writable(call)


@route("POST", "/api/models/{repo}/preupload/{rev}")
def preupload(call: Call) -> Response:
    """For each file, whether it goes through LFS, and what is there now.

    The `oid` is what the client compares with: sha256 for LFS, git id otherwise.
    """
    commit = _target(call).commit_at(call.args["rev"])
    answer = []
    for file in call.json().get("files", []):
        path, size = str(file["path"]), int(file["size"])
        lfs = goes_to_lfs(path, size, base64.b64decode(file.get("sample", "")))
        present = commit.files.get(path)
        answer.append(
            {
                "path": path,
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": False,
                "oid": present.etag if present else None,
            }
        )
    return as_json({"files": answer, "commitOid": commit.oid})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Response:
    """Where to put each object. One that is already stored gets no action."""
    proposable(call)
    objects = []
    for wanted in call.json().get("objects", []):
        oid, size = str(wanted["oid"]), int(wanted["size"])
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if call.store.blob_of(oid) is None:
            call.store.awaited.add(oid)
            verify = f"{call.base_url}/{call.args['repo']}.git/info/lfs/objects/verify"
            entry["authenticated"] = True
            entry["actions"] = {
                "upload": {"href": f"{call.base_url}/lfs-storage/{oid}"},
                "verify": {"href": verify},
            }
        objects.append(entry)
    return as_json({"transfer": "basic", "objects": objects}, headers=LFS_TYPE)


@route("PUT", "/lfs-storage/{oid}")
def lfs_put(call: Call) -> Response:
    """The upload itself, by a link that needs no token. The content must be what it says."""
    oid = call.args["oid"]
    if oid not in call.store.awaited:
        raise HubError(403, "This upload link was not handed out")
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise HubError(400, "The content does not have this sha256")
    call.store.lfs[oid] = call.body
    call.store.awaited.discard(oid)
    return Response(200)


@route("POST", "/{repo}.git/info/lfs/objects/verify")
def lfs_verify(call: Call) -> Response:
    proposable(call)
    body = call.json()
    blob = call.store.blob_of(str(body.get("oid")))
    if blob is None or blob.size != body.get("size"):
        raise HubError(404, "Object was not uploaded")
    return as_json({}, headers=LFS_TYPE)


@route("POST", "/api/models/{repo}/commit/{rev}")
def commit(call: Call) -> Response:
    """One commit from ndjson lines: a `header`, then files, LFS files and deletions.

    With `parentCommit` the branch must still be there, otherwise 412. With `?create_pr=1` the
    commit opens a pull request instead, on that parent or on the branch.
    """
    repo = _target(call)
    user = signed_in(call)
    revision = call.args["rev"]
    lines = _lines(call.body)
    header = next((value for key, value in lines if key == "header"), {})
    title = header.get("summary")
    if not isinstance(title, str) or not title.strip():
        raise HubError(400, "A commit needs a summary")
    parent, stated = repo.commit_at(revision), header.get("parentCommit")
    made = {"author": user.name, "description": str(header.get("description") or "")}

    if call.flag("create_pr"):
        parent = repo.commit_at(str(stated)) if stated else parent
        files = _apply(call, parent, lines)
        pull = open_discussion(call, repo, title, made["description"], base=parent.oid)
        pull.status = "open"
        new = call.store.commit(repo, pull.ref, files, title, parent=parent.oid, **made)
        pull_url = f"{call.base_url}/{repo.id}/discussions/{pull.num}"
        return _committed(call, repo, new, pull_url)

    ref = repo.ref_of(revision)
    if stated and stated != parent.oid:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    require_write(user, repo.id)
    files = _apply(call, parent, lines)
    new = call.store.commit(repo, ref, files, title, parent=parent.oid, **made)
    return _committed(call, repo, new, None)


def _committed(call: Call, repo: Repo, new: Commit, pull_url: str | None) -> Response:
    url = f"{call.base_url}/{repo.id}/commit/{new.oid}"
    answer = {"success": True, "commitOid": new.oid, "commitUrl": url, "hookOutput": ""}
    return as_json({**answer, "pullRequestUrl": pull_url})


def _lines(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        return [(line["key"], line["value"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(400, "Invalid ndjson body") from error


def _apply(call: Call, parent: Commit, lines: list[tuple[str, dict[str, Any]]]) -> dict[str, Blob]:
    """The parent's files with all operations done; none is done if one cannot be."""
    files = dict(parent.files)
    for key, value in lines:
        if key == "header":
            continue
        path = str(value.get("path", ""))
        if key == "file":
            files[_safe(path)] = Blob(_content(path, value), lfs=False)
        elif key == "lfsFile":
            stored = call.store.blob_of(str(value.get("oid")))
            if stored is None:
                raise HubError(400, f"LFS object of {path} was not uploaded")
            files[_safe(path)] = stored
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [path] if key == "deletedFile" else [p for p in files if p.startswith(folder)]
            if not gone or any(name not in files for name in gone):
                message = "A file with this name doesn't exist"
                raise HubError(404, message, code="EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation {key}")
    return files


def _safe(path: str) -> str:
    """Git holds no such names, so the Hub takes none. (Tests plant them past this check.)"""
    if not path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise HubError(400, f"Invalid path: {path}")
    return path


def _content(path: str, value: dict[str, Any]) -> bytes:
    text = str(value.get("content", ""))
    try:
        content = base64.b64decode(text) if value.get("encoding") == "base64" else text.encode()
    except binascii.Error as error:
        raise HubError(400, f"Invalid base64 for {path}") from error
    if path == "README.md":
        errors, _ = problems(content.decode("utf-8", errors="replace"))
        if errors:
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    if goes_to_lfs(path, len(content), content[:512]):
        raise HubError(400, f"Your push was rejected because {path} must go through LFS")
    return content
