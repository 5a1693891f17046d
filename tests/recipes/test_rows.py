import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.errors import DataError
from lorahub_registry.recipes import (
    AdapterPlan,
    Row,
    Split,
    TrainSplit,
    held_out,
    overlap,
    read_file,
    read_rows,
    read_splits,
)


def write(folder: Path, name: str, text: str | bytes) -> Split:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Split(path=name)


def refused(split: Split | TrainSplit, folder: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read_rows(split, seed=0, beside=folder)
    return caught.value


def jsonl(n: int) -> str:
    return "".join(json.dumps({"input": f"q{i}", "output": f"a{i}"}) + "\n" for i in range(n))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.jsonl", '{"input": "q", "output": "a", "n": 1}\n\n{"input": "é", "output": 2}\n'),
        ("r.json", '[{"input": "q", "output": "a"}, {"input": "é", "output": 2}]'),
        ("r.csv", 'input,output\nq,a\n"é","2"\n'),
        ("R.CSV", '\ufeffinput,output\r\nq,a\r\n"é","2"\r\n'),
    ],
)
def test_rows_are_read_by_suffix(tmp_path: Path, name: str, text: str) -> None:
    rows = read_rows(write(tmp_path, name, text), seed=0, beside=tmp_path)
    assert [(r.input, r.output) for r in rows] == [("q", "a"), ("é", "2")]


def test_a_row_keeps_all_its_columns_and_its_place(tmp_path: Path) -> None:
    write(tmp_path, "r.csv", 'ask,say,more\n"two\nlines",b,c\nd,e,f\n')
    first, second = read_rows(
        Split(path="r.csv", input="ask", output="say"), seed=0, beside=tmp_path
    )
    assert first.input == "two\nlines"
    assert second == Row("d", "e", {"ask": "d", "say": "e", "more": "f"}, "say", "r.csv, line 4")


def test_a_place_tells_no_folder_of_the_machine(tmp_path: Path) -> None:
    write(tmp_path, "r.jsonl", jsonl(1))
    (row,) = read_rows(Split(path=str(tmp_path / "r.jsonl")), seed=0)
    assert row.place == "r.jsonl, line 1"
    (row,) = read_rows(Split(path=f"../{tmp_path.name}/r.jsonl"), seed=0, beside=tmp_path)
    assert row.place == f"../{tmp_path.name}/r.jsonl, line 1"


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    write(tmp_path, "r.jsonl", jsonl(5) + "broken\n")
    rows = read_rows(Split(path="r.jsonl", limit=2), seed=0, beside=tmp_path)
    assert [r.input for r in rows] == ["q0", "q1"]


def test_a_random_choice_keeps_the_order_and_follows_the_seed(tmp_path: Path) -> None:
    write(tmp_path, "r.jsonl", jsonl(100))
    split = Split(path="r.jsonl", limit=10, select="random")

    def taken(seed: int) -> list[int]:
        return [int(r.input[1:]) for r in read_rows(split, seed=seed, beside=tmp_path)]

    assert taken(1) == taken(1) == sorted(set(taken(1)))
    assert len(taken(1)) == 10
    assert taken(1) != taken(2)
    assert taken(1) != list(range(10))


