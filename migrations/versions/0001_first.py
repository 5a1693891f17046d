"""The first tables, the full-text index, and the triggers that keep it.

Revision ID: 0001
Revises:
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TIER = " || ".join(
    f"CASE WHEN downloads >= {4**n} THEN 'zztier{4**n} ' ELSE '' END" for n in range(2, 12)
)
_TEXT = ("name", "title", "skill_names", "tier", "description")
_COLUMNS = ", ".join(_TEXT)


def _values(row: str) -> str:
    return ", ".join(f"{row}.{column}" for column in _TEXT)


_INDEX = f"""
CREATE VIRTUAL TABLE adapter_fts USING fts5(
    {_COLUMNS}, content='adapter', content_rowid='id', tokenize='unicode61 remove_diacritics 2'
)
"""
_PUT = f"INSERT INTO adapter_fts(rowid, {_COLUMNS}) VALUES (NEW.id, {_values('NEW')});"
_TAKE = f"""
    INSERT INTO adapter_fts(adapter_fts, rowid, {_COLUMNS})
    VALUES ('delete', OLD.id, {_values("OLD")});
"""
_SKILLS = """
    UPDATE adapter SET skill_names = coalesce((
        SELECT group_concat(name, char(10)) FROM (
            SELECT DISTINCT skill.name FROM adapter_skill
            JOIN skill ON skill.id = adapter_skill.skill_id
            WHERE adapter_skill.adapter_id = {row}.adapter_id ORDER BY skill.name
        )), '')
    WHERE id = {row}.adapter_id;
