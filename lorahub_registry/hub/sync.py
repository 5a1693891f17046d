"""Bring the registry up to what the Hub lists for a base, without downloading any adapter.

The listing comes newest first. A repo whose commit is known costs nothing; of any other, each
adapter costs two calls: its config, and its header. What its card says is in the listing already
(licence, datasets, tags, scores); the prose of its README is read when it is pulled. Repos are
written a page at a time, in the listing's order; the cursor moves when all of it is done, so a
sync that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

from lorahub_registry.errors import HubError, LoraregError, UnknownRef
from lorahub_registry.hub.client import Hub, heard, hub_id
from lorahub_registry.hub.discover import Refused, folders_of
from lorahub_registry.hub.listing import EXPAND, Listed, moment, read_entry, repo_id
from lorahub_registry.hub.remote import ReadRepo, read_repo
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry.records import AdapterRecord
from lorahub_registry.registry.store import Registry
from lorahub_registry.settings import Settings

_PAGE = 100


@dataclass(frozen=True)
class SyncResult:
    """What a sync did, in repos.

    Attributes:
        unchanged: listed, and known at that commit.
        refused: repos or adapters that could not be indexed.
        adapters: how many adapters were written.
        requests: how many calls it took.
    """

    base: str
    new: int
    updated: int
    unchanged: int
    refused: tuple[Refused, ...]
    adapters: int
    requests: int


def sync(
    base: str,
    *,
    registry: Registry,
    settings: Settings,
    author: str | None = None,
    limit: int | None = None,
    jobs: int = 8,
    progress: Progress = silent,
) -> SyncResult:
    """Index the adapters of ``base`` that the Hub lists and the registry does not know yet.

    Args:
        base: a Hub id, ``owner/name``.
        author: only this user's or organisation's.
        limit: look at that many repos at most, the newest ones.

    Raises:
        UsageError: ``base`` is no Hub id.
        HubError: the Hub cannot be reached, or has no such base. What was read until then is
            written, and the next sync goes on from there.
    """
    name = hub_id(base, what="a base")
    hub = Hub(settings, progress)
    run = _Sync(hub, registry, name, author, limit, jobs)
    with heard(progress), progress.task(f"Syncing {name}") as task:
        for done in run.pages():
            task.advance(done)
    return run.result()


class _Sync:
    def __init__(
        self,
        hub: Hub,
        registry: Registry,
        base: str,
        author: str | None,
        limit: int | None,
        jobs: int,
    ) -> None:
        self._hub, self._registry, self._base = hub, registry, base
        self._author, self._limit, self._jobs = author, limit, jobs
        self._known: Mapping[str, str] = registry.commits("hub")
        self._refused: list[Refused] = []
        self._new = self._updated = self._unchanged = self._adapters = 0
        # One base at one Hub, seen by all or by one author only.
        place = "\n".join([hub.endpoint, base.lower(), author or ""])
        self._cursor = f"hub:{base}:{hashlib.sha256(place.encode()).hexdigest()[:12]}"
        self._newest: datetime | None = None
        self._hold: datetime | None = None

    def result(self) -> SyncResult:
        return SyncResult(
            self._base,
            self._new,
            self._updated,
            self._unchanged,
            tuple(self._refused),
            self._adapters,
            self._hub.requests,
        )

    def pages(self) -> Iterator[int]:
        """Work through the listing; how many repos each page had."""
        old = self._registry.cursor(self._cursor)
        until = moment(old)
        seen = 0
        whole = True
        with ThreadPoolExecutor(max_workers=max(1, self._jobs)) as pool:
            for entries in self._listing():
                if self._limit is not None:
                    entries = entries[: self._limit - seen]
                seen += len(entries)
                changed, reached = self._changed(entries, until)
                try:
                    self._write(pool.map(partial(read_repo, self._hub, self._base), changed))
                except BaseException:
                    self._hub.closing.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                yield len(entries)
                if reached or seen == self._limit:
                    whole = reached
                    break
        if not seen and old is None and not self._author:
            self._look_at_base()
        if whole and (cursor := self._hold or self._newest):
            text = cursor.isoformat()
            if text != old:
                self._registry.set_cursor(self._cursor, text)

    def _listing(self) -> Iterator[list[Any]]:
        where = self._hub.where(self._base)
        params: dict[str, Any] = {
            "filter": [f"base_model:adapter:{self._base}"],
            "sort": "lastModified",
            "expand": list(EXPAND),
            "limit": min(self._limit or _PAGE, _PAGE),
        }
        if self._author:
            params["author"] = self._author
        url: str | None = f"{self._hub.endpoint}/api/models"
        asked = set()
        while url:
            asked.add(url)
            page, url = self._hub.json(url, where, params)
            params = {}  # the next page's address has them
            if not isinstance(page, list):
                raise HubError(f"{where}: {self._hub.endpoint} gives a listing that is no list")
            if url in asked:
                raise HubError(f"{where}: {self._hub.endpoint} gives a listing that never ends")
            yield page

    def _changed(self, entries: list[Any], until: datetime | None) -> tuple[list[Listed], bool]:
        """The entries to read, and whether the rest of the listing is known."""
        changed: list[Listed] = []
        for entry in entries:
            try:
                listed = read_entry(entry)
            except HubError as error:
                self._refuse(Refused(repr(_get(entry, "id"))[:100], error))
                continue
            modified = listed.repo.last_modified
            if until and modified and modified < until:
                return changed, True
            if modified and (self._newest is None or modified > self._newest):
                self._newest = modified
            if self._is_known(listed):
                self._unchanged += 1
            else:
                changed.append(listed)
        return changed, False

    def _is_known(self, listed: Listed) -> bool:
        """Whether all of the repo is indexed at its commit; a pull may have taken one folder."""
        repo = listed.repo
        if self._known.get(repo.name) != repo.commit:
            return False
        folders = folders_of(listed.names or ())
        if len(folders) < 2:
            return True
        stored = self._registry.repo("hub", repo.name)
        if stored is None or stored.state != "ok" or stored.error:
            return True
        return all(self._has(repo.name, folder, repo.commit) for folder in folders)

    def _has(self, repo: str, folder: str, commit: str) -> bool:
        try:
            self._registry.get(f"{repo}/{folder}@{commit}" if folder else f"{repo}@{commit}")
        except UnknownRef:
            return False
        except LoraregError:
            return True  # a name that cannot be looked up cannot be indexed either
        return True

    def _write(self, read: Iterator[ReadRepo]) -> None:
        """Write a page, also where reading it was broken off."""
        records: list[AdapterRecord] = []
        done: list[ReadRepo] = []
        try:
            for one in read:
                done.append(one)
                for refused in one.refused:
                    self._refuse(refused)
                if one.again:
                    self._wait_for(one.listed)
                    continue
                records += [replace(r, repo=one.noted()) for r in one.records]
        finally:
            self._registry.put_many(records)
            for one in done:
                if not one.again:
                    self._finish(one)

    def _finish(self, one: ReadRepo) -> None:
        repo = one.listed.repo
        if not one.records:
            self._registry.record_failure(one.noted())
            return
        self._adapters += len(one.records)
        if repo.name in self._known:
            self._updated += 1
            self._registry.prune("hub", repo.name, one.folders)
        else:
            self._new += 1

    def _wait_for(self, listed: Listed) -> None:
        """The next sync has to look at this repo again: the cursor stays before it."""
        modified = listed.repo.last_modified
        if modified and (self._hold is None or modified < self._hold):
            self._hold = modified

    def _refuse(self, refused: Refused) -> None:
        self._refused.append(refused)
        self._hub.progress.say(f"left out: {refused.reason}")

    def _look_at_base(self) -> None:
        """Nothing is listed: is there such a base, and is that still its name?"""
        name = repo_id(_get(self._hub.info(self._base), "id"))
        if name != self._base:
            raise HubError(
                f"the Hub lists no adapter of {self._base}: that model is called {name}",
                hint=f"lorareg sync --base {name}",
            )
        self._hub.progress.warn(f"the Hub lists no adapter of {self._base}")


def _get(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, Mapping) else None
