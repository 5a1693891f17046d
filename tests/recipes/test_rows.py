import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.errors import DataError
from lorahub_registry.recipes import Row, Split, overlap, read_rows


def write(folder: Path, name: str, text: str | bytes) -> Split:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Split(path=name)


def refused(split: Split, folder: Path) -> DataError:
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
    assert "the recipe's own folder" in (error.hint or "")


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
