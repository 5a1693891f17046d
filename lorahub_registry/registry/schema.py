"""The tables, as they are at the newest revision (``migrations/`` has how they came about).

Three things are there for speed at a million adapters, and kept right by triggers:

* ``adapter.title`` and ``adapter.skill_names`` repeat what the full-text index needs, so that it
  needs one table only;
* ``adapter.downloads`` repeats the repo's, and ``adapter.family_id`` the base's;
* ``adapter_skill.family_id`` and ``.downloads`` repeat the adapter's, so that "this family, that
  skill, most used first" is one walk along an index.

Lists that many adapters share word for word (targets, modules) are stored once.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Computed,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    MetaData,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Utc(TypeDecorator[datetime]):
    """A moment: stored without zone as UTC, read back with it."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC, without zone; a value without zone is UTC already."""
        if value is None or value.tzinfo is None:
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """With its zone again."""
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Parent of all tables; every constraint has a name, which batch migrations need."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: Utc, dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012


# One word for each power of four that the downloads reach: "word AND zztier1024" is a short list
# even where the word is everywhere.
TIERS = tuple(4**n for n in range(2, 12))
_TIER = " || ".join(f"CASE WHEN downloads >= {n} THEN 'zztier{n} ' ELSE '' END" for n in TIERS)


class BaseFamily(Base):
    """What a base's name says (``adapters.bases.BaseName``): mirrors of a model share it."""

    __tablename__ = "base_family"
    id: Mapped[int] = mapped_column(primary_key=True)
    signature: Mapped[str] = mapped_column(unique=True)
    key: Mapped[str] = mapped_column(index=True)
    sizes: Mapped[list[Any]]
    versions: Mapped[list[Any]]


class BaseModel(Base):
    """A base model. ``folded`` and ``last`` are the lower-case name and its last part."""

    __tablename__ = "base_model"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    folded: Mapped[str] = mapped_column(unique=True)
    last: Mapped[str] = mapped_column(index=True)
    family_id: Mapped[int] = mapped_column(ForeignKey("base_family.id"), index=True)


class BaseFolder(Base):
    """A folder of this machine that holds a base.

    ``digest`` is that of its tensors while its files are as ``stamp`` says; ``base_id`` is set
    where the folder is the user's own, so that the base is found by its name.
    """

    __tablename__ = "base_folder"
    folder: Mapped[str] = mapped_column(primary_key=True)
    base_id: Mapped[int | None] = mapped_column(
        ForeignKey("base_model.id", ondelete="SET NULL"), index=True
    )
    stamp: Mapped[str]
    digest: Mapped[str]


class BaseAlias(Base):
    """Another name of a base (lower case): what configs declared, what it was called before."""

    __tablename__ = "base_alias"
    alias: Mapped[str] = mapped_column(primary_key=True)
    base_id: Mapped[int] = mapped_column(
        ForeignKey("base_model.id", ondelete="CASCADE"), index=True
    )


