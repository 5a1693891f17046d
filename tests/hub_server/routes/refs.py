"""Branches, tags and history."""

from __future__ import annotations

from ..access import readable, writable
from ..store import Repo
from ..views import commit_entry
from ..wire import Call, HubError, Response, as_json, page_of, route


@route("GET", "/api/models/{repo}/refs")
def list_refs(call: Call) -> Response:
    repo = readable(call)
    answer = {"branches": _named(repo, "refs/heads/"), "converts": []}
    answer["tags"] = _named(repo, "refs/tags/")
    if call.flag("include_prs"):
        answer["pullRequests"] = _named(repo, "refs/pr/")
    return as_json(answer)


def _named(repo: Repo, start: str) -> list[dict[str, str]]:
    return [
        {"name": ref.removeprefix(start), "ref": ref, "targetCommit": oid}
        for ref, oid in repo.refs.items()
        if ref.startswith(start)
    ]


@route("GET", "/api/models/{repo}/commits/{rev}")
def list_commits(call: Call) -> Response:
    """The history, newest first."""
    repo = readable(call)
    numbered = list(enumerate(repo.history(repo.commit_at(call.args["rev"]))))
    page, link = page_of(call, numbered, lambda item: [item[0]], call.store.page_size)
    return as_json([commit_entry(commit) for _, commit in page], headers=link)


@route("POST", "/api/models/{repo}/branch/{name}")
def create_branch(call: Call) -> Response:
    repo = writable(call)
    start = call.json().get("startingPoint") or "main"
    return _create(repo, f"refs/heads/{call.args['name']}", str(start))


@route("POST", "/api/models/{repo}/tag/{rev}")
def create_tag(call: Call) -> Response:
    repo = writable(call)
    return _create(repo, f"refs/tags/{call.json().get('tag')}", call.args["rev"])


def _create(repo: Repo, ref: str, revision: str) -> Response:
    if ref in repo.refs:
        raise HubError(409, f"Reference {ref} already exists")
    repo.refs[ref] = repo.commit_at(revision).oid
    return as_json({})


@route("DELETE", "/api/models/{repo}/branch/{name}")
def delete_branch(call: Call) -> Response:
    """The default branch cannot be deleted."""
    repo = writable(call)
    if call.args["name"] == "main":
        raise HubError(403, "Cannot delete the default branch")
    return _delete(repo, f"refs/heads/{call.args['name']}")


@route("DELETE", "/api/models/{repo}/tag/{name}")
def delete_tag(call: Call) -> Response:
    return _delete(writable(call), f"refs/tags/{call.args['name']}")


def _delete(repo: Repo, ref: str) -> Response:
    if repo.refs.pop(ref, None) is None:
        raise HubError(404, f"Reference {ref} does not exist", code="RevisionNotFound")
    return as_json({})