"""
_TITLE = """CASE WHEN NEW.kind <> 'hub' THEN subfolder WHEN subfolder = '' THEN NEW.name
    ELSE NEW.name || '/' || subfolder END"""
_TRIGGERS = (
    f"CREATE TRIGGER adapter_fts_insert AFTER INSERT ON adapter BEGIN {_PUT} END",
    f"CREATE TRIGGER adapter_fts_delete AFTER DELETE ON adapter BEGIN {_TAKE} END",
    f"""CREATE TRIGGER adapter_fts_update AFTER UPDATE ON adapter
    WHEN {" OR ".join(f"OLD.{c} IS NOT NEW.{c}" for c in _TEXT)}
    BEGIN {_TAKE} {_PUT} END""",
    # The rows of adapter_skill repeat what orders a search.
    """CREATE TRIGGER adapter_skill_order AFTER UPDATE ON adapter
    WHEN OLD.family_id IS NOT NEW.family_id OR OLD.downloads IS NOT NEW.downloads
    BEGIN
        UPDATE adapter_skill SET family_id = NEW.family_id, downloads = NEW.downloads
        WHERE adapter_id = NEW.id;
    END""",
    # Whoever inserts an adapter writes its skill_names at once: then there is nothing to do.
    f"""CREATE TRIGGER skill_names_insert AFTER INSERT ON adapter_skill
    WHEN NOT EXISTS (
        SELECT 1 FROM adapter, skill WHERE adapter.id = NEW.adapter_id AND skill.id = NEW.skill_id
        AND instr(char(10) || adapter.skill_names || char(10), char(10) || skill.name || char(10))
    )
    BEGIN {_SKILLS.format(row="NEW")} END""",
    f"""CREATE TRIGGER skill_names_delete AFTER DELETE ON adapter_skill
    BEGIN {_SKILLS.format(row="OLD")} END""",
    f"""CREATE TRIGGER repo_name AFTER UPDATE OF name ON repo WHEN OLD.name <> NEW.name
    BEGIN UPDATE adapter SET title = {_TITLE} WHERE repo_id = NEW.id; END""",
    """CREATE TRIGGER repo_downloads AFTER UPDATE OF downloads ON repo
    WHEN OLD.downloads IS NOT NEW.downloads
    BEGIN
        UPDATE adapter SET downloads = coalesce(NEW.downloads, 0) WHERE repo_id = NEW.id;
    END""",
)


def upgrade() -> None:
    op.create_table(
        "base_family",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("signature", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("sizes", sa.JSON(), nullable=False),
        sa.Column("versions", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_base_family"),
        sa.UniqueConstraint("signature", name="uq_base_family_signature"),
    )
    op.create_index("ix_base_family_key", "base_family", ["key"])
    op.create_table(
        "module_set",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("modules", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_module_set"),
        sa.UniqueConstraint("digest", name="uq_module_set_digest"),
    )
    op.create_table(
        "recipe",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("yaml", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_recipe"),
        sa.UniqueConstraint("digest", name="uq_recipe_digest"),
    )
    op.create_table(
        "repo",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("commit_id", sa.String(), nullable=False),
        sa.Column("last_modified", sa.DateTime()),
        sa.Column("license", sa.String()),
        sa.Column("downloads", sa.Integer()),
        sa.Column("likes", sa.Integer()),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("error", sa.String(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("card", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_repo"),
        sa.UniqueConstraint("kind", "name", name="uq_repo_kind_name"),
    )
    op.create_table(
        "skill",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_skill"),
        sa.UniqueConstraint("name", name="uq_skill_name"),
    )
    op.create_table(
        "sync_cursor",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_sync_cursor"),
    )
    op.create_table(
        "target_set",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("targets", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_target_set"),
        sa.UniqueConstraint("digest", name="uq_target_set_digest"),
    )
    op.create_table(
        "base_model",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("folded", sa.String(), nullable=False),
        sa.Column("last", sa.String(), nullable=False),
        sa.Column("family_id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_base_model"),
        sa.UniqueConstraint("folded", name="uq_base_model_folded"),
        sa.ForeignKeyConstraint(
            ["family_id"], ["base_family.id"], name="fk_base_model_family_id_base_family"
        ),
    )
    op.create_index("ix_base_model_family_id", "base_model", ["family_id"])
    op.create_index("ix_base_model_last", "base_model", ["last"])
    op.create_table(
        "base_folder",
        sa.Column("folder", sa.String(), nullable=False),
        sa.Column("base_id", sa.Integer(), nullable=True),
        sa.Column("stamp", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("folder", name="pk_base_folder"),
        sa.ForeignKeyConstraint(
            ["base_id"],
            ["base_model.id"],
            name="fk_base_folder_base_id_base_model",
            ondelete="SET NULL",
        ),
    )
    op.create_index("ix_base_folder_base_id", "base_folder", ["base_id"])
    op.create_table(
        "target_name",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("set_id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name", "set_id", name="pk_target_name"),
        sa.ForeignKeyConstraint(
            ["set_id"],
            ["target_set.id"],
            name="fk_target_name_set_id_target_set",
            ondelete="CASCADE",
        ),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "adapter",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("repo_id", sa.Integer(), nullable=False),
        sa.Column("subfolder", sa.String(), nullable=False),
        sa.Column("revision", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("skill_names", sa.String(), nullable=False),
        sa.Column("tier", sa.String(), sa.Computed(_TIER, persisted=False), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("base_id", sa.Integer()),
        sa.Column("family_id", sa.Integer()),
        sa.Column("base_how", sa.String(), nullable=False),
        sa.Column("declared_base", sa.String()),
        sa.Column("base_revision", sa.String()),
        sa.Column("base_digest", sa.String()),
        sa.Column("peft_type", sa.String(), nullable=False),
        sa.Column("task_type", sa.String()),
        sa.Column("rank", sa.Integer()),
        sa.Column("ranks", sa.JSON(), nullable=False),
        sa.Column("alpha", sa.Double()),
        sa.Column("use_rslora", sa.Boolean(), nullable=False),
        sa.Column("use_dora", sa.Boolean(), nullable=False),
        sa.Column("target_set_id", sa.Integer(), nullable=False),
        sa.Column("module_set_id", sa.Integer(), nullable=False),
        sa.Column("parameters", sa.Integer()),
        sa.Column("dtype", sa.String()),
        sa.Column("bytes", sa.Integer()),
        sa.Column("digest", sa.String()),
        sa.Column("local_path", sa.String()),
        sa.Column("weights", sa.String(), nullable=False),
        sa.Column("downloads", sa.Integer(), nullable=False),
        sa.Column("superseded", sa.Boolean(), nullable=False),
        sa.Column("added_at", sa.DateTime(), nullable=False),
        sa.Column("updated_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_adapter"),
        sa.ForeignKeyConstraint(
            ["target_set_id"], ["target_set.id"], name="fk_adapter_target_set_id_target_set"
        ),
        sa.ForeignKeyConstraint(
            ["base_id"],
            ["base_model.id"],
            name="fk_adapter_base_id_base_model",
            ondelete="SET NULL",
        ),
        sa.UniqueConstraint(
            "repo_id", "subfolder", "revision", name="uq_adapter_repo_id_subfolder_revision"
        ),
        sa.ForeignKeyConstraint(
            ["repo_id"], ["repo.id"], name="fk_adapter_repo_id_repo", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["module_set_id"], ["module_set.id"], name="fk_adapter_module_set_id_module_set"
        ),
    )
    op.create_index(
        "ix_adapter_digest", "adapter", ["digest"], sqlite_where=sa.text("digest IS NOT NULL")
    )
    op.create_index("ix_adapter_downloads", "adapter", ["downloads"])
    op.create_index("ix_adapter_family_id_downloads", "adapter", ["family_id", "downloads"])
    op.create_index(
        "ix_adapter_local_path",
        "adapter",
        ["local_path"],
        sqlite_where=sa.text("local_path IS NOT NULL"),
    )
    op.create_index("ix_adapter_name", "adapter", ["name"])
    op.create_table(
        "base_alias",
        sa.Column("alias", sa.String(), nullable=False),
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("alias", name="pk_base_alias"),
        sa.ForeignKeyConstraint(
            ["base_id"],
            ["base_model.id"],
            name="fk_base_alias_base_id_base_model",
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_base_alias_base_id", "base_alias", ["base_id"])
    op.create_table(
        "adapter_detail",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", name="pk_adapter_detail"),
        sa.ForeignKeyConstraint(
            ["adapter_id"],
            ["adapter.id"],
            name="fk_adapter_detail_adapter_id_adapter",
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "adapter_skill",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("skill_id", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("evidence", sa.String(), nullable=False),
        sa.Column("family_id", sa.Integer()),
        sa.Column("downloads", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", "skill_id", "source", name="pk_adapter_skill"),
        sa.ForeignKeyConstraint(
            ["adapter_id"],
            ["adapter.id"],
            name="fk_adapter_skill_adapter_id_adapter",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(["skill_id"], ["skill.id"], name="fk_adapter_skill_skill_id_skill"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "ix_adapter_skill_skill_id_downloads", "adapter_skill", ["skill_id", "downloads"]
    )
    op.create_index(
        "ix_adapter_skill_skill_id_family_id_downloads",
        "adapter_skill",
        ["skill_id", "family_id", "downloads"],
    )
    op.create_table(
        "mixture",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("recipe_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", name="pk_mixture"),
        sa.ForeignKeyConstraint(["recipe_id"], ["recipe.id"], name="fk_mixture_recipe_id_recipe"),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapter.id"], name="fk_mixture_adapter_id_adapter", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_mixture_name", "mixture", ["name"])
    op.create_index("ix_mixture_recipe_id", "mixture", ["recipe_id"])
    op.create_table(
        "score",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("metric", sa.String(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("n", sa.Integer()),
        sa.Column("few_shot", sa.Integer()),
        sa.Column("stderr", sa.Double()),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("revision", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_score"),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapter.id"], name="fk_score_adapter_id_adapter", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_score_adapter_id", "score", ["adapter_id"])
    op.create_index("ix_score_metric", "score", ["metric"])
    op.create_index("ix_score_task", "score", ["task"])
    op.create_table(
        "mixture_member",
        sa.Column("mixture_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("ref", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("coefficient", sa.Double()),
        sa.Column("digest", sa.String()),
        sa.Column("adapter_id", sa.Integer()),
        sa.PrimaryKeyConstraint("mixture_id", "position", name="pk_mixture_member"),
        sa.ForeignKeyConstraint(
            ["mixture_id"],
            ["mixture.adapter_id"],
            name="fk_mixture_member_mixture_id_mixture",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["adapter_id"],
            ["adapter.id"],
            name="fk_mixture_member_adapter_id_adapter",
            ondelete="SET NULL",
        ),
    )
    op.create_index("ix_mixture_member_adapter_id", "mixture_member", ["adapter_id"])
    op.execute(_INDEX)
    for trigger in _TRIGGERS:
        op.execute(trigger)


def downgrade() -> None:
    raise NotImplementedError("a registry is not taken back: restore its copy")
