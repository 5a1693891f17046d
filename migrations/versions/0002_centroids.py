"""Centroids: where the rows that an adapter is for lie in a base's hidden space.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "centroid",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("base_digest", sa.String(), nullable=False),
        sa.Column("base", sa.String(), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.Column("template", sa.String(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("rows_digest", sa.String(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", "base_digest", name="pk_centroid"),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapter.id"], name="fk_centroid_adapter_id_adapter",
            ondelete="CASCADE",
        ),
    )  # fmt: skip


def downgrade() -> None:
    raise NotImplementedError("a registry is not taken back: restore its copy")
