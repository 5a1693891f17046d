"""The registry: one SQLite file that knows adapters, their bases, skills, scores and lineage.

:class:`store.Registry` is what others use; what goes in and comes out are the plain values of
:mod:`records`. Nothing here imports torch, and Alembic only while a file is being migrated.
"""
