"""Loading a base: what it is, what it refuses, and that nothing of it is run."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers

from lorahub_registry.errors import BaseModelError
from lorahub_registry.evaluate.base import adopt, load_base, pick_device
from lorahub_registry.evaluate.quiet import one_thread, threads_for
from tests import tiny


@pytest.mark.parametrize(
    ("kind", "seq2seq", "task"),
    [("llama", False, "CAUSAL_LM"), ("gpt2", False, "CAUSAL_LM"), ("t5", True, "SEQ_2_SEQ_LM")],
)
def test_a_base_knows_what_it_is(
    request: pytest.FixtureRequest, kind: str, seq2seq: bool, task: str
) -> None:
    model: tiny.Tiny = request.getfixturevalue(f"tiny_{kind}")
    base = load_base(model.folder, name="me/tiny", revision="a" * 40, device="cpu")
    assert (base.seq2seq, base.task_type, base.exact_dtype) == (seq2seq, task, True)
    assert (base.name, base.revision, base.device.type) == ("me/tiny", "a" * 40, "cpu")
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.tokenizer.pad_token_id is not None


def test_adaptable_modules_are_all_that_lora_can_sit_on(
    tiny_llama: tiny.Tiny, tiny_gpt2: tiny.Tiny
) -> None:
    llama = tiny_llama.base().adaptable_modules()
    assert {name.rsplit(".", 1)[-1] for name in llama} == {*tiny.LINEAR, "lm_head", "embed_tokens"}
    assert len(llama) == 2 * 7 + 2
    gpt2 = tiny_gpt2.base().adaptable_modules()
    names = {"c_attn", "c_proj", "c_fc", "lm_head", "wte", "wpe"}
    assert {name.rsplit(".", 1)[-1] for name in gpt2} == names


def test_the_dtype_is_the_checkpoints_or_the_one_asked_for(tiny_llama: tiny.Tiny) -> None:
    half = load_base(tiny_llama.folder, name="x", device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert not half.exact_dtype


@pytest.mark.parametrize("damage", ["no config", "no weights", "only a pickle", "cut weights",
                                    "config of nothing", "no tokenizer", "own code"])  # fmt: skip
def test_what_cannot_be_loaded_is_refused_by_the_bases_name(
    tiny_llama: tiny.Tiny, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_llama.folder, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    canary = tmp_path / "canary"
    if damage == "no config":
        config.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "only a pickle":
        weights.unlink()
        torch.save(tiny_llama.model().state_dict(), folder / "pytorch_model.bin")
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif damage == "config of nothing":
        config.write_text('{"model_type": "no-such-model"}')
    elif damage == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    else:
        (folder / "own.py").write_text(f"open({str(canary)!r}, 'w')\nclass Config: pass\n")
        own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
        config.write_text(json.dumps(own))
    with pytest.raises(BaseModelError, match=r"^the base me/broken cannot be loaded: ."):
        load_base(folder, name="me/broken", device="cpu")
    assert not canary.exists()


def test_a_model_with_adapters_on_it_is_no_base(tiny_llama: tiny.Tiny) -> None:
    with pytest.raises(BaseModelError, match="PEFT adapters already"):
        adopt(tiny_llama.peft("plain"), tiny_llama.tokenizer(), name="x")


def test_a_device_that_is_not_there_is_refused() -> None:
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in {"cpu", "cuda", "mps"}
    with pytest.raises(BaseModelError, match="'tpu' is not on this machine"):
        pick_device("tpu")


def test_threads_are_kept_to_one_and_given_back(tiny_llama: tiny.Tiny) -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    with one_thread():
        assert torch.get_num_threads() == 1
    with threads_for(tiny_llama.model()):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_bases_that_threads_load_at_once_leave_transformers_as_it_was(tiny_gpt2: tiny.Tiny) -> None:
    tie = transformers.PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_base(tiny_gpt2.folder, name="one"), range(12)))
    assert transformers.PreTrainedModel.tie_weights is tie
    assert all(m.model.lm_head.weight is m.model.transformer.wte.weight for m in loaded)
