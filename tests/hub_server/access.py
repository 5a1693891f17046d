"""Who may do what, and how the Hub says no."""

from __future__ import annotations

from urllib.parse import urlencode

from .store import Repo, User
from .wire import Call, HubError


def signed_in(call: Call) -> User:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    return call.user


def readable(call: Call) -> Repo:
    """The repo of the call, for its metadata. A gated repo's metadata is public.

    A repo that is private to others looks as if it did not exist. Without a token the answer to
    both is 401, with one it is 404. A repo that moved answers with a redirect.
    """
    repo_id = call.args["repo"]
    if repo_id in call.store.moved:
        target = call.base_url + call.path.replace(repo_id, call.store.moved[repo_id], 1)
        target += f"?{urlencode(call.query, doseq=True)}" if call.query else ""
        raise HubError(307, "Temporary Redirect", headers={"Location": target})
    repo = call.store.repos.get(repo_id)
    if repo is None or (repo.private and not (call.user and call.user.owns(repo_id))):
        if call.user is None:
            raise HubError(401, "Invalid username or password.", code="RepoNotFound")
        raise HubError(404, "Repository not found", code="RepoNotFound")
    if repo.disabled:
        raise HubError(403, "Access to this resource is disabled.")
    return repo


def downloadable(call: Call) -> Repo:
    """The repo of the call, for the content of its files."""
    repo = readable(call)
    user = call.user
    if not repo.gated or (user and (user.owns(repo.id) or user.name in repo.granted)):
        return repo
    message = f"Access to model {repo.id} is restricted"
    if user is None:
        message += ". You must have access to it and be authenticated to access it. Please log in."
        raise HubError(401, message, code="GatedRepo")
    message += " and you are not in the authorized list."
    raise HubError(403, message, code="GatedRepo")


def writable(call: Call) -> Repo:
    """The repo of the call, for changing it."""
    user = signed_in(call)
    repo = readable(call)
    require_write(user, repo.id)
    return repo


def proposable(call: Call) -> Repo:
    """The repo of the call, for discussions and pull requests: whoever can read it."""
    signed_in(call)
    return readable(call)


def require_write(user: User, repo_id: str) -> None:
    if user.role != "write" or not user.owns(repo_id):
        raise HubError(403, "You don't have the rights to write to this repo")