def test_a_limit_above_the_rows_takes_them_all(tmp_path: Path) -> None:
    write(tmp_path, "r.jsonl", jsonl(3))
    split = Split(path="r.jsonl", limit=10, select="random")
    assert len(read_rows(split, seed=0, beside=tmp_path)) == 3


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("r.jsonl", "", "r.jsonl: holds no rows"),
        ("r.json", "[]", "r.json: holds no rows"),
        ("r.csv", "input,output\n", "r.csv: holds no rows"),
        ("r.csv", "", "r.csv: holds no rows"),
        ("r.jsonl", jsonl(2) + "{broken\n", "r.jsonl, line 3: not JSON"),
        ("r.jsonl", jsonl(1) + "\n[1]\n", "r.jsonl, line 3: a row must be an object"),
        ("r.jsonl", '{"input": "a", "output": NaN}', "line 1: not JSON: NaN is not JSON"),
        ("r.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("r.json", '{"input": "a", "output": "b"}', "r.json: must be a list of rows"),
        ("r.json", '[{"input": "a", "output": "b"},\n{"input" "b"}]', "not JSON: "),
        ("r.json", '[{"input": "a", "output": "b"}, 3]', "r.json, row 2: a row must be an object"),
        ("r.jsonl", '{"text": "a"}', "there is one column only, 'text'"),
        ("r.csv", "input;output\na;b\n", "there is one column only, 'input;output'"),
        ("r.jsonl", '{"inputs": 1, "output": 1}', "no column 'input', did you mean 'inputs'?"),
        ("r.jsonl", '{"q": 1, "a": 1}', "no column 'input'; its columns are q, a"),
        ("r.jsonl", jsonl(1) + '{"input": 1, "x": 1}', "r.jsonl, line 2: there is no column 'out"),
        ("r.jsonl", '{"input": "a", "output": ""}', "line 1: column 'output', the answer, is emp"),
        ("r.jsonl", '{"input": "a", "output": null}', "line 1: column 'output' is empty (null)"),
        ("r.jsonl", '{"input": ["a"], "output": 1}', "line 1: column 'input' is a list, not text"),
        ("r.jsonl", '{"input": "a", "output": true}', "column 'output' is true or false, not t"),
        ("r.csv", "input,output\na,b\nc\n", "r.csv, line 3: 1 cells under 2 columns"),
        ("r.csv", "input,output\na,b,c\n", "r.csv, line 2: 3 cells under 2 columns"),
        ("r.csv", "input,input\na,b\n", "r.csv, line 1: column 'input' is there twice"),
        ("r.csv", 'input,output\na,"b\n', "not CSV: unexpected end of data"),
        ("r.csv", "input,output\na," + "b" * 200_000 + "\n", "line 2: not CSV: field larger"),
        ("r.jsonl", b'{"input": "caf\xe9", "output": "b"}\n', "not UTF-8 text"),
        ("r.csv", b"input,output\ncaf\xe9,b\n", "not UTF-8 text"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(
    tmp_path: Path, name: str, text: str | bytes, told: str
) -> None:
    error = refused(write(tmp_path, name, text), tmp_path)
    assert told in str(error)
    assert str(error).startswith(name)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    error = refused(Split(path="absent.jsonl"), tmp_path)
    assert str(tmp_path / "absent.jsonl") in str(error)
    assert "the folder of the file that names them" in (error.hint or "")


def test_a_folder_is_no_file_of_rows(tmp_path: Path) -> None:
    (tmp_path / "r.csv").mkdir()
    assert "cannot be read" in str(refused(Split(path="r.csv"), tmp_path))


def test_the_separator_is_asked_about_where_it_seems_another(tmp_path: Path) -> None:
    assert refused(write(tmp_path, "r.csv", "a;b\n1;2\n"), tmp_path).hint == (
        "is the separator a comma?"
    )


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"))), st.integers(0, 5))
def test_overlap_counts_the_test_rows_that_were_learned_from(
    pairs: list[tuple[str, str]], cut: int
) -> None:
    rows = [Row(q, a) for q, a in pairs]
    train, test = rows[:cut], rows[cut:]
    assert overlap(train, test) == len([p for p in pairs[cut:] if p in pairs[:cut]])
    assert overlap(rows, rows) == len(rows)
    assert overlap([], rows) == 0


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"input": f"q{i}", "output": i, "extra": None} for i in range(count)]


def test_parquet_is_read_row_by_row(tmp_path: Path) -> None:
    parquet(tmp_path / "r.parquet", pairs(5))
    rows = read_rows(Split(path="r.parquet"), seed=0, beside=tmp_path)
    assert [(r.input, r.output) for r in rows] == [(f"q{i}", str(i)) for i in range(5)]
    assert rows[4].place == "r.parquet, row 5"
    assert rows[4].columns == {"input": "q4", "output": 4, "extra": None}


