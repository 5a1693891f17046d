"""Adapters on the Hub, read without downloading them: the config, and the header alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from lorahub_registry.adapters.config import CONFIG_NAME, MAX_CONFIG_BYTES, AdapterConfig
from lorahub_registry.adapters.facts import AdapterFacts, checked_config, facts_of
from lorahub_registry.adapters.tensors import PICKLE_NAME, WEIGHTS_NAME, Header, parse_header
from lorahub_registry.errors import AdapterError, BrokenAdapter, HubError
from lorahub_registry.hub.client import Hub
from lorahub_registry.hub.discover import Refused, check_names, folders_of
from lorahub_registry.hub.failures import Busy, Missing, NoAccess, Unreachable
from lorahub_registry.hub.listing import Listed, finite
from lorahub_registry.registry.index import record_of
from lorahub_registry.registry.records import AdapterRecord, FileRecord, RepoRecord

# Nearly all headers are within this; the others take a second call.
_FIRST = 100_000
# 200 bytes a tensor: far more than any adapter has, far less than would hurt.
_MOST_HEADER = 16 << 20


@dataclass(frozen=True)
class Remote:
    """What two calls tell of an adapter."""

    facts: AdapterFacts
    files: tuple[FileRecord, ...]


def read_remote(hub: Hub, repo: str, commit: str, subfolder: str, names: Collection[str]) -> Remote:
    """Read the adapter in ``subfolder``: one call for the config, one for the header.

    Where there is only a pickle, that is not looked into.

    Args:
        names: of all the repo's files.

    Raises:
        AdapterError: it is damaged, or some other tool's.
        HubError: see :mod:`.failures`.
    """
    start = f"{subfolder}/" if subfolder else ""
    config_path = start + CONFIG_NAME
    answer = hub.part(repo, config_path, commit, 0, MAX_CONFIG_BYTES + 1)
    config = checked_config(answer.data, where=f"{repo}/{config_path}")
    files = [FileRecord(CONFIG_NAME, len(answer.data))]
    if start + WEIGHTS_NAME in names:
        header, size = _read_header(hub, repo, commit, start + WEIGHTS_NAME)
        facts = facts_of(config, header, where=f"{repo}/{start}{WEIGHTS_NAME}")
        files.append(FileRecord(WEIGHTS_NAME, size))
    elif start + PICKLE_NAME in names:
        facts = AdapterFacts(config, "pickle")
    else:
        raise BrokenAdapter(f"{repo}/{config_path}: no {WEIGHTS_NAME} beside it")
    return Remote(facts, tuple(files))


def _read_header(hub: Hub, repo: str, commit: str, path: str) -> tuple[Header, int]:
    """The header, checked against the file's size, which comes with it."""
    where = f"{repo}/{path}"
    answer = hub.part(repo, path, commit, 0, _FIRST)
    length = int.from_bytes(answer.data[:8], "little")
    if len(answer.data) < 8 or not 2 <= length <= _MOST_HEADER:
        raise BrokenAdapter(f"{where}: not a safetensors file")
    data = answer.data[8 : 8 + length]
    if len(data) < length and len(answer.data) == _FIRST:
        data += hub.part(repo, path, commit, _FIRST, 8 + length).data
    header = parse_header(data, length, where=where)
    size = header.data_start + header.data_bytes
    if answer.total is not None and answer.total != size:
        raise BrokenAdapter(
            f"{where}: {answer.total} bytes long where its header promises {size}",
            hint="its upload was not whole",
        )
    return header, size


@dataclass
class ReadRepo:
    """One repo of a listing, read.

    Attributes:
        folders: where its adapters are, those that could not be read among them.
        again: it may work another time, so it must not be remembered as broken.
    """

    listed: Listed
    records: list[AdapterRecord] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    again: bool = False

    def noted(self) -> RepoRecord:
        """The repo's record, with what went wrong in it."""
        error = "; ".join(refused.reason for refused in self.refused)[:2000]
        return replace(self.listed.repo, state="ok" if self.records else "broken", error=error)


def read_repo(hub: Hub, base: str, listed: Listed) -> ReadRepo:
    """Read all adapters of a repo. What concerns this repo alone is noted, not raised.

    Args:
        base: the base that it is listed for.

    Raises:
        HubError: the Hub cannot be reached.
    """
    read = ReadRepo(listed)
    repo = listed.repo.name
    try:
        if listed.names is None:
            raise HubError(f"{repo}: the listing does not say what files it has")
        check_names(repo, listed.names)
        read.folders = folders_of(listed.names)
        if not read.folders:
            raise HubError(f"{repo}: listed as an adapter, but has no {CONFIG_NAME}")
        names = set(listed.names)
        for folder in read.folders:
            try:
                remote = read_remote(hub, repo, listed.repo.commit, folder, names)
                read.records.append(_record(listed, folder, remote))
            except (AdapterError, Missing) as error:
                read.refused.append(Refused(f"{repo}/{folder}" if folder else repo, error))
    except Unreachable:
        raise
    except NoAccess as error:
        read.refused = [Refused(repo, error)]
        read.records = [_from_listing(listed, folder, base) for folder in read.folders]
    except HubError as error:
        read.again = isinstance(error, Busy)
        read.refused.append(Refused(repo, error))
    return read


def _record(listed: Listed, folder: str, remote: Remote) -> AdapterRecord:
    return finite(
        record_of(
            remote.facts,
            repo=listed.repo,
            card=listed.card,
            subfolder=folder,
            revision=listed.repo.commit,
            files=remote.files,
        )
    )


def _from_listing(listed: Listed, folder: str, base: str) -> AdapterRecord:
    """What is known of an adapter whose files are only for some."""
    kind = "LORA" if "lora" in {tag.lower() for tag in listed.repo.tags} else "UNKNOWN"
    facts = AdapterFacts(AdapterConfig(peft_type=kind, base=listed.card.base or base), "none")
    return replace(_record(listed, folder, Remote(facts, ())), weights="listed")
