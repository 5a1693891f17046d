"""The safetensors header, read as untrusted data, and the digest of what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.adapters.tensors import content_digest, file_sha256, parse_header, read_header
from lorahub_registry.errors import BrokenAdapter, LoraregError
from tests.adapters.making import framed, lora, safetensors

TWO = {"a": ("F32", [2, 3], bytes(range(24))), "b": ("BF16", [4], bytes(range(8)))}


def written(folder: Path, content: bytes) -> Path:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(content)
    return path


def digest(folder: Path, content: bytes) -> str:
    path = written(folder, content)
    return content_digest(path, read_header(path))


def test_the_header_says_what_is_in_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, safetensors(TWO, format="pt"))
    found = read_header(path)
    assert [(t.name, t.dtype, t.shape, t.begin, t.end) for t in found.tensors.values()] == [
        ("a", "F32", (2, 3), 0, 24),
        ("b", "BF16", (4,), 24, 32),
    ]
    assert found.tensors["a"].elements == 6
    assert found.metadata == {"format": "pt"}
    assert found.data_start + found.data_bytes == path.stat().st_size


def test_it_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "half": torch.ones(3, 2, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    found = read_header(path)
    assert {n: t.shape for n, t in found.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert len(content_digest(path, found)) == 64


def test_a_file_that_was_cut_off_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = safetensors(TWO)
    read_header(written(tmp_path, whole))
    for length in range(len(whole)):
        with pytest.raises(BrokenAdapter):
            read_header(written(tmp_path, whole[:length]))
    with pytest.raises(BrokenAdapter, match="long where its header promises"):
        read_header(written(tmp_path, whole + b"x"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        b"<!DOCTYPE html><html>404</html>",
        (1 << 63).to_bytes(8, "little") + b"{}",
        (200_000_000).to_bytes(8, "little") + b"{}",
        (0).to_bytes(8, "little"),
    ],
)
def test_what_is_no_safetensors_file_is_told(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BrokenAdapter, match="safetensors"):
        read_header(written(tmp_path, content))


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(shape=[3])},
        {"a": entry(dtype="F16")},
        {"a": entry(dtype="F99")},
        {"a": entry(dtype=["F32"])},
        {"a": entry(shape=[-2])},
        {"a": entry(shape=[-1, -2])},
        {"a": entry(shape=[2.0])},
        {"a": entry(shape=[True, 2])},
        {"a": entry(shape=2)},
        {"a": entry(shape=None)},
        {"a": entry(offsets=[8, 0])},
        {"a": entry(offsets=[-8, 0])},
        {"a": entry(offsets=[0])},
        {"a": entry(offsets=[0, 8, 16])},
        {"a": entry(offsets="08")},
        {"a": entry(offsets=[4, 12])},  # a gap before it
        {"a": entry(), "b": entry()},  # one on the other
        {"a": entry(), "b": entry(offsets=[4, 12])},
        {"a": entry(), "b": entry(offsets=[16, 24])},
        {"a": {}},
        {"a": []},
        {"a": None},
        {"__metadata__": [1]},
        {"__metadata__": "text"},
        [],
        7,
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
    ],
)
def test_a_header_that_does_not_hold_together_is_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(BrokenAdapter):
        read_header(written(tmp_path, framed(header, bytes(8))))


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write((99_000_000_000).to_bytes(8, "little"))
        file.truncate(100_000_000_000)  # sparse: it takes no room on disk
    with pytest.raises(BrokenAdapter, match="not a safetensors file"):
        read_header(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_no_header_raises_anything_else(raw: Any) -> None:
    text = json.dumps(raw).encode()
    try:
        parse_header(text, len(text), where="here")
    except LoraregError:
        pass


def test_order_and_metadata_do_not_change_the_digest(tmp_path: Path) -> None:
    one = digest(tmp_path, safetensors(TWO))
    assert one == digest(tmp_path, safetensors(dict(reversed(TWO.items()))))
    assert one == digest(tmp_path, safetensors(TWO, format="pt", by="somebody"))


@pytest.mark.parametrize(
    "other",
    [
        {**TWO, "a": ("F32", [2, 3], bytes(range(1, 25)))},
        {**TWO, "a": ("F32", [3, 2], bytes(range(24)))},
        {**TWO, "a": ("I32", [2, 3], bytes(range(24)))},
        {"A": TWO["a"], "b": TWO["b"]},
        {"a": TWO["a"]},
        {**TWO, "c": ("F32", [0], b"")},
    ],
)
def test_bytes_shape_dtype_and_names_change_the_digest(tmp_path: Path, other: Any) -> None:
    assert digest(tmp_path, safetensors(TWO)) != digest(tmp_path, safetensors(other))


NAMED = st.dictionaries(
    st.text("ab.\"',[]", min_size=1, max_size=4), st.binary(max_size=6), min_size=1, max_size=4
)


@given(one=NAMED, other=NAMED, seed=st.randoms(use_true_random=False))
def test_digests_are_equal_just_where_the_tensors_are(
    tmp_path_factory: pytest.TempPathFactory, one: Any, other: Any, seed: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()

    def of(tensors: dict[str, bytes]) -> str:
        shuffled = list(tensors.items())
        seed.shuffle(shuffled)
        return digest(folder, safetensors({k: ("U8", [len(v)], v) for k, v in shuffled}))

    assert (of(one) == of(other)) == (one == other)
    assert of(one) == of(one)


def test_the_files_own_sha256_does_depend_on_order(tmp_path: Path) -> None:
    one = file_sha256(written(tmp_path, safetensors(TWO)))
    assert one != file_sha256(written(tmp_path, safetensors(dict(reversed(TWO.items())))))


def test_the_digest_reports_its_progress(tmp_path: Path) -> None:
    from contextlib import contextmanager

    done: list[float] = []

    class Watcher:
        @contextmanager
        def task(self, title: str, total: float | None = None, unit: str = "") -> Any:
            yield self
            assert sum(done) == total

        def advance(self, n: float = 1) -> None:
            done.append(n)

    path = written(tmp_path, safetensors(lora()))
    content_digest(path, read_header(path), progress=Watcher())  # type: ignore[arg-type]
    assert done
