"""Pins: what was used is written down, and anything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.errors import LockError
from lorahub_registry.lock import LOCK_NAME, Lock, Pin

ZOG = Pin("bob/zog@" + "a" * 40, "a" * 40, {"adapter_model.safetensors": "11"}, "d1")
ARR = Pin("./arr", None, {"adapter_model.safetensors": "22"}, "d2")
LOCK = Lock(
    recipe="r1",
    base=Pin("org/base", "b" * 40, digest="d0"),
    adapters={"zog": ZOG, "arr": ARR},
    data={"train": Pin("train.jsonl", files={"train.jsonl": "33"})},
)


def saved(folder: Path, text: str) -> Path:
    path = folder / LOCK_NAME
    path.write_text(text, encoding="utf-8")
    return path


def test_a_lock_reads_what_it_wrote(tmp_path: Path) -> None:
    found = Lock.load(saved(tmp_path, LOCK.dumps()))
    assert found == LOCK
    assert found.dumps() == LOCK.dumps()
    found.check(LOCK)


def test_the_text_does_not_depend_on_the_order_of_adapters() -> None:
    turned = replace(LOCK, adapters={"arr": ARR, "zog": ZOG})
    assert turned.dumps() == LOCK.dumps()


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (
            replace(LOCK, base=Pin("org/base", "b" * 40, digest="d9")),
            "base: its tensors are others",
        ),
        (replace(LOCK, base=Pin("org/base", "c" * 40, digest="d0")), "base: at cccc"),
        (replace(LOCK, base=Pin("org/base", None)), "base: at no revision, pinned bbbb"),
        (replace(LOCK, adapters={"zog": ZOG}), "adapter arr: in the lock only"),
        (
            replace(LOCK, adapters={**LOCK.adapters, "new": ARR}),
            "adapter new: not in the lock",
        ),
        (
            replace(LOCK, adapters={"zog": replace(ZOG, digest="d7"), "arr": ARR}),
            r"adapter zog: its tensors are others \(d7, pinned d1\)",
        ),
        (
            replace(LOCK, adapters={"zog": replace(ZOG, revision="e" * 40), "arr": ARR}),
            "adapter zog: at eeee",
        ),
        (
            replace(
                LOCK,
                adapters={
                    "zog": ZOG,
                    "arr": replace(ARR, files={"adapter_model.safetensors": "9"}),
                },
            ),
            "adapter arr: adapter_model.safetensors has another content",
        ),
        (
            replace(LOCK, adapters={"zog": ZOG, "arr": replace(ARR, files={})}),
            "adapter arr: adapter_model.safetensors has another content",
        ),
        (
            replace(LOCK, data={"train": Pin("train.jsonl", files={"train.jsonl": "34"})}),
            "data train: train.jsonl has another content",
        ),
        (replace(LOCK, data={}), "data train: in the lock only"),
    ],
)
def test_whatever_is_another_than_pinned_is_named(now: Lock, said: str) -> None:
    with pytest.raises(LockError, match=said):
        LOCK.check(now)


def test_everything_that_differs_is_named_at_once() -> None:
    now = replace(LOCK, adapters={"a": ARR, "b": ARR}, data={})
    with pytest.raises(LockError) as caught:
        LOCK.check(now)
    assert str(caught.value).splitlines()[1:] == [
        "  adapter a: not in the lock",
        "  adapter b: not in the lock",
        "  adapter arr: in the lock only",
        "  adapter zog: in the lock only",
        "  data train: in the lock only",
    ]


def test_no_lock_and_a_later_lock_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(LockError, match="no such lock"):
        Lock.load(tmp_path / LOCK_NAME)
    later = json.dumps({**json.loads(LOCK.dumps()), "version": 2})
    with pytest.raises(LockError, match="later lorareg") as caught:
        Lock.load(saved(tmp_path, later))
    assert "upgrade" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '"a"', "{}", '{"version": 1}', "[" * 9999]
)
def test_what_is_no_lock_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(LockError):
        Lock.load(saved(tmp_path, text))


@given(
    path=st.sampled_from([("base",), ("adapters",), ("data",), ("base", "files"), ("base", "ref"),
                          ("base", "digest"), ("adapters", "zog"), ("adapters", "zog", "files"),
                          ("adapters", "zog", "revision"), ("base", "unknown")]),
    value=st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)  # fmt: skip
def test_a_damaged_lock_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, path: tuple[str, ...], value: Any
) -> None:
    raw = json.loads(LOCK.dumps())
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    try:
        Lock.load(saved(tmp_path_factory.getbasetemp(), json.dumps(raw))).check(LOCK)
    except LockError:
        pass


def test_another_recipe_is_another_thing_than_the_lock_pins():
    pin = Pin("base", digest="d")
    old, new = Lock("recipe one", pin, {}), Lock("recipe two", pin, {})
    old.check(old)
    with pytest.raises(LockError, match="recipe: another method, seed, coefficient"):
        old.check(new)
