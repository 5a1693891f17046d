"""Adapters as commands show them: one row, one page, one JSON object."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.dynamic import FOLDER
from lorahub_registry.cli import experts, trained
from lorahub_registry.cli.output import clean, size
from lorahub_registry.registry.records import AdapterRecord, ScoreRecord, StoredAdapter

COLUMNS = {
    "ref": "<", "base": "<", "rank": ">", "skills": "<", "license": "<", "downloads": ">",
    "state": "<",
}  # fmt: skip


def rows(adapters: Sequence[StoredAdapter]) -> list[dict[str, Any]]:
    """Rows whose ``ref`` can be typed: a path where several here have one name."""
    names = Counter(short_ref(a) for a in adapters)
    return [row(a) | ({"ref": a.ref} if names[short_ref(a)] > 1 else {}) for a in adapters]


def row(stored: StoredAdapter) -> dict[str, Any]:
    """What tables show of an adapter, and JSON lists hold."""
    record = stored.record
    return {
        "ref": short_ref(stored),
        "name": record.name,
        "base": record.base.name,
        "base_how": record.base.how,
        "rank": record.rank,
        "skills": sorted({skill.name for skill in record.skills}),
        "license": record.repo.license,
        "downloads": record.repo.downloads,
        "scores": [score_facts(score) for score in record.scores],
        "peft_type": record.peft_type,
        "state": record.weights,
        "path": record.local_path,
        "revision": record.revision or None,
    }


def short_ref(stored: StoredAdapter) -> str:
    """What one types to mean it: a Hub ref without commit, or a local adapter's name."""
    record = stored.record
    if record.repo.kind == "local":
        return record.name
    return f"{record.repo.name}/{record.subfolder}" if record.subfolder else record.repo.name


def score_facts(score: ScoreRecord) -> dict[str, Any]:
    """A score as JSON holds it."""
    return {
        "task": score.task,
        "metric": score.metric,
        "value": score.value,
        "stderr": score.stderr,
        "n": score.n,
        "few_shot": score.few_shot,
        "dataset": score.dataset or None,
        "source": score.source,
        "revision": score.revision or None,
    }


def facts(stored: StoredAdapter, used_in: list[str]) -> dict[str, Any]:
    """Everything known, as ``show --json`` prints it."""
    record = stored.record
    return {
        **row(stored),
        "id": stored.ref,
        "repo": {
            "kind": record.repo.kind,
            "name": record.repo.name,
            "commit": record.repo.commit or None,
            "last_modified": _iso(record.repo.last_modified),
            "likes": record.repo.likes,
            "tags": list(record.repo.tags),
        },
        "declared_base": record.base.declared,
        "task_type": record.task_type,
        "ranks": {str(rank): n for rank, n in record.ranks.items()},
        "alpha": record.alpha,
        "use_rslora": record.use_rslora,
        "use_dora": record.use_dora,
        "dynamic": _decides(record),
        "targets": list(record.targets),
        "parameters": record.parameters,
        "dtype": record.dtype,
        "bytes": record.bytes,
        "digest": record.digest,
        "description": record.description,
        "skill_sources": [
            {"name": s.name, "source": s.source, "evidence": s.evidence} for s in record.skills
        ],
        "files": [{"name": f.name, "size": f.size, "sha256": f.sha256} for f in record.files],
        "modules": [dict(m) for m in record.modules],
        "config": dict(record.config),
        "experts": experts.facts(record),
        "mixture": _lineage(stored),
        "trained": trained.facts(stored),
        "used_in": used_in,
        "added_at": _iso(stored.added_at),
        "updated_at": _iso(stored.updated_at),
    }


def _dynamic(record: AdapterRecord, problem: str) -> str:
    """Of a mixture that decides while it runs: where that is, and that the rest is not of it."""
    if not _decides(record):
        return ""
    if problem:
        return f"damaged, so that nothing runs it: {problem}; what stands here is its plain LoRA"
    return (
        f"the mixture itself is in {FOLDER}/ and decides while it runs: generate and explain take "
        "that one; what stands here is its plain LoRA"
    )


def _decides(record: AdapterRecord) -> bool:
    return any(file.name.startswith(f"{FOLDER}/") for file in record.files)


def dynamic_problem(record: AdapterRecord) -> str:
    """What is wrong with the part of a mixture here that decides; "" where nothing is."""
    from lorahub_registry.api.written import damage

    if not _decides(record) or record.local_path is None:
        return ""
    return damage(Path(record.local_path))


