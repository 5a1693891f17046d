"""Rows of datasets on a Hub, over HTTP on loopback, by the real client in a process of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.hub.conftest import hub  # noqa: F401  (a fixture)
from tests.hub_server import HubServer
from tests.hub_server.routes.files import resolve
from tests.hub_server.routes.info import list_tree, model_info, model_info_at, paths_info
from tests.hub_server.wire import route

# Datasets are kept as models are, below other addresses.
route("GET", "/api/datasets/{repo}/tree/{rev}(?:/{path})?")(list_tree)
route("POST", "/api/datasets/{repo}/paths-info/{rev}")(paths_info)
route("GET", "/api/datasets/{repo}/revision/{rev}")(model_info_at)
route("GET", "/api/datasets/{repo}")(model_info)
route("GET HEAD", "/datasets/{repo}/resolve/{rev}/{path}")(resolve)

CHILD = """
import json, sys
from lorahub_registry.errors import DataError
from lorahub_registry.recipes import TrainSplit, read_file
for words in json.loads(sys.argv[1]):
    try:
        read = read_file(TrainSplit(**words), seed=0)
        rows = [(r.input, r.output, r.place) for r in read.rows]
        print(json.dumps([read.name, read.revision, rows]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table

    made = io.BytesIO()
    write_table(pyarrow.Table.from_pylist(rows), made)
    return made.getvalue()


def read(*splits: dict[str, Any], cwd: Path) -> list[Any]:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(splits)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


NAME = "data/train-00000-of-00001.parquet"


def test_a_dataset_is_read_and_pinned(hub: HubServer, tmp_path: Path) -> None:  # noqa: F811
    hub.add_repo("me/rows", {NAME: parquet([{"input": "q", "output": "old"}])})
    old = hub.sha("me/rows")
    hub.commit("me/rows", {NAME: parquet([{"input": "q", "output": "new"}])})
    now = hub.sha("me/rows")
    row = "me/rows (train), row 1"
    first, second, column, split, absent = read(
        {"dataset": "me/rows"},
        {"dataset": f"me/rows@{old}"},
        {"dataset": "me/rows", "input": "p"},
        {"dataset": "me/rows", "split": "dev"},
        {"dataset": "me/absent"},
        cwd=tmp_path,
    )
    assert first == ["me/rows", now, [["q", "new", row]]]
    assert second == ["me/rows", old, [["q", "old", row]]]
    assert column == f"{row}: there is no column 'p'; its columns are input, output"
    assert split.startswith("me/rows: its split 'dev' cannot be read: ")
    assert absent.startswith("me/absent: its split 'train' cannot be read: ")
    assert "doesn't exist on the Hub" in absent
