"""Alembic's entry: runs the revisions on a connection that the caller has opened.

The caller (``lorahub_registry.registry.migrate``) also opened the transaction, with foreign keys
off, so that a failure leaves nothing behind. Two things to know when writing a revision:

* ``batch_alter_table`` rebuilds the table and thereby drops its triggers: make them again, and
  rebuild the full-text index;
* redeclare the tables that are touched; import nothing of the package, which will have moved on.
"""

from alembic import context

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("lorareg migrates its registry itself, when a command opens it")

context.configure(
    connection=connection,
    target_metadata=context.config.attributes.get("target_metadata"),
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
