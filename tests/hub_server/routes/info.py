"""One model: its page, and what its tree holds."""

from __future__ import annotations

from ..access import downloadable, readable, writable
from ..git import Commit
from ..store import Repo
from ..views import DETAIL, EXPANDABLE, last_commit, model, path_entry, tree
from ..wire import Call, HubError, Response, as_json, page_of, route


@route("GET", "/api/models/{repo}/tree/{rev}(?:/{path})?")
def list_tree(call: Call) -> Response:
    """Files and folders, sorted by path, in pages."""
    repo = readable(call)
    commit = repo.commit_at(call.args["rev"])
    folder = (call.args.get("path") or "").strip("/")
    entries = tree(commit, folder, recursive=call.flag("recursive"))
    page, link = page_of(call, entries, lambda entry: [entry["path"]], call.store.page_size)
    if call.flag("expand"):
        page = [{**e, "lastCommit": last_commit(repo, commit, e["path"])} for e in page]
    return as_json(page, headers=link)


@route("POST", "/api/models/{repo}/paths-info/{rev}")
def paths_info(call: Call) -> Response:
    """Named paths, form-encoded. Paths that do not exist are left out of the answer."""
    repo = readable(call)
    commit = repo.commit_at(call.args["rev"])
    form = call.form()
    found = [path_entry(commit, path) for path in form.get("paths", [])]
    entries = [entry for entry in found if entry]
    if form.get("expand", ["false"])[0].lower() in ("1", "true"):
        entries = [{**e, "lastCommit": last_commit(repo, commit, e["path"])} for e in entries]
    return as_json(entries)


@route("GET", "/api/models/{repo}/auth-check")
def auth_check(call: Call) -> Response:
    """Whether the files may be downloaded."""
    downloadable(call)
    return as_json({})


@route("GET", "/api/models/{repo}/auth-check/write")
def auth_check_write(call: Call) -> Response:
    writable(call)
    return as_json({})


@route("GET", "/api/models/{repo}/revision/{rev}")
def model_info_at(call: Call) -> Response:
    repo = readable(call)
    return _show(call, repo, repo.commit_at(call.args["rev"]))


@route("GET", "/api/models/{repo}")
def model_info(call: Call) -> Response:
    repo = readable(call)
    return _show(call, repo, repo.head)


def _show(call: Call, repo: Repo, commit: Commit) -> Response:
    expand = call.query.get("expand", []) + call.query.get("expand[]", [])
    for name in expand:
        if name not in EXPANDABLE:
            raise HubError(400, f'"expand" must be one of {sorted(EXPANDABLE)}, got "{name}"')
    return as_json(model(repo, commit, expand or DETAIL, blobs=call.flag("blobs")))
