"""Get adapters: every one of a repo, or those below a folder, whole and checked.

Files go into huggingface_hub's own cache, pinned to a commit; an adapter gets into the registry
when all its files are there and agree with each other. All adapters of a repo are written in one
transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorahub_registry.adapters.facts import digest_of, read_facts
from lorahub_registry.errors import AdapterError, HubError, LoraregError
from lorahub_registry.hub import cache
from lorahub_registry.hub.client import Hub, heard
from lorahub_registry.hub.discover import (
    README,
    Refused,
    RemoteAdapter,
    RemoteFile,
    find_adapters,
    list_files,
)
from lorahub_registry.hub.failures import Missing
from lorahub_registry.hub.listing import Listed, finite, read_entry
from lorahub_registry.hub.offline import find_cached
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import AdapterRef, is_commit
from lorahub_registry.registry.index import card_beside, record_of
from lorahub_registry.registry.records import AdapterRecord, FileRecord, RepoRecord
from lorahub_registry.registry.store import Registry
from lorahub_registry.settings import Settings


@dataclass(frozen=True)
class Pulled:
    """One adapter that is here now.

    Attributes:
        ref: ``owner/name[/sub]@commit``.
        folder: what PEFT, vLLM and others take as the adapter's path.
    """

    ref: str
    folder: Path
    record: AdapterRecord


@dataclass(frozen=True)
class PullResult:
    """What a pull did, or (``dry_run``) would do.

    Attributes:
        repo: the repo's name now; it may have been renamed.
        found: the adapters with the files that each needs; empty offline.
        adapters: those that are here now, in order of their folders; empty in a dry run.
        total_bytes: of all files of ``found``.
        missing_bytes: how much of that was not in the cache before.
    """

    repo: str
    commit: str
    found: tuple[RemoteAdapter, ...]
    adapters: tuple[Pulled, ...]
    refused: tuple[Refused, ...]
    total_bytes: int
    missing_bytes: int


def pull(
    ref: AdapterRef,
    *,
    settings: Settings,
    registry: Registry | None = None,
    base: str | None = None,
    all_files: bool = False,
    dry_run: bool = False,
    jobs: int = 8,
    progress: Progress = silent,
) -> PullResult:
    """Get all adapters of ``ref``'s repo, or of its subfolder, at its revision.

    What is in the cache is not downloaded again, but compared with its checksum. Offline it takes
    what is in the cache. One adapter that cannot be used does not stop the others.

    Args:
        registry: gets the adapters' records; None writes nothing.
        base: the base's name, over what the configs say.
        all_files: get every file in the adapters' folders, not only what they need.
        dry_run: only look what is there.

    Raises:
        HubError: the repo, its revision or its files cannot be had, or it holds no adapter.
        AdapterError: the only adapter that was asked for cannot be used.
        OutputError: the disk is full, or the cache may not be written.
    """
    hub = Hub(settings, progress)
    with heard(progress):
        if settings.offline:
            result = _pull_offline(hub, ref, registry, base, dry_run)
        else:
            result = _pull_online(hub, ref, registry, base, all_files, dry_run, jobs)
    _tell(result, progress)
    if not dry_run:
        if not result.adapters:
            raise _nothing_left(result)
        if registry is not None:
            registry.put_many([pulled.record for pulled in result.adapters])
    return result


def resolve_commit(
    repo: str, revision: str | None = None, *, settings: Settings, progress: Progress = silent
) -> str:
    """The commit that a revision of a repo is; offline, what the cache remembers.

    Raises:
        HubError: there is no such repo or revision, or it cannot be known offline.
    """
    if is_commit(revision):
        return str(revision)
    hub = Hub(settings, progress)
    if settings.offline and (commit := cache.known_commit(repo, revision)):
        return commit
    return read_entry(hub.info(repo, revision)).repo.commit


def _pull_online(
    hub: Hub,
    ref: AdapterRef,
    registry: Registry | None,
    base: str | None,
    all_files: bool,
    dry_run: bool,
    jobs: int,
) -> PullResult:
    listed = read_entry(hub.info(ref.repo, ref.revision))
    repo, commit = listed.repo.name, listed.repo.commit
    if repo.lower() != ref.repo.lower():
        hub.progress.warn(f"{ref.repo} is called {repo} now")
    files = list_files(hub, repo, commit)
    found, refused = find_adapters(repo, files, ref.subfolder, all_files=all_files)
    wanted = list({file.path: file for a in found for file in a.files}.values())
    missing = [file for file in wanted if not cache.is_cached(repo, file, commit)]
    result = PullResult(
        repo,
        commit,
        tuple(found),
        (),
        tuple(refused),
        cache.total_bytes(wanted),
        cache.total_bytes(missing),
    )
    if dry_run:
        return result
    with hub.progress.task(f"Pulling {repo}", result.total_bytes, "B") as task:
        fetcher = cache.Fetcher(hub, repo, commit, task, jobs=jobs)
        arrived, broken = _fetch_all(fetcher, repo, found)
    record = _repo_record(listed, ref, registry, cache.snapshot(repo, commit))
    pulled = []
    for adapter, own in arrived.items():
        try:
            pulled.append(_describe(hub, record, commit, adapter.subfolder, own, base))
        except AdapterError as error:
            broken.append(Refused(_ref(repo, adapter.subfolder), error))
    cache.remember_commit(repo, ref.revision, commit)
    return replace(result, adapters=tuple(pulled), refused=(*refused, *broken))


def _fetch_all(
    fetcher: cache.Fetcher, repo: str, found: Sequence[RemoteAdapter]
) -> tuple[dict[RemoteAdapter, tuple[FileRecord, ...]], list[Refused]]:
    """The adapters whose files all arrived, and those of which one cannot be had."""
    wanted = {file.path: file for adapter in found for file in adapter.files}
    # The large ones first: the small ones fit in beside them.
    order = sorted(wanted.values(), key=lambda file: (-file.size, file.path))
    arrived: dict[RemoteAdapter, tuple[FileRecord, ...]] = {}
    refused = []
    with fetcher.start(order) as futures:
        for adapter in found:
            try:
                results = {file.path: futures[file.path].result() for file in adapter.files}
            except (AdapterError, Missing) as error:
                refused.append(Refused(_ref(repo, adapter.subfolder), error))
                continue
            arrived[adapter] = tuple(
                FileRecord(name, file.size, results[file.path].sha256)
                for file in adapter.files
                if (name := _own_name(adapter, file)) is not None
            )
    return arrived, refused


def _own_name(adapter: RemoteAdapter, file: RemoteFile) -> str | None:
    """What a file is called in the adapter's folder; None for the repo's README above it."""
    if not adapter.subfolder:
        return file.path
    inside = file.path.startswith(f"{adapter.subfolder}/")
    return file.path.removeprefix(f"{adapter.subfolder}/") if inside else None


def _describe(
    hub: Hub,
    repo: RepoRecord,
    commit: str,
    subfolder: str,
    files: tuple[FileRecord, ...],
    base: str | None,
) -> Pulled:
    """An adapter that is in the cache, read: its header, its card, and its tensors once."""
    root = cache.snapshot(repo.name, commit)
    folder = root / subfolder if subfolder else root
    facts = read_facts(folder)
    card = card_beside(folder if (folder / README).is_file() else root)
    record = finite(
        record_of(
            facts,
            repo=repo,
            card=card,
            subfolder=subfolder,
            revision=commit,
            base=base,
            digest=digest_of(folder, progress=hub.progress),
            local_path=folder,
            files=files,
        )
    )
    return Pulled(f"{_ref(repo.name, subfolder)}@{commit}", folder, record)


def _repo_record(
    listed: Listed, ref: AdapterRef, registry: Registry | None, root: Path
) -> RepoRecord:
    """What the registry is told of the repo: a branch or tag is not what the repo is now."""
    known = registry.repo("hub", listed.repo.name) if registry else None
    if known and known.commit and ref.revision not in {None, "main"} and not ref.pinned:
        return known
    readme = root / README
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    return replace(listed.repo, card=text)


def _pull_offline(
    hub: Hub, ref: AdapterRef, registry: Registry | None, base: str | None, dry_run: bool
) -> PullResult:
    known = registry.repo("hub", ref.repo) if registry else None
    commit, folders, refused = find_cached(hub, ref, known)
    repo = known or RepoRecord("hub", ref.repo, commit)
    pulled = []
    for subfolder, files in folders.items() if not dry_run else ():
        try:
            pulled.append(_describe(hub, repo, commit, subfolder, files, base))
        except AdapterError as error:
            refused.append(Refused(_ref(ref.repo, subfolder), error))
    weight = sum(file.size for files in folders.values() for file in files)
    return PullResult(ref.repo, commit, (), tuple(pulled), tuple(refused), weight, 0)


def _ref(repo: str, subfolder: str) -> str:
    return f"{repo}/{subfolder}" if subfolder else repo


def _nothing_left(result: PullResult) -> LoraregError:
    errors = [refused.error for refused in result.refused]
    if len(errors) == 1:
        return errors[0]
    lines = "\n".join(f"  {error}" for error in errors)
    return HubError(
        f"{result.repo}: none of its {len(errors)} adapters can be used:\n{lines}",
        hint=next((error.hint for error in errors if error.hint), None),
    )


def _tell(result: PullResult, progress: Progress) -> None:
    """What the reader must not miss."""
    if result.adapters:
        for refused in result.refused:
            progress.warn(f"left out: {refused.reason}")
    for pulled in result.adapters:
        base = pulled.record.base
        if base.name is None:
            said = f"its config says {base.declared!r}" if base.declared else "its config is silent"
            progress.warn(f"{pulled.ref}: unknown base ({said}); say which with --base")
        elif base.how == "inferred":
            progress.say(f"{pulled.ref}: base inferred as {base.name} (config: {base.declared!r})")
        if pulled.record.weights == "pickle":
            progress.warn(
                f"{pulled.ref}: its weights are a pickle, which is not read; "
                f"lorareg convert makes safetensors of it"
            )