def test_a_fault_in_parquet_is_told_with_its_row(tmp_path: Path) -> None:
    parquet(tmp_path / "r.parquet", [*pairs(3), {"input": None, "output": 1}])
    told = str(refused(Split(path="r.parquet"), tmp_path))
    assert told == "r.parquet, row 4: column 'input' is empty (null), not text"
    assert "x.parquet: not Parquet" in str(refused(write(tmp_path, "x.parquet", "no"), tmp_path))


def test_plain_text_is_one_column_and_may_be_empty(tmp_path: Path) -> None:
    write(tmp_path, "t.jsonl", '{"text": "once"}\n{"text": ""}\n')
    rows = read_rows(TrainSplit(path="t.jsonl", text="text"), seed=0, beside=tmp_path)
    assert rows[0] == Row("", "once", {"text": "once"}, "text", "t.jsonl, line 1")
    assert rows[1].output == ""
    error = refused(TrainSplit(path="t.jsonl", text="txt"), tmp_path)
    assert "there is no column 'txt', did you mean 'text'?" in str(error)
    assert "`text:`" in (error.hint or "")


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.parquet"])
def test_the_sha256_is_of_the_file_whatever_is_taken_of_it(tmp_path: Path, name: str) -> None:
    text = {"r.jsonl": jsonl(3), "r.csv": "input,output\na,b\nc,d\n"}
    if name == "r.parquet":
        parquet(tmp_path / name, pairs(3))
    else:
        write(tmp_path, name, text.get(name, '[{"input": "a", "output": "b"}]'))
    read = read_file(Split(path=name, limit=1), seed=0, beside=tmp_path)
    assert len(read.rows) == 1
    assert read.name == name
    assert read.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_rows_are_those_of_the_bytes_that_are_hashed(tmp_path: Path) -> None:
    # A pipe says something else to whoever reads it a second time.
    path = tmp_path / "r.jsonl"
    os.mkfifo(path)

    def write_others() -> None:
        with suppress(BrokenPipeError):  # the reader has what it wants
            for n in range(100):
                path.write_bytes(jsonl(n + 1).encode())

    threading.Thread(target=write_others, daemon=True).start()
    read = read_file(Split(path="r.jsonl"), seed=0, beside=tmp_path)
    same = "".join(json.dumps({"input": r.input, "output": r.output}) + "\n" for r in read.rows)
    assert read.sha256 == hashlib.sha256(same.encode()).hexdigest()


@pytest.fixture
def rows_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in a folder: two splits, as the Hub stores them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    (folder / "data").mkdir(parents=True)
    parquet(folder / "data" / "train-00000-of-00001.parquet", pairs(6))
    parquet(folder / "data" / "test-00000-of-00001.parquet", pairs(2))
    return folder


def test_a_dataset_is_read_by_its_split(rows_folder: Path) -> None:
    split = TrainSplit(dataset="./rows", split="test")
    read = read_file(split, seed=0, beside=rows_folder.parent)
    assert [(r.input, r.output) for r in read.rows] == [("q0", "0"), ("q1", "1")]
    assert read.rows[1].place == "rows (test), row 2"
    assert (read.name, read.revision) == ("rows", None)
    whole = read_file(TrainSplit(dataset="./rows"), seed=0, beside=rows_folder.parent)
    assert len(whole.rows) == 6
    assert whole.sha256 != read.sha256
    first = TrainSplit(dataset="./rows", limit=2)
    assert read_file(first, seed=0, beside=rows_folder.parent).sha256 == read.sha256


