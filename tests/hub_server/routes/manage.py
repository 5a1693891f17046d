"""Creating, deleting, moving repos, and their settings."""

from __future__ import annotations

from ..access import readable, require_write, signed_in, writable
from ..git import Blob, gitattributes
from ..wire import Call, HubError, Response, as_json, route


def _named(call: Call) -> str:
    """The repo that the JSON body names; without an organisation it is the user's own."""
    body = call.json()
    if body.get("type") not in (None, "model"):
        raise HubError(400, "This Hub has models only")
    name = body.get("name")
    if not isinstance(name, str) or not name:
        raise HubError(400, "Missing name")
    return f"{body.get('organization') or signed_in(call).name}/{name}"


@route("POST", "/api/repos/create")
def create(call: Call) -> Response:
    """A new repo starts with one commit, of `.gitattributes`. An existing one answers 409."""
    user = signed_in(call)
    repo_id = _named(call)
    require_write(user, repo_id)
    url = f"{call.base_url}/{repo_id}"
    if repo_id in call.store.repos:
        raise HubError(409, "You already created this model repo", url=url)
    visibility = call.json().get("visibility", "public")
    repo = call.store.create(repo_id, private=visibility == "private")
    files = {".gitattributes": Blob.of(".gitattributes", gitattributes())}
    call.store.commit(repo, "refs/heads/main", files, "initial commit", author=user.name)
    return as_json({"url": url, "name": repo_id, "id": repo_id})


@route("DELETE", "/api/repos/delete")
def delete(call: Call) -> Response:
    user = signed_in(call)
    call.args["repo"] = _named(call)
    repo = readable(call)
    require_write(user, repo.id)
    del call.store.repos[repo.id]
    return as_json({})


@route("POST", "/api/repos/move")
def move(call: Call) -> Response:
    """The old name redirects to the new one from then on."""
    user = signed_in(call)
    body = call.json()
    call.args["repo"], target = str(body.get("fromRepo")), str(body.get("toRepo"))
    repo = readable(call)
    for repo_id in (repo.id, target):
        require_write(user, repo_id)
    if target in call.store.repos:
        raise HubError(409, f"{target} exists")
    call.store.rename(repo.id, target)
    return as_json({})


@route("PUT", "/api/models/{repo}/settings")
def settings(call: Call) -> Response:
    """Visibility and gating."""
    repo = writable(call)
    body = call.json()
    if "visibility" in body:
        repo.private = body["visibility"] == "private"
    if "gated" in body:
        repo.gated = body["gated"]
    return as_json({"private": repo.private, "gated": repo.gated})
