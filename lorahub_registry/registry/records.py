"""What goes into the registry and comes out of it: plain, frozen values, no ORM and no SQL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

SkillSource = Literal["card", "dataset", "user", "measured"]
RepoKind = Literal["hub", "local"]
WeightsState = Literal["local", "listed", "pickle", "missing"]
"""``local``: the safetensors are on this machine; ``listed``: known from the Hub, not pulled;
``pickle``: only a ``.bin`` is there, unread until converted; ``missing``: a config alone."""


@dataclass(frozen=True)
class SkillRecord:
    """What an adapter is good at, and how we know (``evidence``: the tag, dataset or words)."""

    name: str
    source: SkillSource
    evidence: str = ""


@dataclass(frozen=True)
class ScoreRecord:
    """One number. ``source``: ``card``, ``user`` or ``measured``; ``revision``: what was scored."""

    task: str
    metric: str
    value: float
    dataset: str = ""
    n: int | None = None
    few_shot: int | None = None
    stderr: float | None = None
    source: str = "user"
    revision: str = ""


@dataclass(frozen=True)
class CentroidRecord:
    """Where the prompts of an adapter's rows lie in a base's hidden space, on average.

    Attributes:
        base, base_digest: the base, and the digest of its tensors: each has a space of its own.
        layer: which hidden state, 0 being the embeddings.
        template: what made the prompts of the rows.
        rows: how many there were; ``rows_digest`` is that of their file.
        vector: [width], float32, little endian.
    """

    base: str
    base_digest: str
    layer: int
    template: str
    rows: int
    rows_digest: str
    vector: bytes


@dataclass(frozen=True)
class FileRecord:
    """One file of an adapter; ``sha256`` is None where only the Hub's git id is known."""

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class RepoRecord:
    """A Hub repo, or a local folder (``name``: its absolute path)."""

    kind: RepoKind
    name: str
    commit: str = ""
    last_modified: datetime | None = None
    license: str | None = None
    downloads: int | None = None
    likes: int | None = None
    tags: tuple[str, ...] = ()
    card: str = ""
    state: Literal["ok", "broken", "gone"] = "ok"
    error: str = ""


@dataclass(frozen=True)
class BaseRecord:
    """The base an adapter sits on.

    Attributes:
        name: the resolved name; None where nothing tells it.
        how: ``declared`` by its config, ``inferred`` from a local path, ``given`` by the user.
        declared: the config's own words.
    """

    name: str | None
    how: Literal["declared", "inferred", "given", "unknown"] = "declared"
    declared: str | None = None
    revision: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter, as it is indexed.

    Attributes:
        subfolder: ``""`` for the repo's root.
        revision: the pinned commit of a Hub repo; ``""`` for a local folder.
        name: a short, plain name that people may type (a folder's, a mixture's).
        rank: largest rank of any module; None for kinds without ranks or where unread.
        ranks: rank → number of modules that have it.
        modules: one mapping a module: ``{"name", "rank", "in", "out", "kind"}``.
        digest: content digest of the tensors; None where they were not read whole.
        local_path: the folder that holds its files; None while only listed.
    """

    repo: RepoRecord
    base: BaseRecord
    name: str
    subfolder: str = ""
    revision: str = ""
    peft_type: str = "LORA"
    task_type: str | None = None
    rank: int | None = None
    ranks: Mapping[int, int] = field(default_factory=dict)
    alpha: float | None = None
    use_rslora: bool = False
    use_dora: bool = False
    targets: tuple[str, ...] = ()
    parameters: int | None = None
    dtype: str | None = None
    bytes: int | None = None
    digest: str | None = None
    local_path: str | None = None
    weights: WeightsState = "local"
    description: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[Mapping[str, Any], ...] = ()
    files: tuple[FileRecord, ...] = ()
    skills: tuple[SkillRecord, ...] = ()
    scores: tuple[ScoreRecord, ...] = ()


@dataclass(frozen=True)
class MemberRecord:
    """One adapter's part in a mixture: how it was called there, and how much of it."""

    ref: str
    name: str
    coefficient: float | None
    role: str = "member"
    adapter_id: int | None = None
    digest: str | None = None


@dataclass(frozen=True)
class MixtureRecord:
    """How a mixture came about: the recipe that ran, resolved, and what it was made of."""

    name: str
    method: str
    recipe_yaml: str
    recipe_digest: str
    seed: int
    verdict: str
    members: tuple[MemberRecord, ...]


@dataclass(frozen=True)
class StoredAdapter:
    """An indexed adapter, read back: its record, its row's id, and its lineage if it has one."""

    id: int
    record: AdapterRecord
    added_at: datetime
    updated_at: datetime
    mixture: MixtureRecord | None = None

    @property
    def ref(self) -> str:
        """What to type to mean exactly this adapter: ``owner/repo/sub@commit``, or its path."""
        r = self.record
        path = f"{r.repo.name}/{r.subfolder}" if r.subfolder else r.repo.name
        return f"{path}@{r.revision}" if r.revision else path


@dataclass(frozen=True)
class Query:
    """A search; fields left at their default do not narrow it.

    Attributes:
        text: words looked for in names, skills and descriptions (FTS5; each word quoted).
        base: a family name, id or path (see ``adapters.bases``).
        skills: all of them must be there.
        rank: inclusive bounds; None on a side leaves it open.
        targets: module names that must all be adapted.
        peft_type: its own, or the method that composed it.
        min_scores: (task or metric or ``task/metric``) → least value.
        sort: ``downloads``, ``updated``, ``rank``, ``name`` or ``score:TASK``; None: best match
            first where there is text, else downloads.
    """

    text: str = ""
    base: str | None = None
    skills: tuple[str, ...] = ()
    rank: tuple[int | None, int | None] = (None, None)
    targets: tuple[str, ...] = ()
    license: str | None = None
    peft_type: str | None = None
    min_scores: Mapping[str, float] = field(default_factory=dict)
    sort: str | None = None
    limit: int = 20


@dataclass(frozen=True)
class Found:
    """A search's answer: rows, how many there were before the limit, and the bases it took.

    Attributes:
        adapters: without the long parts (``config``, ``modules``, ``files``, the repo's card),
            which ``Registry.get`` gives.
        total: how many match; counted no further than :data:`search.COUNTED`.
        more: there are more than ``total``.
    """

    adapters: tuple[StoredAdapter, ...]
    total: int
    bases: tuple[str, ...] = ()
    more: bool = False