def page(stored: StoredAdapter, used_in: list[str], problem: str = "") -> str:
    """Everything known, for people; ``problem``: see :func:`dynamic_problem`."""
    record = stored.record
    how = {"declared": "", "given": " (given by the user)", "unknown": " (unknown)"}.get(
        record.base.how, f" (inferred; its config says {clean(record.base.declared)})"
    )
    if stored.mixture is not None:
        how = ""  # it was composed or trained on that base
    kinds = [name for name, on in (("rsLoRA", record.use_rslora), ("DoRA", record.use_dora)) if on]
    kind = " ".join([record.peft_type, *kinds, record.task_type or ""]).strip()
    plain = _decides(record)
    inside = [_line(title, text) for title, text in experts.lines(record)]
    ranks = ", ".join(f"{rank} in {n} modules" for rank, n in record.ranks.items())
    lines = [
        _line("adapter", stored.ref),
        _line("name", record.name),
        _line("base", f"{clean(record.base.name) or '-'}{how}"),
        _line("kind", f"{kind} (a plain LoRA with fixed coefficients)" if plain else kind),
        _line("dynamic", _dynamic(record, problem)),
        *(inside if plain else []),
        _line("rank", ranks or record.rank),
        _line("alpha", record.alpha),
        *([] if plain else inside),
        _line("targets", ", ".join(record.targets)),
        _line("tensors", _tensors(stored)),
        _line("digest", record.digest),
        _line("state", _state(stored)),
        _line("licence", record.repo.license),
    ]
    if record.repo.kind == "hub":
        numbers = f"{record.repo.downloads or 0} downloads, {record.repo.likes or 0} likes"
        lines.append(_line("on the Hub", f"{numbers}, changed {_iso(record.repo.last_modified)}"))
    if record.repo.error:
        lines.append(_line("problem", record.repo.error))
    lines.append(_line("about", record.description))
    lines += _block("skills", [f"{s.name}  ({s.source}: {s.evidence})" for s in record.skills])
    lines += _block("scores", [_score(score) for score in record.scores])
    lines += _block("modules", _modules(record.modules))
    lines += _block("made of", _members(stored))
    lines += _block("trained", trained.lines(stored))
    lines += _block("used in", used_in)
    lines += _block(
        "files",
        [f"{size(f.size):>9}  {f.sha256 or '-':<64}  {f.name}" for f in record.files],
    )
    return "\n".join(line for line in lines if line)


def _line(title: str, value: Any) -> str:
    text = clean(value)
    return f"{title:<12}{text}" if text else ""


def _block(title: str, rows: list[str]) -> list[str]:
    return [f"{title}", *(f"  {clean(text)}" for text in rows)] if rows else []


def _score(score: ScoreRecord) -> str:
    error = f" ± {score.stderr:.3g}" if score.stderr is not None else ""
    n = f", n={score.n}" if score.n is not None else ""
    return f"{score.task} {score.metric} {score.value:.4g}{error}  ({score.source}{n})"


def _tensors(stored: StoredAdapter) -> str:
    record = stored.record
    if record.parameters is None:
        return ""
    return f"{record.parameters:,} parameters, {record.dtype}, {size(record.bytes or 0)}"


def _state(stored: StoredAdapter) -> str:
    record = stored.record
    if record.weights == "pickle":
        return f"a pickle, unread: lorareg convert {short_ref(stored)}"
    if record.weights == "missing":
        return f"its config alone is here, without weights: {record.local_path}"
    if record.local_path is None:
        return f"known from the Hub, not here: lorareg pull {short_ref(stored)}"
    return f"on this machine: {record.local_path}"


def _modules(modules: tuple[Mapping[str, Any], ...]) -> list[str]:
    """Modules by the last part of their name: how many, their shapes and ranks."""
    groups: dict[tuple[str, int, int, int, str], int] = defaultdict(int)
    for module in modules:
        end = str(module["name"]).rsplit(".", 1)[-1]
        each = " in each expert" if module.get("kind") == "experts" else ""
        groups[end, module["out"], module["in"], module["rank"], each] += 1
    return [
        f"{end:<12} {n:>4} x  {out}x{fan_in}, rank {rank}{each}"
        for (end, out, fan_in, rank, each), n in sorted(groups.items())
    ]


def _members(stored: StoredAdapter) -> list[str]:
    mixture = stored.mixture
    if mixture is None or not mixture.members:
        return []
    rows = [
        f"{m.coefficient if m.coefficient is not None else 0:+.4f}  {m.name}"
        + (f"  ({m.ref})" if m.ref != m.name else "")
        for m in mixture.members
    ]
    if _decides(stored.record):
        rows.append("these are the plain LoRA's coefficients, or their means over its layers")
    return [*rows, f"by {mixture.method}, seed {mixture.seed}: {mixture.verdict}"]


def _lineage(stored: StoredAdapter) -> dict[str, Any] | None:
    mixture = stored.mixture
    if mixture is None or not mixture.members:
        return None
    return {
        "method": mixture.method,
        "seed": mixture.seed,
        "verdict": mixture.verdict,
        "recipe_digest": mixture.recipe_digest,
        "members": [
            {"name": m.name, "ref": m.ref, "coefficient": m.coefficient, "digest": m.digest}
            for m in mixture.members
        ],
    }


def _iso(moment: Any) -> str | None:
    return moment.isoformat(timespec="seconds") if moment is not None else None
