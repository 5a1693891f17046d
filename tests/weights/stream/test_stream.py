"""Checkpoints read by rows and written to their places; an unfinished output is gone on with."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.base_files import INDEX
from lorahub_registry.errors import BaseModelError, OutputError
from lorahub_registry.weights.stream import part as parts
from lorahub_registry.weights.stream.checkpoint import Checkpoint
from lorahub_registry.weights.stream.part import Part, unfinished
from lorahub_registry.weights.stream.rewrite import Rewrite, copied, rewrite
from lorahub_registry.weights.stream.shards import Planned, Shards, same_layout
from lorahub_registry.weights.stream.work import spread

KEY = {"command": "test"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards of mixed types, one of which begins where its type may not."""
    folder = tmp_path / "model"
    folder.mkdir()
    made = torch.Generator().manual_seed(0)
    one = {
        "a": torch.randn(300, 7, generator=made),
        "flag": torch.tensor([True, False, True]),
        "half": torch.randn(11, 5, generator=made).bfloat16(),
        "tiny": torch.randn(6, generator=made).to(torch.float8_e4m3fn),
    }
    two = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "ids": torch.arange(9)}
    for name, tensors in (("model-00001-of-00002", one), ("model-00002-of-00002", two)):
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    weight_map = {
        n: f"model-0000{i}-of-00002.safetensors" for i, t in ((1, one), (2, two)) for n in t
    }
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_parameters": 7}, "weight_map": weight_map})
    )
    return folder


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


def copy(source: Checkpoint, folder: Path, elements: int) -> None:
    metadata = {file.name: meta for file, meta in source.files.items()}
    with Shards(folder, same_layout(source), metadata, source.index) as shards:
        blocks = [(n, *b) for n, s in source.tensors.items() for b in s.blocks(elements)]

        def one(block: tuple[str, int, int]) -> None:
            name, begin, end = block
            shards.put(name, source.rows(name, begin, end), begin)
            source.forget(name, begin, end)

        spread(blocks, one, workers=3)
        shards.finish()


@pytest.mark.parametrize("elements", [1, 20, 1 << 20])
def test_a_copy_in_blocks_is_the_same_bit_by_bit(
    model: Path, tmp_path: Path, elements: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with Checkpoint(model) as source:
        assert sum(s.bytes for s in source.tensors.values()) == source.bytes
        copy(source, out, elements)
    before, after = tensors(model), tensors(out)
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(raw(after[name]), raw(tensor)), name
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_parameters"] == 7
    assert index["weight_map"] == {
        n: f"model-0000{1 if n in {'a', 'flag', 'half', 'tiny'} else 2}-of-00002.safetensors"
        for n in sorted(before)
    }
    # As the format's own library reads it, metadata and all.
    from safetensors import safe_open

    with safe_open(out / "model-00001-of-00002.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_rows_are_those_of_the_whole(model: Path) -> None:
    whole = tensors(model)
    with Checkpoint(model) as source:
        for name, stored in source.tensors.items():
            assert stored.shape == tuple(whole[name].shape)
            found = source.rows(name)
            assert torch.equal(raw(found), raw(whole[name]))
        assert torch.equal(source.rows("a", 17, 40), whole["a"][17:40])
        source.forget("a", 17, 40)
        assert torch.equal(source.rows("a", 16, 41), whole["a"][16:41])


def test_a_missing_or_cut_shard_is_named(model: Path) -> None:
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(BaseModelError, match=r"00002-of-00002.safetensors: \d+ bytes long"):
        Checkpoint(model)
    shard.unlink()
    with pytest.raises(
        BaseModelError, match=r"00002-of-00002\.safetensors: a shard that the index"
    ):
        Checkpoint(model)


def test_two_shards_with_one_tensor_are_refused(model: Path) -> None:
    save_file({"a": torch.zeros(1)}, model / "model-00002-of-00002.safetensors")
    with pytest.raises(BaseModelError, match=r"a is in model-00001-of-00002.safetensors, too"):
        Checkpoint(model)


def test_a_disk_without_room_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lorahub_registry.weights.stream.shards._reserve", full)
    layout = {"model.safetensors": [Planned("a", torch.float32, (4,))]}
    with pytest.raises(OutputError, match="No space left"), Shards(tmp_path, layout, {}):
        pass


def marking(out: Path, names: list[str], key: dict[str, str] = KEY) -> list[str]:
    """Mark names that are not done yet; which these were."""
    with Part(out, key) as part:
        new = [n for n in names if n not in part.done]
        for name in new:
            part.mark(name, {"n": len(name)}, size=1)
    return new


def test_what_was_marked_is_done_and_another_key_begins_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert marking(out, ["a", "bb"]) == ["a", "bb"]
    (unfinished(out) / "kept").write_text("x")
    assert marking(out, ["a", "bb", "c"]) == ["c"]
    assert (unfinished(out) / "kept").exists()
    assert marking(out, ["a"], {"command": "other"}) == ["a"]
    assert not (unfinished(out) / "kept").exists()
    with Part(out, {"command": "other"}) as part:
        assert part.done == {"a": {"n": 1}}
        assert part.resumed == 1
        part.settle(lambda folder: folder.rename(out))
    assert not list(out.iterdir())
    assert not unfinished(out).exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b + b'["half'])
