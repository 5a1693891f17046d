"""Makes ``revisions/<head>.sqlite``: a small registry as this version of lorareg writes it.

Run once, when a revision is new, from the repository's root:

    python -m tests.registry.make_revision

The file is kept for ever: every later version must upgrade it without losing a row. Beside it goes
what it holds, as text.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorahub_registry.registry import migrate
from lorahub_registry.registry.records import BaseRecord, MemberRecord, RepoRecord, ScoreRecord
from lorahub_registry.registry.store import Registry
from tests.registry.making import MISTRAL, SECOND, adapter, centroid, hub, local, mixture, skills

REVISIONS = Path(__file__).parent / "revisions"


def fill(registry: Registry) -> None:
    """Rows in every table."""
    registry.put(
        adapter(
            hub("bob/code-lora", downloads=1200, likes=3, tags=("peft",), card="# Code\n"),
            scores=(ScoreRecord("humaneval", "pass@1", 31.5, n=164, few_shot=0, source="card"),),
            skills=skills("code", "math") + skills("code", source="dataset"),
        )
    )
    registry.put(
        adapter(
            "ann/many",
            subfolder="a/sql",
            name="sql",
            base=BaseRecord("Mistral-7B-v0.1", "inferred", "/opt/x/Mistral-7B-v0.1"),
            digest="sha256:2",
            weights="local",
            local_path="/cache/many",
        )
    )
    registry.put(local("/w/zog", base=BaseRecord(None, "unknown", None), skills=(), ranks={}))
    registry.put(adapter(hub("ann/many", SECOND), subfolder="a/sql", name="sql"))
    registry.tag("zog", ["translation:de"])
    registry.set_base("zog", "meta-llama/Llama-2-7b-hf")
    registry.score("zog", ScoreRecord("gsm8k", "acc", 12.5, stderr=0.5, source="measured"))
    registry.add_mixture(
        local("/w/mix", base=MISTRAL),
        mixture(
            "mix",
            MemberRecord("bob/code-lora", "code", 0.7),
            MemberRecord("gone/away", "away", None, role="expert", digest="sha256:9"),
        ),
    )
    registry.record_failure(RepoRecord("hub", "eve/broken", state="broken", error="no config"))
    registry.put_centroid("zog", centroid())
    registry.set_cursor("hub", "page 3")


def contents(path: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables, the full-text index apart (that is checked by searching)."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        names = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' "
            "AND name NOT LIKE 'adapter_fts%' AND name <> 'alembic_version' ORDER BY name"
        )
        return {
            name: sorted(
                (_plain(row) for row in connection.execute(f'SELECT * FROM "{name}"')),
                key=lambda row: json.dumps(row, sort_keys=True),
            )
            for (name,) in names.fetchall()
        }


def _plain(row: sqlite3.Row) -> dict[str, Any]:
    return {k: v.hex() if isinstance(v, bytes) else v for k, v in dict(row).items()}


def main() -> None:
    """Write the file and its text."""
    target = REVISIONS / f"{migrate.REVISIONS[-1]}.sqlite"
    if target.exists():
        raise SystemExit(f"{target} is there already: it is history and never made again")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "registry.sqlite"
        with Registry(path, clock=lambda: datetime(2026, 1, 2, tzinfo=UTC)) as registry:
            fill(registry)
        migrate.backup(path, target)
    text = json.dumps(contents(target), indent=1, sort_keys=True)
    target.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
