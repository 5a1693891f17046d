"""A base as files: shapes and digest, without loading it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorahub_registry.adapters.base_files import base_digest, read_base
from lorahub_registry.errors import BaseModelError, BrokenAdapter
from tests import tiny
from tests.adapters.making import safetensors

HALF = ("F16", [2, 2], bytes(8))


def base(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name, content in files.items():
        (folder / name.replace("_DOT_", ".")).write_bytes(content)
    return folder


def test_shapes_are_read_from_one_file(tmp_path: Path) -> None:
    whole = safetensors({"model.a.weight": HALF, "lm_head.weight": ("F16", [1], bytes(2))})
    found = read_base(base(tmp_path / "llama-7b", model_DOT_safetensors=whole))
    assert found.name == "llama-7b"
    assert found.shapes == {"model.a.weight": (2, 2), "lm_head.weight": (1,)}
    assert found.digest is None
    assert found.bytes == 10


def test_shapes_are_read_from_all_shards_that_the_index_names(tmp_path: Path) -> None:
    folder = base(
        tmp_path,
        one_DOT_safetensors=safetensors({"a.weight": HALF}),
        two_DOT_safetensors=safetensors({"b.weight": HALF}),
        stray_DOT_safetensors=safetensors({"c.weight": HALF}),
    )
    index = {"weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_base(folder).shapes.keys() == {"a.weight", "b.weight"}
    (folder / "two.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"two\.safetensors"):
        read_base(folder)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 5}}'])
def test_a_damaged_index_is_told(tmp_path: Path, index: str) -> None:
    folder = base(tmp_path)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BaseModelError):
        read_base(folder)


def test_an_index_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(safetensors({"s": HALF}))
    folder = base(tmp_path / "in")
    index = {"weight_map": {"s": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match=r"in/secret\.safetensors"):
        read_base(folder)


def test_a_folder_without_config_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no base model"):
        read_base(tmp_path)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    folder = base(tmp_path, model_DOT_safetensors=safetensors({"a": HALF})[:-1])
    with pytest.raises(BrokenAdapter):
        read_base(folder)


def test_a_folder_is_called_by_the_last_part_that_names_a_model(tmp_path: Path) -> None:
    folder = base(tmp_path / "llama-7b" / "checkpoint-5" / "model")
    # What the config remembers may be another model, which this one was trained from.
    (folder / "config.json").write_text('{"_name_or_path": "org/another"}')
    assert read_base(folder).name == "llama-7b"
    assert read_base(folder, name="org/given").name == "org/given"


def test_a_module_is_found_where_the_checkpoint_leaves_out_the_heads_prefix(
    tiny_gpt2: tiny.Tiny, tiny_llama: tiny.Tiny
) -> None:
    gpt2 = read_base(tiny_gpt2.folder)
    assert gpt2.shape_of("transformer.h.0.attn.c_attn") == (32, 96)
    assert gpt2.shape_of("transformer.h.9.attn.c_attn") is None
    assert gpt2.shape_of("nothing") is None
    llama = read_base(tiny_llama.folder)
    assert llama.shape_of("model.layers.1.mlp.down_proj") == (32, 48)


def test_the_digest_is_of_the_tensors_and_not_of_the_files(tmp_path: Path) -> None:
    tensors = {"a": HALF, "b": ("F16", [1], b"xy")}

    def digest(name: str, **metadata: str) -> str:
        content = safetensors(dict(reversed(tensors.items())) if metadata else tensors, **metadata)
        return base_digest(base(tmp_path / name, model_DOT_safetensors=content))

    one = digest("one")
    assert one == digest("two", format="pt")
    tensors["b"] = ("F16", [1], b"xz")
    assert one != digest("three")
