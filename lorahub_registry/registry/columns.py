"""Records into column values: what a row should hold, and what is kept of the one that is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorahub_registry.errors import RegistryError
from lorahub_registry.registry.records import AdapterRecord, RepoRecord, ScoreRecord

ScoreKey = tuple[str, str, str, int | None, str, str]
# What a reading of the same bytes may lack because they were not at hand, and does not disprove.
_KEPT_IF_NONE = (
    *("rank", "alpha", "task_type", "parameters", "dtype", "bytes", "digest"),
    *("base_revision", "base_digest"),
)


def clean(text: str) -> str:
    """``text`` without what SQLite cannot store (halves of surrogate pairs, NUL)."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")


def maybe_clean(text: str | None) -> str | None:
    """:func:`clean`, of what may be missing."""
    return None if text is None else clean(text)


def repo_columns(record: RepoRecord) -> dict[str, Any]:
    """A repo's row."""
    return {
        "kind": record.kind,
        "name": clean(record.name),
        "commit_id": clean(record.commit),
        "last_modified": record.last_modified,
        "license": maybe_clean(record.license),
        "downloads": _whole(record.downloads, record.name),
        "likes": _whole(record.likes, record.name),
        "state": record.state,
        "error": clean(record.error),
        "tags": list(record.tags),
        "card": clean(record.card),
    }


def merged_repo(old: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What of ``new`` changes the repo's row ``old``.

    The registry never goes back in time: what an older state of the repo says is dropped. What
    ``new`` leaves out at the same commit stays.
    """
    if old["last_modified"] and new["last_modified"] and _before(new, old):
        return {}
    merged = dict(new)
    merged["commit_id"] = new["commit_id"] or old["commit_id"]
    optional = ["last_modified", "downloads", "likes"]
    if merged["commit_id"] == old["commit_id"]:
        optional += ["license", "tags", "card"]
    for name in optional:
        if new[name] is None or new[name] in ("", []):
            merged[name] = old[name]
    return {name: value for name, value in merged.items() if value != old[name]}


def _before(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    moment = new["last_modified"]
    return bool(
        (moment if moment.tzinfo else moment.replace(tzinfo=old["last_modified"].tzinfo))
        < old["last_modified"]
    )


def adapter_columns(record: AdapterRecord) -> dict[str, Any]:
    """An adapter's row, without what other tables and rows decide."""
    r, base = record, record.base
    where = r.repo.name
    return {
        "subfolder": clean(r.subfolder),
        "revision": clean(r.revision),
        "name": clean(r.name),
        "title": clean(title(r)),
        "description": clean(r.description),
        "base_how": base.how,
        "declared_base": maybe_clean(base.declared),
        "base_revision": maybe_clean(base.revision),
        "base_digest": base.digest,
        "peft_type": clean(r.peft_type),
        "task_type": maybe_clean(r.task_type),
        "rank": _whole(r.rank, where),
        "ranks": {str(rank): n for rank, n in r.ranks.items()},
        "alpha": None if r.alpha is None or math.isnan(r.alpha) else float(r.alpha),
        "use_rslora": bool(r.use_rslora),
        "use_dora": bool(r.use_dora),
        "parameters": _whole(r.parameters, where),
        "dtype": maybe_clean(r.dtype),
        "bytes": _whole(r.bytes, where),
        "digest": r.digest,
        "local_path": maybe_clean(r.local_path),
        "weights": r.weights,
    }


def title(record: AdapterRecord) -> str:
    """What the full-text index takes of the place: not the folders of somebody's machine."""
    if record.repo.kind != "hub":
        return record.subfolder
    return f"{record.repo.name}/{record.subfolder}" if record.subfolder else record.repo.name


def detail_columns(record: AdapterRecord) -> dict[str, Any]:
    """The long parts, as JSON holds them."""
    return {
        "config": dict(record.config),
        "files": [[f.name, f.size, f.sha256] for f in record.files],
    }


def keep_known(old: Mapping[str, Any], new: dict[str, Any], empty_modules: int) -> dict[str, Any]:
    """``new`` for the row ``old`` that holds the same pinned bytes, without losing knowledge.

    A sync that lists what was pulled before knows less than the row does.
    """
    kept = {name: old[name] for name in _KEPT_IF_NONE if new[name] is None}
    if old["weights"] == "local" and new["weights"] != "local":
        kept |= {"weights": old["weights"], "local_path": old["local_path"]}
    if not new["ranks"]:
        kept["ranks"] = old["ranks"]
    if new["module_set_id"] == empty_modules:
        kept["module_set_id"] = old["module_set_id"]
    return new | kept


def keep_files(old: list[list[Any]], new: list[list[Any]]) -> list[list[Any]]:
    """``new``, with the checksums that ``old`` knows of the same files."""
    known = {(name, size): sha256 for name, size, sha256 in old}
    return [[name, size, sha256 or known.get((name, size))] for name, size, sha256 in new] or old


def score_key(score: ScoreRecord) -> ScoreKey:
    """What two scores must share for the newer one to replace the older."""
    s = score
    return (s.task, s.metric, s.dataset, s.few_shot, s.source, s.revision)


def check_score(score: ScoreRecord, what: str) -> ScoreRecord:
    """``score``, if it can be stored.

    Raises:
        RegistryError: its value is no number.
    """
    if not math.isfinite(score.value):
        raise RegistryError(f"{what}: the score {score.task}/{score.metric} is {score.value}")
    return score


def _whole(value: int | None, what: str) -> int | None:
    if value is not None and not -(2**63) <= value < 2**63:
        raise RegistryError(f"{what}: {value} is too large a number to store")
    return value