def test_a_line_that_a_kill_cut_off_is_dropped(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    out = tmp_path / "out"
    marking(out, ["a", "b"])
    journal = unfinished(out) / ".journal.jsonl"
    journal.write_bytes(damage(journal.read_bytes()))
    again = marking(out, ["a", "b"])
    assert again in (["b"], [])
    assert marking(out, ["a", "b"]) == []


def test_entries_wait_until_their_tensors_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_SYNC", 100)
    out, order = tmp_path / "out", []
    journal = unfinished(out) / ".journal.jsonl"
    with Part(out, KEY) as part:
        part.before_marking(lambda: order.append(journal.read_text().count("\n")))
        part.mark("a", size=60)
        assert order == []
        part.mark("b", size=60)
        assert order == [1], "the key alone was there when they were brought to the disk"
        assert journal.read_text().count("\n") == 3


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = (
        "import sys; from pathlib import Path\n"
        "from lorahub_registry.weights.stream.part import Part\n"
        "try:\n"
        "    with Part(Path(sys.argv[1]), {'command': 'test'}): print('written')\n"
        "except Exception as error: print(error)\n"
    )

    def run() -> str:
        command = [sys.executable, "-c", child, str(out)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with Part(out, KEY):
        assert run() == f"{out}: another process is writing it"
    assert run() == "written"


def test_nobody_takes_the_folder_while_it_moves(tmp_path: Path) -> None:
    out, told = tmp_path / "out", []
    child = (
        "import sys; from pathlib import Path\n"
        "from lorahub_registry.weights.stream.part import Part\n"
        "try:\n"
        "    with Part(Path(sys.argv[1]), {'command': 'other'}): print('begun')\n"
        "except Exception as error: print(error)\n"
    )

    def put(folder: Path) -> Path:
        command = [sys.executable, "-c", child, str(out)]
        told.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return folder.rename(out)

    with Part(out, KEY) as part:
        (part.folder / "result").write_text("whole")
        part.settle(put)
    assert told == [f"{out}: another process is writing it\n"]
    assert [p.name for p in out.iterdir()] == ["result"]


def test_a_file_that_was_lost_is_written_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Checkpoint(model) as source:

        def write(stop: bool) -> list[str]:
            written = []

            def put(name: str) -> Rewrite:
                same = copied(source, name)

                def make(begin: int, end: int) -> torch.Tensor:
                    written.append(name)
                    if stop and name == "scalar":
                        raise KeyboardInterrupt
                    return same.make(begin, end)

                return Rewrite(name, same.blocks, make)

            with Part(out, KEY) as part:
                tensors = [put(name) for name in source.tensors]
                rewrite(
                    part, same_layout(source), source, tensors, source.forget, title="", workers=1
                )
            return written

        with pytest.raises(KeyboardInterrupt):
            write(stop=True)
        (unfinished(out) / "model-00001-of-00002.safetensors").unlink()
        assert {"a", "flag", "half", "tiny"} <= set(write(stop=False))
    before, after = tensors(model), tensors(unfinished(out))
    assert all(torch.equal(raw(after[name]), raw(tensor)) for name, tensor in before.items())


def test_the_data_is_on_the_disk_before_the_journal_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run is stopped from outside."""
    synced, really = [], os.fsync

    def fsync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}").rsplit("/", 1)[-1])
        really(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with Checkpoint(model) as source, Part(tmp_path / "out", KEY) as part:

        def stop(begin: int, end: int) -> torch.Tensor:
            raise KeyboardInterrupt

        ids = Rewrite("ids", [(0, 9)], stop)
        work = [ids if n == "ids" else copied(source, n) for n in source.tensors]
        with pytest.raises(KeyboardInterrupt):
            rewrite(part, same_layout(source), source, work, source.forget, title="", workers=1)
    shards = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert shards <= set(synced[: synced.index(".journal.jsonl")])


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_error_ends_the_work(workers: int) -> None:
    begun = []

    def work(n: int) -> None:
        begun.append(n)
        if n == 5:
            raise OutputError("five")

    with pytest.raises(OutputError, match="five"):
        spread(range(1000), work, workers=workers)
    assert len(begun) < 30
