"""Everything the server knows: users, repos with their history, uploaded LFS objects."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from .card import card_data, library_of, tags_of
from .git import Blob, Commit, iso
from .wire import HubError

EPOCH = datetime(2025, 1, 1, tzinfo=UTC)


@dataclass
class User:
    """Who a token stands for. A `read` token may not write."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"

    @property
    def token(self) -> str:
        return f"hf_{self.name}_{self.role}"

    def owns(self, repo_id: str) -> bool:
        """Whether the repo is in this user's namespace or an organisation's of theirs."""
        return repo_id.partition("/")[0] in (self.name, *self.orgs)


@dataclass
class Discussion:
    """A discussion, or a pull request: the latter has a head commit in `refs/pr/N`."""

    num: int
    title: str
    author: str
    date: datetime
    base: str | None = None
    """The commit that a pull request started from; None for a plain discussion."""
    status: str = "open"
    events: list[dict[str, Any]] = field(default_factory=list)
    merged_as: str | None = None

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    """One model repo. The fields are what a test may set; history goes through `commit`."""

    id: str
    created: datetime
    private: bool = False
    gated: str | bool = False
    """False, or how access is given: `auto` or `manual`."""
    disabled: bool = False
    downloads: int = 0
    likes: int = 0
    trending: int = 0
    library: str | None = None
    """Shown instead of what card and files say."""
    tags: tuple[str, ...] = ()
    """Tags beyond those that card and files give."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values put into listings as they are, to play a repo with nonsense in a field."""
    granted: set[str] = field(default_factory=set)
    """Users that may download although it is gated."""
    refs: dict[str, str] = field(default_factory=dict)
    """`refs/heads/…`, `refs/tags/…` and `refs/pr/N` to commit ids."""
    commits: dict[str, Commit] = field(default_factory=dict)
    discussions: dict[int, Discussion] = field(default_factory=dict)
    _cards: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    def commit_at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full ref or a full commit id; nothing shorter."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        oid = next((self.refs[name] for name in names if name in self.refs), revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return self.commits[oid]

    def ref_of(self, revision: str) -> str:
        """The ref that a commit on `revision` moves: a branch or a pull request."""
        for name in (f"refs/heads/{revision}", revision):
            if name in self.refs and not name.startswith("refs/tags/"):
                return name
        raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    @property
    def head(self) -> Commit:
        return self.commit_at("main")

    @property
    def last_modified(self) -> str:
        return iso(self.head.date)

    def history(self, commit: Commit) -> list[Commit]:
        """The commit and its first parents, newest first."""
        commits = [commit]
        while commits[-1].parents:
            commits.append(self.commits[commits[-1].parents[0]])
        return commits

    def card(self, commit: Commit) -> dict[str, Any] | None:
        """`cardData` at a commit."""
        if commit.oid not in self._cards:
            readme = commit.files.get("README.md")
            self._cards[commit.oid] = card_data(readme.read() if readme else None)
        return self._cards[commit.oid]

    def library_at(self, commit: Commit) -> str | None:
        return self.library or library_of(self.card(commit) or {}, commit.files)

    def tags_at(self, commit: Commit) -> list[str]:
        tags = tags_of(self.card(commit) or {}, list(commit.files), self.library_at(commit))
        return list(dict.fromkeys([*tags, *self.tags]))


class Store:
    """The Hub's state. Routes run one at a time, under `lock`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}
        self.users: dict[str, User] = {}
        self.lfs: dict[str, bytes] = {}
        self.awaited: set[str] = set()
        """LFS objects that an upload link was handed out for."""
        self.page_size = 1000
        self._now = EPOCH

    def tick(self, date: datetime | None = None) -> datetime:
        """The date of the next event: a minute after the latest so far, or the one given."""
        date = date or self._now + timedelta(minutes=1)
        self._now = max(self._now, date)
        return date

    def create(self, repo_id: str, **fields: Any) -> Repo:
        """A repo without any commit yet."""
        repo = Repo(repo_id, fields.pop("created", None) or self.tick(), **fields)
        self.repos[repo_id] = repo
        self.moved.pop(repo_id, None)
        return repo

    def rename(self, old: str, new: str) -> None:
        """Move a repo; the old name is kept as a redirect."""
        repo = self.repos[new] = self.repos.pop(old)
        repo.id = new
        self.moved.pop(new, None)
        self.moved[old] = new

    def commit(
        self,
        repo: Repo,
        ref: str,
        files: Mapping[str, Blob],
        title: str,
        *,
        parent: str | None = None,
        **fields: Any,
    ) -> Commit:
        """Make a commit of all `files`, and move `ref` to it."""
        commit = Commit(
            files=dict(sorted(files.items())),
            title=title,
            date=self.tick(fields.pop("date", None)),
            parents=(parent,) if parent else (),
            **fields,
        )
        repo.commits[commit.oid] = commit
        repo.refs[ref] = commit.oid
        return commit

    def blob_of(self, oid: str) -> Blob | None:
        """An LFS object by its sha256, wherever it is: just uploaded, or in some repo."""
        if oid in self.lfs:
            return Blob(self.lfs[oid], lfs=True)
        for repo in self.repos.values():
            for commit in repo.commits.values():
                for blob in commit.files.values():
                    if blob.lfs and blob.sha256 == oid:
                        return blob
        return None
