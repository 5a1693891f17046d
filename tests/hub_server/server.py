"""`HubServer`: a Hub on loopback, to fill, to break and to count on."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from .faults import Fault, Faults
from .git import Blob, Commit
from .handler import Listener
from .log import Log, Request
from .store import Repo, Store, User

Files = Mapping[str, bytes | str | Path]
Date = datetime | str | None


class HubServer:
    """A Hub that speaks HTTP on 127.0.0.1, all of it in memory.

    ```
    with HubServer() as hub:
        hub.add_repo("me/adapter", {"adapter_config.json": "{}"})
        HfApi(endpoint=hub.url, token=hub.token).model_info("me/adapter")
    ```

    Commit ids and dates follow from the order of calls alone: each event is a minute later than
    the one before. The user `me` exists from the start.
    """

    def __init__(self, *, port: int = 0, page_size: int = 1000) -> None:
        self.store = Store()
        self.store.page_size = page_size
        self._faults, self._log = Faults(), Log()
        self._port = port
        self._listener: Listener | None = None
        self.user = "me"
        self.token = self.add_user(self.user)

    def start(self) -> HubServer:
        """Listen. After a `stop`, on the same port as before, with everything still there."""
        if self._listener is None:
            self._listener = Listener(self._port, self.store, self._faults, self._log)
            self._port = self._listener.server_port
            arguments = {"poll_interval": 0.02}
            serve = self._listener.serve_forever
            threading.Thread(target=serve, kwargs=arguments, daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening and cut all connections: from now on the Hub cannot be reached."""
        if self._listener is not None:
            self._listener.close_all()
            self._listener = None

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The endpoint, without a slash at its end."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def page_size(self) -> int:
        """Entries a page at most, in every paged listing."""
        return self.store.page_size

    @page_size.setter
    def page_size(self, size: int) -> None:
        self.store.page_size = size

    # Users and repos

    def add_user(self, name: str, *, orgs: Sequence[str] = (), role: str = "write") -> str:
        """A user, and the token that stands for them. With role `read` it may not write."""
        user = self.store.users[name] = User(name, tuple(orgs), role)
        return user.token

    def add_repo(
        self,
        repo_id: str,
        files: Files | None = None,
        *,
        private: bool = False,
        gated: bool | str = False,
        disabled: bool = False,
        tags: Sequence[str] = (),
        card_data: Mapping[str, Any] | None = None,
        downloads: int = 0,
        likes: int = 0,
        library_name: str | None = None,
        created_at: Date = None,
        last_modified: Date = None,
        message: str = "initial commit",
        author: str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Repo:
        """A repo with one commit of exactly these files, on `main`.

        Its tags, `cardData`, library and base models are derived from its README and file names.
        `card_data` writes a README with that front matter. `tags` and `library_name` add to what
        is derived; `overrides` puts raw values into listings, however wrong. Names such as
        `../x` are taken as they are. A repo of the same name is replaced, its history gone.
        """
        files = dict(files or {})
        if card_data is not None:
            if "README.md" in files:
                raise ValueError("card_data and a README.md contradict each other: give one")
            front = yaml.safe_dump(dict(card_data), sort_keys=False, allow_unicode=True)
            files["README.md"] = f"---\n{front}---\n\n# {repo_id}\n"
        with self.store.lock:
            repo = self.store.create(
                repo_id,
                created=_date(created_at) or _date(last_modified),
                private=private,
                gated="auto" if gated is True else gated,
                disabled=disabled,
                downloads=downloads,
                likes=likes,
                library=library_name,
                tags=tuple(tags),
                overrides=dict(overrides or {}),
            )
            self.store.commit(
                repo,
                "refs/heads/main",
                _blobs(files),
                message,
                date=_date(last_modified),
                author=author or repo_id.partition("/")[0],
            )
        return repo

    def add_folder(self, folder: Path, repo_id: str, **options: Any) -> Repo:
        """A repo of the files in a folder, read from there as they are asked for."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        named = {path.relative_to(folder).as_posix(): path for path in paths}
        kept = {name: path for name, path in named.items() if ".git" not in name.split("/")}
        return self.add_repo(repo_id, kept, **options)

    def repo(self, repo_id: str) -> Repo:
        """The repo itself; its fields (downloads, private, gated, …) may be set."""
        return self.store.repos[repo_id]

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | Path | None],
        message: str = "update",
        *,
        branch: str = "main",
        date: Date = None,
    ) -> str:
        """Add, replace, or (None) delete files; gives the new commit's id.

        A branch that does not exist is made from `main`.
        """
        with self.store.lock:
            repo = self.repo(repo_id)
            ref = f"refs/heads/{branch}"
            parent = repo.commits[repo.refs.get(ref, repo.head.oid)]
            kept = {path: blob for path, blob in parent.files.items() if path not in files}
            new = _blobs({path: data for path, data in files.items() if data is not None})
            when = _date(date)
            made = self.store.commit(
                repo, ref, kept | new, message, parent=parent.oid, date=when, author=self.user
            )
            return made.oid

    def force_push(self, repo_id: str, files: Files, message: str = "rewritten") -> str:
        """Replace `main` by one commit of these files. Earlier commits cannot be had any more."""
        with self.store.lock:
            repo = self.repo(repo_id)
            repo.commits.clear()
            repo.refs.clear()
            made = self.store.commit(repo, "refs/heads/main", _blobs(files), message)
            return made.oid

    def tag(self, repo_id: str, name: str, revision: str = "main") -> None:
        """Name a revision."""
        repo = self.repo(repo_id)
        repo.refs[f"refs/tags/{name}"] = repo.commit_at(revision).oid

    def remove_repo(self, repo_id: str) -> None:
        """Delete a repo."""
        with self.store.lock:
            del self.store.repos[repo_id]

    def rename(self, old: str, new: str) -> None:
        """Move a repo; the old name redirects."""
        with self.store.lock:
            self.store.rename(old, new)

    def grant(self, repo_id: str, user: str) -> None:
        """Let a user download from a gated repo."""
        self.repo(repo_id).granted.add(user)

    # Looking in, without a request

    def sha(self, repo_id: str, revision: str = "main") -> str:
        """The commit id of a revision."""
        return self.repo(repo_id).commit_at(revision).oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """All files at a revision."""
        commit = self.repo(repo_id).commit_at(revision)
        return {path: blob.read() for path, blob in commit.files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The history of a revision, newest first."""
        repo = self.repo(repo_id)
        return repo.history(repo.commit_at(revision))

    # Faults and the log

    def fail(self, pattern: str, **how: Any) -> Fault:
        """Let requests whose path fits a shell pattern go wrong; the fields of `Fault` say how.

        `fail("/api/models", status=429, retry_after=3)`;
        `fail("*/resolve/*.safetensors", cut=1000, after=2)`. Gives the fault, with its `hits`.
        """
        return self._faults.add(Fault(pattern, **how))

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in the order they were answered."""
        return self._log.find()

    def find(
        self, pattern: str = "*", *, method: str | None = None, status: int | None = None
    ) -> list[Request]:
        """The requests whose path fits a shell pattern."""
        return self._log.find(pattern, method=method, status=status)

    def count(
        self, pattern: str = "*", *, method: str | None = None, status: int | None = None
    ) -> int:
        """How many requests there were whose path fits a shell pattern."""
        return len(self._log.find(pattern, method=method, status=status))

    def reset_log(self) -> None:
        """Count from zero again."""
        self._log.clear()


def _blobs(files: Files) -> dict[str, Blob]:
    return {path: Blob.of(path, content) for path, content in files.items()}


def _date(date: Date) -> datetime | None:
    """A date given as such or in ISO form; one without a zone is an error waiting to happen."""
    date = datetime.fromisoformat(date) if isinstance(date, str) else date
    if date is not None and date.tzinfo is None:
        raise ValueError(f"{date} has no time zone")
    return date