class Repo(Base):
    """A Hub repo or a local folder; ``card`` comes last, so that reading the rest skips it."""

    __tablename__ = "repo"
    __table_args__ = (UniqueConstraint("kind", "name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    commit_id: Mapped[str]
    last_modified: Mapped[datetime | None]
    license: Mapped[str | None]
    downloads: Mapped[int | None]
    likes: Mapped[int | None]
    state: Mapped[str]
    error: Mapped[str]
    tags: Mapped[list[Any]]
    card: Mapped[str]


class TargetSet(Base):
    """A list of target modules; ``digest`` is that of its JSON."""

    __tablename__ = "target_set"
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    targets: Mapped[list[Any]]


class TargetName(Base):
    """Which target sets hold a name."""

    __tablename__ = "target_name"
    __table_args__ = {"sqlite_with_rowid": False}  # noqa: RUF012
    name: Mapped[str] = mapped_column(primary_key=True)
    set_id: Mapped[int] = mapped_column(
        ForeignKey("target_set.id", ondelete="CASCADE"), primary_key=True
    )


class ModuleSet(Base):
    """A list of modules with their shapes; ``digest`` is that of its JSON."""

    __tablename__ = "module_set"
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    modules: Mapped[list[Any]]


class Adapter(Base):
    """One adapter: (repo, subfolder, revision).

    ``superseded``: another row holds the same adapter at the repo's current commit.
    """

    __tablename__ = "adapter"
    __table_args__ = (
        UniqueConstraint("repo_id", "subfolder", "revision"),
        Index(None, "family_id", "downloads"),
        Index(None, "digest", sqlite_where=text("digest IS NOT NULL")),
        Index(None, "local_path", sqlite_where=text("local_path IS NOT NULL")),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    repo_id: Mapped[int] = mapped_column(ForeignKey("repo.id", ondelete="CASCADE"))
    subfolder: Mapped[str]
    revision: Mapped[str]
    name: Mapped[str] = mapped_column(index=True)
    title: Mapped[str]
    skill_names: Mapped[str]
    tier: Mapped[str] = mapped_column(Computed(_TIER, persisted=False))
    description: Mapped[str]
    base_id: Mapped[int | None] = mapped_column(ForeignKey("base_model.id", ondelete="SET NULL"))
    family_id: Mapped[int | None]
    base_how: Mapped[str]
    declared_base: Mapped[str | None]
    base_revision: Mapped[str | None]
    base_digest: Mapped[str | None]
    peft_type: Mapped[str]
    task_type: Mapped[str | None]
    rank: Mapped[int | None]
    ranks: Mapped[dict[str, Any]]
    alpha: Mapped[float | None]
    use_rslora: Mapped[bool]
    use_dora: Mapped[bool]
    target_set_id: Mapped[int] = mapped_column(ForeignKey("target_set.id"))
    module_set_id: Mapped[int] = mapped_column(ForeignKey("module_set.id"))
    parameters: Mapped[int | None]
    dtype: Mapped[str | None]
    bytes: Mapped[int | None]
    digest: Mapped[str | None]
    local_path: Mapped[str | None]
    weights: Mapped[str]
    downloads: Mapped[int] = mapped_column(index=True)
    superseded: Mapped[bool]
    added_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class AdapterDetail(Base):
    """The long parts of an adapter, apart, so that searching reads short rows."""

    __tablename__ = "adapter_detail"
    adapter_id: Mapped[int] = mapped_column(
        ForeignKey("adapter.id", ondelete="CASCADE"), primary_key=True
    )
    config: Mapped[dict[str, Any]]
    files: Mapped[list[Any]]


class Skill(Base):
    """A skill's name."""

    __tablename__ = "skill"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class AdapterSkill(Base):
    """That an adapter has a skill, from one source."""

    __tablename__ = "adapter_skill"
    __table_args__ = (
        Index(None, "skill_id", "family_id", "downloads"),
        Index(None, "skill_id", "downloads"),
        {"sqlite_with_rowid": False},
    )
    adapter_id: Mapped[int] = mapped_column(
        ForeignKey("adapter.id", ondelete="CASCADE"), primary_key=True
    )
    skill_id: Mapped[int] = mapped_column(ForeignKey("skill.id"), primary_key=True)
    source: Mapped[str] = mapped_column(primary_key=True)
    evidence: Mapped[str]
    family_id: Mapped[int | None]
    downloads: Mapped[int]


class Score(Base):
    """One number of an adapter."""

    __tablename__ = "score"
    id: Mapped[int] = mapped_column(primary_key=True)
    adapter_id: Mapped[int] = mapped_column(
        ForeignKey("adapter.id", ondelete="CASCADE"), index=True
    )
    task: Mapped[str] = mapped_column(index=True)
    metric: Mapped[str] = mapped_column(index=True)
    value: Mapped[float]
    dataset: Mapped[str]
    n: Mapped[int | None]
    few_shot: Mapped[int | None]
    stderr: Mapped[float | None]
    source: Mapped[str]
    revision: Mapped[str]


class Centroid(Base):
    """Where the rows that an adapter is for lie in a base's hidden space; one for each base.

    ``layer`` is the hidden state's number, ``vector`` its float32, little endian.
    """

    __tablename__ = "centroid"
    adapter_id: Mapped[int] = mapped_column(
        ForeignKey("adapter.id", ondelete="CASCADE"), primary_key=True
    )
    base_digest: Mapped[str] = mapped_column(primary_key=True)
    base: Mapped[str]
    layer: Mapped[int]
    template: Mapped[str]
    rows: Mapped[int]
    rows_digest: Mapped[str]
    vector: Mapped[bytes]


class Recipe(Base):
    """A recipe that ran: its text, resolved and pinned."""

    __tablename__ = "recipe"
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    yaml: Mapped[str]


class Mixture(Base):
    """The lineage of an adapter that was composed."""

    __tablename__ = "mixture"
    adapter_id: Mapped[int] = mapped_column(
        ForeignKey("adapter.id", ondelete="CASCADE"), primary_key=True
    )
    recipe_id: Mapped[int] = mapped_column(ForeignKey("recipe.id"), index=True)
    name: Mapped[str] = mapped_column(index=True)
    method: Mapped[str]
    seed: Mapped[int]
    verdict: Mapped[str]


class MixtureMember(Base):
    """One adapter's part in a mixture; it stays when that adapter is forgotten."""

    __tablename__ = "mixture_member"
    mixture_id: Mapped[int] = mapped_column(
        ForeignKey("mixture.adapter_id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True)
    ref: Mapped[str]
    name: Mapped[str]
    role: Mapped[str]
    coefficient: Mapped[float | None]
    digest: Mapped[str | None]
    adapter_id: Mapped[int | None] = mapped_column(
        ForeignKey("adapter.id", ondelete="SET NULL"), index=True
    )


class SyncCursor(Base):
    """How far a sync came: a name and the text it needs to go on."""

    __tablename__ = "sync_cursor"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]
