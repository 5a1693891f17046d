"""Names of things: which texts are Hub ids, which are paths, which names are safe everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.errors import UsageError
from lorahub_registry.refs import (
    AdapterRef,
    check_name,
    expand,
    is_commit,
    looks_like_path,
    safe_part,
    safe_path,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOSTILE = [
    "", ".", "..", "a/../b", "/etc", "\\\\host\\share", "a\\b", "C:", "C:x", "a\0b", "a\nb",
    "a\x1b[31m", "a\x9b31m", "a\x7f", "con", "NUL", "aux.txt", "Com1", "lpt9.tar.gz",
    "nul.tar.gz", "con .txt", "a.", "a ", " a", "a*", "a?", 'a"', "<a>", "a|b", "x" * 201,
    "é" * 128, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "repo", "subfolder", "revision"),
    [
        ("bob/code", "bob/code", "", None),
        ("bob/code@main", "bob/code", "", "main"),
        (f"bob/code@{COMMIT}", "bob/code", "", COMMIT),
        ("bob/code@refs/pr/3", "bob/code", "", "refs/pr/3"),
        ("bob/multi/Intel/neural-chat", "bob/multi", "Intel/neural-chat", None),
        ("bob/multi/a b/ü@v1.0", "bob/multi", "a b/ü", "v1.0"),
        ("1-b.o_b/x.y-z_1", "1-b.o_b/x.y-z_1", "", None),
    ],
)
def test_a_hub_id_is_read_and_written(
    text: str, repo: str, subfolder: str, revision: str | None
) -> None:
    ref = AdapterRef.parse(text)
    assert (ref.repo, ref.subfolder, ref.revision) == (repo, subfolder, revision)
    assert str(ref) == text
    assert ref.pinned == (revision == COMMIT)


@pytest.mark.parametrize(
    "text",
    [
        "", "bob", "bob/", "/bob/code", "bob//code", "bob/code/", "../bob/code", "bob/..",
        "bob/code/../x", "bob/code@", "bob/code@a b", "bob/code@a..b", "bob/code@a@b",
        "bob/-code", "bob/code.", "bob/co--de", "bob/co..de", "böb/code", "bob/code\n",
        "bob/code@main\n", "bob/code/nul", "bob/code/a\\b", "https://huggingface.co/bob/code",
        "bob/" + "x" * 97, "bob/code/\x1b[31m",
    ],
)  # fmt: skip
def test_what_is_no_hub_id_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a Hub id"):
        AdapterRef.parse(text)


PART = st.from_regex(r"[A-Za-z0-9]{1,8}", fullmatch=True)


@given(
    repo=st.tuples(PART, PART),
    below=st.lists(PART.filter(safe_part), max_size=3),
    revision=st.none() | PART,
)
def test_a_ref_reads_what_it_writes(
    repo: tuple[str, str], below: list[str], revision: str | None
) -> None:
    ref = AdapterRef("/".join(repo), "/".join(below), revision)
    assert AdapterRef.parse(str(ref)) == ref
    assert AdapterRef.parse(str(ref.at("main"))).revision == "main"


@given(st.text(max_size=30))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        ref = AdapterRef.parse(text)
    except UsageError:
        return
    assert str(ref) == text
    assert safe_path(ref.repo)
    assert not ref.subfolder or safe_path(ref.subfolder)


def test_a_commit_is_forty_hexadecimal_digits() -> None:
    assert is_commit(COMMIT)
    for text in (None, "", "main", COMMIT[:-1], COMMIT + "0", COMMIT.upper(), COMMIT + "\n"):
        assert not is_commit(text)


@pytest.mark.parametrize("part", HOSTILE)
def test_a_name_that_some_system_cannot_hold_is_not_safe(part: str) -> None:
    assert not safe_part(part)
    assert not safe_path(f"fine/{part}")
    with pytest.raises(UsageError, match="cannot be the name of a recipe"):
        check_name(part, what="a recipe")


@pytest.mark.parametrize(
    "part", ["a", "a.b", "console", "com10", "nul-lora", "ü", "a b", ".gitignore"]
)
def test_other_names_are_safe(part: str) -> None:
    assert safe_part(part)
    assert safe_path(f"x/{part}/y")


@pytest.mark.parametrize("name", ["zog", "my-mix.v2", "a+b", "x_1", "7"])
def test_a_mixture_may_have_such_a_name(name: str) -> None:
    assert check_name(name, what="a mixture") == name


@pytest.mark.parametrize("name", ["a/b", "a b", "-a", ".a", "a..b", "a-", "ü", "a:b", "x" * 97])
def test_a_mixture_may_not_have_such_a_name(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name, what="a mixture")


@pytest.mark.parametrize(
    "text", ["/a", "./a", "../a", "~/a", "~", ".", "..", "C:\\a", "D:/a", ".\\a"]
)
def test_such_a_text_can_only_be_a_path(text: str) -> None:
    assert looks_like_path(text)


@pytest.mark.parametrize("text", ["bob/code", "zog", "a/b/c", "C:", ".hidden/x"])
def test_such_a_text_may_be_a_name(text: str) -> None:
    assert not looks_like_path(text)


def test_paths_are_made_absolute_by_their_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    assert expand("a/../b") == tmp_path / "b"
    assert expand("x", beside=tmp_path / "recipes") == tmp_path / "recipes" / "x"
    assert expand("../x", beside=tmp_path / "recipes") == tmp_path / "x"
    assert expand("/x", beside=tmp_path) == Path("/x")
    assert expand("~/x") == tmp_path / "me" / "x"
    assert expand("~nobody-of-that-name/x") == tmp_path / "~nobody-of-that-name" / "x"


def test_a_link_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert expand("link/x", beside=tmp_path) == tmp_path / "link" / "x"
