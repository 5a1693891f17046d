"""Where ``cards/`` and ``migrations/`` are: inside an installed wheel, or beside the package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The resource folder ``name`` (``"cards"`` or ``"migrations"``).

    A wheel holds it in the package's ``_data/``; a checkout (also an editable install) beside the
    package.
    """
    packaged = _PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name
