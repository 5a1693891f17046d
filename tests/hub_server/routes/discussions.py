"""Discussions and pull requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..access import proposable, readable, signed_in, writable
from ..git import Blob, iso
from ..store import Discussion, Repo
from ..wire import Call, HubError, Response, as_json, route


def open_discussion(
    call: Call, repo: Repo, title: str, text: str, *, base: str | None = None
) -> Discussion:
    """A new discussion. With a base commit it is a pull request, a draft at first."""
    num = len(repo.discussions) + 1
    made = Discussion(num, title, signed_in(call).name, call.store.tick(), base)
    if base:
        made.status = "draft"
        repo.refs[made.ref] = base
    repo.discussions[num] = made
    _happened(call, made, "comment", edited=False, hidden=False, latest={"raw": text})
    return made


def _happened(call: Call, discussion: Discussion, kind: str, **data: Any) -> dict[str, Any]:
    """Note an event in the discussion's thread."""
    event = {
        "id": f"{discussion.num:012x}{len(discussion.events):012x}",
        "type": kind,
        "createdAt": iso(call.store.tick()),
        "author": {"name": signed_in(call).name},
        "data": data,
    }
    discussion.events.append(event)
    return event


def _found(call: Call, repo: Repo) -> Discussion:
    discussion = repo.discussions.get(int(call.args["n"]))
    if discussion is None:
        raise HubError(404, "Discussion not found")
    return discussion


def _entry(repo: Repo, discussion: Discussion) -> dict[str, Any]:
    return {
        "num": discussion.num,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "createdAt": iso(discussion.date),
        "status": discussion.status,
        "isPullRequest": discussion.base is not None,
        "repo": {"name": repo.id, "type": "model"},
    }


@route("GET", "/api/models/{repo}/discussions")
def list_discussions(call: Call) -> Response:
    """The newest first, in pages by number (`?p=`)."""
    repo = readable(call)
    kinds = {"pull_request": (True,), "discussion": (False,)}.get(call.first("type"), (True, False))
    states = {"open": ("draft", "open"), "closed": ("closed", "merged")}.get(call.first("status"))
    found = [
        item
        for item in reversed(repo.discussions.values())
        if (item.base is not None) in kinds and (states is None or item.status in states)
        if call.first("author") in ("", item.author)
    ]
    size = call.store.page_size
    start = int(call.first("p", "0")) * size
    entries = [_entry(repo, item) for item in found[start : start + size]]
    return as_json({"discussions": entries, "count": len(found), "start": start})


@route("POST", "/api/models/{repo}/discussions")
def create_discussion(call: Call) -> Response:
    repo = proposable(call)
    body = call.json()
    base = repo.head.oid if body.get("pullRequest") else None
    title, text = str(body.get("title")), str(body.get("description") or "")
    made = open_discussion(call, repo, title, text, base=base)
    url = f"{call.base_url}/{repo.id}/discussions/{made.num}"
    return as_json({"num": made.num, "url": url, "pullRequest": base is not None})


@route("GET", "/api/models/{repo}/discussions/{n}")
def show_discussion(call: Call) -> Response:
    """The thread, and for a pull request what it changes and what stands in its way."""
    repo = readable(call)
    discussion = _found(call, repo)
    answer = {**_entry(repo, discussion), "events": discussion.events}
    if discussion.base:
        changes = _changes(repo, discussion)
        answer["filesWithConflicts"] = _conflicts(repo, discussion, changes)
        answer["changes"] = {"base": "refs/heads/main", "mergeCommitId": discussion.merged_as}
        if call.flag("diff"):
            answer["diff"] = "".join(f"diff --git a/{path} b/{path}\n" for path in sorted(changes))
    return as_json(answer)


@route("POST", "/api/models/{repo}/discussions/{n}/merge")
def merge(call: Call) -> Response:
    """The pull request's changes become one commit on `main`."""
    repo = writable(call)
    discussion = _found(call, repo)
    if discussion.base is None or discussion.status not in ("draft", "open"):
        raise HubError(400, "Only an open pull request can be merged")
    changes = _changes(repo, discussion)
    if _conflicts(repo, discussion, changes):
        raise HubError(409, "This pull request has conflicts")
    files = {path: blob for path, blob in {**repo.head.files, **changes}.items() if blob}
    title = f"{discussion.title} (#{discussion.num})"
    made = {"parent": repo.head.oid, "author": signed_in(call).name}
    commit = call.store.commit(repo, "refs/heads/main", files, title, **made)
    discussion.status, discussion.merged_as = "merged", commit.oid
    _happened(call, discussion, "status-change", status="merged")
    return as_json({})


@route("POST", "/api/models/{repo}/discussions/{n}/comment")
def comment(call: Call) -> Response:
    discussion = _found(call, proposable(call))
    latest = {"raw": str(call.json().get("comment"))}
    event = _happened(call, discussion, "comment", edited=False, hidden=False, latest=latest)
    return as_json({"newMessage": event})


@route("POST", "/api/models/{repo}/discussions/{n}/status")
def change_status(call: Call) -> Response:
    """Opening a draft, closing, reopening."""
    discussion = _found(call, proposable(call))
    status = call.json().get("status")
    if status not in ("open", "closed"):
        raise HubError(400, "Status must be open or closed")
    discussion.status = status
    return as_json({"newStatus": _happened(call, discussion, "status-change", status=status)})


def _changes(repo: Repo, pull: Discussion) -> dict[str, Blob | None]:
    """What a pull request does to each path: its new content, None where it deletes."""
    return _difference(repo.commits[pull.base or ""].files, repo.commit_at(pull.ref).files)


def _difference(old: Mapping[str, Blob], new: Mapping[str, Blob]) -> dict[str, Blob | None]:
    """The paths whose content is not the same, with the new content."""

    def oid(files: Mapping[str, Blob], path: str) -> str | None:
        return files[path].oid if path in files else None

    return {path: new.get(path) for path in {**old, **new} if oid(old, path) != oid(new, path)}


def _conflicts(repo: Repo, pull: Discussion, changes: dict[str, Blob | None]) -> list[str]:
    """Paths that `main` changed too since the pull request started."""
    if pull.merged_as:
        return []
    moved = _difference(repo.commits[pull.base or ""].files, repo.head.files)
    return sorted(set(changes) & set(moved))
