"""Publish a mixture: one commit that holds all of it, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, get_token
from huggingface_hub.errors import HfHubHTTPError

from lorahub_registry.adapters.tensors import file_sha256
from lorahub_registry.errors import HubError
from lorahub_registry.hub.cache import git_id
from lorahub_registry.hub.client import Hub, heard, hub_id
from lorahub_registry.hub.discover import README, list_files
from lorahub_registry.hub.failures import (
    LOGIN,
    Busy,
    Missing,
    Unreachable,
    Where,
    explained,
    stale,
    translate,
)
from lorahub_registry.hub.publishable import LocalFile, collect
from lorahub_registry.progress import Progress, silent
from lorahub_registry.settings import Settings


@dataclass(frozen=True)
class PushResult:
    """What a push did, or (``dry_run``) would do.

    Attributes:
        url: the repo's page.
        commit: the commit that holds the files; None in a dry run.
        pr_url: the pull request's page, where one was made.
        files: (name, size) of all files.
        changed: False where the repo held all of this already.
    """

    url: str
    commit: str | None
    pr_url: str | None
    files: tuple[tuple[str, int], ...]
    changed: bool


def push(
    folder: Path,
    repo: str,
    *,
    settings: Settings,
    private: bool = False,
    create_pr: bool = False,
    message: str | None = None,
    expected_parent: str | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> PushResult:
    """Publish the mixture in ``folder`` as one commit; the repo is made where it is missing.

    Only a mixture's own files go: config, weights, README, recipe, lock, results and plots.

    Args:
        private: make the repo private; one that exists and is public is refused.
        create_pr: propose it instead, as a pull request.
        expected_parent: the commit that the repo must still be at.
        dry_run: check the files and list them; no request is made.

    Raises:
        OutputError: a file holds a token or a local path, or one is missing.
        HubError: not allowed, or the repo has moved on. The repo is as it was.
    """
    name = hub_id(repo, what="a repo to push to")
    files, left = collect(folder, token=get_token())
    if left:
        progress.say(f"not published: {', '.join(left)}")
    card = next((file.content or b"" for file in files if file.name == README), None)
    if card is None or not card.lstrip().startswith(b"---"):
        progress.warn(f"{folder}: no {README} with metadata: a search will not find this")
    hub = Hub(settings, progress)
    listed = tuple((file.name, file.size) for file in files)
    url = f"{hub.endpoint}/{name}"
    if dry_run:
        return PushResult(url, None, None, listed, changed=True)
    where = hub.where(name)
    hub.require_online(where)
    if get_token() is None:
        raise HubError(f"{where}: pushing needs an account, and nobody is logged in", hint=LOGIN)
    title = message or f"Publish {folder.absolute().name} with lorareg"
    with heard(progress), progress.task(f"Pushing {name}"):
        parent = _ready(hub, name, private, create_pr, expected_parent)
        commit, pr_url = _commit(hub, where, name, files, title, parent, create_pr)
    return PushResult(url, commit, pr_url, listed, changed=commit != parent)


def _ready(hub: Hub, repo: str, private: bool, create_pr: bool, expected: str | None) -> str:
    """The commit to push onto, after making the repo where it is missing."""
    where = hub.where(repo)
    try:
        info = hub.info(repo)
    except Missing:
        if create_pr or expected:
            raise
        with explained(where):
            hub.api.create_repo(repo, private=private, exist_ok=True)
        info = hub.info(repo)
        hub.progress.say(f"made {where.page}{' (private)' if private else ''}")
    head = str(info["sha"])
    if private and info.get("private") is False:
        raise HubError(
            f"{repo} exists and is public; nothing was pushed",
            hint=f"make it private on {where.page}/settings, or push without --private",
        )
    if expected and expected != head and not create_pr:
        raise stale(where)
    return head if not create_pr else expected or head


def _commit(
    hub: Hub,
    where: Where,
    repo: str,
    files: Sequence[LocalFile],
    title: str,
    parent: str,
    create_pr: bool,
) -> tuple[str, str | None]:
    operations = [
        CommitOperationAdd(f.name, str(f.path) if f.content is None else f.content) for f in files
    ]
    try:
        made = hub.api.create_commit(
            repo,
            operations,
            commit_message=title,
            parent_commit=parent,
            create_pr=create_pr,
        )
        return made.oid, made.pr_url
    except Exception as error:
        known = translate(error, where)
        if known is None:
            raise
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if refused or not isinstance(known, (Busy, Unreachable)):
            raise known from error
        # The request may have done its work although its answer was lost.
        found = _look_again(hub, where, repo, files, title, parent, create_pr, known)
        if found is None:
            raise known from error
        hub.progress.say(f"{repo}: the Hub's answer was lost, but the commit is there")
        return found


def _look_again(
    hub: Hub,
    where: Where,
    repo: str,
    files: Sequence[LocalFile],
    title: str,
    parent: str,
    create_pr: bool,
    known: Exception,
) -> tuple[str, str | None] | None:
    """The commit (and pull request) that a push without an answer made; None where it did not."""
    try:
        revision: str | None = None
        url: str | None = None
        if create_pr:
            with explained(where):
                ours = _pull_request(hub, repo, title)
            if ours is None:
                return None
            revision, url = f"refs/pr/{ours}", f"{where.page}/discussions/{ours}"
        head = str(hub.info(repo, revision)["sha"])
        if head != parent and _holds(hub, repo, head, files):
            return head, url
        return None
    except (Busy, Unreachable) as error:
        raise HubError(
            f"{known}; whether the commit was made cannot be told",
            hint=f"see {where.page}/commits/main before pushing again",
        ) from error


def _pull_request(hub: Hub, repo: str, title: str) -> int | None:
    """The number of the newest open pull request of that title."""
    found: Any = hub.api.get_repo_discussions(repo, discussion_type="pull_request")
    return next((int(d.num) for d in found if d.title == title), None)


def _holds(hub: Hub, repo: str, commit: str, files: Sequence[LocalFile]) -> bool:
    """Whether a commit holds exactly these files' contents."""
    there = {file.path: file for file in list_files(hub, repo, commit)}
    for file in files:
        found = there.get(file.name)
        if found is None or found.size != file.size:
            return False
        content = file.content if file.content is not None else b""
        same = (
            file_sha256(file.path) == found.sha256
            if found.sha256
            else git_id(content) == found.git_id
        )
        if not same:
            return False
    return True