def test_a_dataset_s_faults_are_told_in_plain_words(rows_folder: Path) -> None:
    folder = rows_folder.parent
    told = {
        "./rows: its split 'dev' cannot be read": TrainSplit(dataset="./rows", split="dev"),
        "./rows: its split 'train' cannot be read": TrainSplit(dataset="./rows", config="xx"),
        "./absent: no such folder": TrainSplit(dataset="./absent"),
        "rows (train), row 1: there is no column 'q'": TrainSplit(dataset="./rows", input="q"),
    }
    for text, split in told.items():
        assert text in str(refused(split, folder))


def test_a_dataset_s_own_code_is_never_run(rows_folder: Path) -> None:
    for path in (rows_folder / "data").iterdir():
        path.unlink()
    ran = rows_folder / "ran"
    (rows_folder / "rows.py").write_text(f"open({str(ran)!r}, 'w').close()\n", "utf-8")
    refused(TrainSplit(dataset="./rows"), rows_folder.parent)
    assert not ran.exists()


def test_a_folder_of_a_dataset_s_name_does_not_stand_for_it(
    rows_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows_folder.parent)
    rows_folder.parent.joinpath("me").mkdir()
    rows_folder.rename("me/rows")
    error = refused(TrainSplit(dataset="me/rows"), rows_folder.parent)
    assert "is a folder here, too" in str(error)
    assert "./me/rows" in (error.hint or "")


@pytest.mark.parametrize("source", ["path='r.parquet'", "dataset='me/rows'"])
def test_a_missing_extra_is_named(tmp_path: Path, source: str) -> None:
    (tmp_path / "r.parquet").write_bytes(b"any")
    code = (
        "import sys\nsys.modules['datasets'] = sys.modules['pyarrow'] = None\n"
        "from lorahub_registry.errors import DataError\n"
        "from lorahub_registry.recipes import TrainSplit, read_rows\n"
        f"try:\n    read_rows(TrainSplit({source}), seed=0)\n"
        "except DataError as error:\n    print(error.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert done.stdout == "pip install 'lorareg[datasets]'\n", done.stderr


def test_a_share_is_held_out_by_the_seed_in_the_file_s_order() -> None:
    rows = [Row(f"{i:03}", "a") for i in range(100)]
    kept, out = held_out(rows, 0.1, seed=1)
    assert (len(kept), len(out)) == (90, 10)
    assert sorted([*kept, *out], key=lambda r: r.input) == rows
    assert kept == sorted(kept, key=lambda r: r.input)
    assert out == sorted(out, key=lambda r: r.input)
    assert held_out(rows, 0.1, seed=1) == (kept, out)
    assert held_out(rows, 0.1, seed=2) != (kept, out)
    assert len(held_out(rows, 0.001, seed=1)[1]) == 1
    with pytest.raises(DataError, match="leaves none to learn from"):
        held_out(rows[:1], 0.5, seed=0)


def test_an_adapter_s_splits_are_read_together(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", jsonl(10))
    data = {"train": {"path": "a.jsonl"}, "validation": 0.2, "test": {"path": "a.jsonl"}}
    shared = AdapterPlan.model_validate({"name": "a", "data": data})
    found = read_splits(shared, beside=tmp_path)
    assert {k: len(v.rows) for k, v in found.items()} == {"train": 8, "validation": 2, "test": 10}
    assert overlap(found["train"].rows, found["validation"].rows) == 0
    assert {v.sha256 for v in found.values()} == {hashlib.sha256(jsonl(10).encode()).hexdigest()}
    apart = AdapterPlan.model_validate(
        {"name": "a", "data": {"train": {"path": "a.jsonl"}, "validation": data["test"]}}
    )
    found = read_splits(apart, beside=tmp_path)
    assert {k: len(v.rows) for k, v in found.items()} == {"train": 10, "validation": 10}
    write(tmp_path, "a.jsonl", jsonl(1))
    with pytest.raises(DataError, match=r"^a\.jsonl: a share of 0\.2 of 1 rows leaves none"):
        read_splits(shared, beside=tmp_path)
