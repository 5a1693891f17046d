"""Base models by name: which query means which model, and what a local path stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.adapters.bases import BaseName, infer_base, is_local_base

MISTRAL = "mistralai/Mistral-7B-v0.1"


def answers(query: str, model: str) -> bool:
    return BaseName.parse(model).answers(BaseName.parse(query))


def same(one: str, other: str) -> bool:
    return BaseName.parse(one).same_model(BaseName.parse(other))


@pytest.mark.parametrize(
    ("query", "model"),
    [
        ("mistral-7b", MISTRAL),
        ("mistral", MISTRAL),
        ("Mistral 7B", MISTRAL),
        ("mistral-7b-v0.1", MISTRAL),
        ("mistral-7b", "unsloth/mistral-7b-bnb-4bit"),
        ("mistral-7b", "TheBloke/Mistral-7B-v0.1-GPTQ"),
        ("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.2"),
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("llama2-7b", "meta-llama/Llama-2-7b-hf"),
        ("llama-2", "meta-llama/Llama-2-70b-hf"),
        ("qwen2.5-7b-instruct", "unsloth/Qwen2.5-7B-Instruct-bnb-4bit"),
        ("qwen-2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("gpt2", "gpt2"),
        ("gpt2", "openai-community/gpt2"),
        ("flan-t5-large", "google/flan-t5-large"),
        ("phi-1.5", "microsoft/phi-1_5"),
        ("gemma-2-9b-it", "google/gemma-2-9b-it"),
        ("llama-3.2-3b", "./models/llama-3.2-3b-base"),
    ],
)
def test_a_family_name_means_this_model(query: str, model: str) -> None:
    assert answers(query, model)


@pytest.mark.parametrize(
    ("query", "model"),
    [
        ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.2"),
        ("mistral-7b-instruct", MISTRAL),
        ("mistral-7b", "teknium/OpenHermes-2.5-Mistral-7B"),
        ("mistral-7b", "mistralai/Mixtral-8x7B-v0.1"),
        ("mistral-7b-v0.2", MISTRAL),
        ("llama-2-7b", "meta-llama/Llama-2-13b-hf"),
        ("llama-2-7b", "meta-llama/Llama-2-7b-chat-hf"),
        ("llama-3-8b", "meta-llama/Llama-2-7b-hf"),
        ("flan-t5-large", "google/flan-t5-xl"),
        ("flan-t5", "google-t5/t5-large"),
        ("7b", MISTRAL),
        ("v0.1", MISTRAL),
        ("bnb-4bit", "unsloth/mistral-7b-bnb-4bit"),
        ("", MISTRAL),
    ],
)
def test_a_family_name_does_not_mean_this_model(query: str, model: str) -> None:
    assert not answers(query, model)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (MISTRAL, "unsloth/mistral-7b-v0.1-bnb-4bit", True),
        (MISTRAL, "unsloth/mistral-7b-bnb-4bit", True),  # a mirror that dropped the version
        (MISTRAL, "/home/me/models/Mistral-7B-v0.1", True),
        (MISTRAL, "mistralai/Mistral-7B-v0.3", False),
        (MISTRAL, "mistralai/Mistral-7B-Instruct-v0.1", False),
        ("meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b-hf", True),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf", False),
        ("meta-llama/Llama-2-7b-hf", "decapoda-research/llama-7b-hf", True),
        ("stories260k", "stories260k", True),
        ("stories260k", "aidreams260k", False),
        ("7b", "7b", False),
        ("", "", False),
    ],
)
def test_two_names_may_be_of_one_model(one: str, other: str, expected: bool) -> None:
    assert same(one, other) is same(other, one) is expected


@pytest.mark.parametrize(
    ("declared", "name", "how"),
    [
        (None, None, "unknown"),
        ("", None, "unknown"),
        ("  ", None, "unknown"),
        (MISTRAL, MISTRAL, "declared"),
        ("gpt2", "gpt2", "declared"),
        ("/content/gemma3-270m", "gemma3-270m", "inferred"),
        ("./models/llama-3.2-3b-base", "llama-3.2-3b-base", "inferred"),
        ("models/llama-7b", "llama-7b", "inferred"),
        ("../llama-7b/", "llama-7b", "inferred"),
        ("~/llama-7b/checkpoint-500", "llama-7b", "inferred"),
        ("/data/llama-7b/step_100/", "llama-7b", "inferred"),
        (r"C:\models\Llama-2-7b", "Llama-2-7b", "inferred"),
        ("/x/LLM/LLAMA/7B/Transformer/", "LLAMA-7B", "inferred"),
        ("/x/modelscope/hub/models/Qwen/Qwen3-1___7B", "Qwen3-1.7B", "inferred"),
        (
            "/root/.cache/huggingface/hub/models--meta-llama--Llama-2-7b-hf/snapshots/8cca527",
            "meta-llama/Llama-2-7b-hf",
            "inferred",
        ),
        ("/kaggle/input/a/nemotron-3-nano-30b/transformers/default/1", "nemotron-3-nano-30b",
         "inferred"),
        ("/models/output/checkpoint-10", None, "unknown"),
        ("./", None, "unknown"),
        ("/", None, "unknown"),
    ],
)  # fmt: skip
def test_what_a_declared_base_means(declared: str | None, name: str | None, how: str) -> None:
    assert infer_base(declared) == (name, how)


@given(st.text(max_size=60))
def test_no_name_breaks_it(text: str) -> None:
    name, how = infer_base(text)
    assert (name is None) == (how == "unknown")
    assert BaseName.parse(text).answers(BaseName.parse(text)) in {True, False}


# The local bases of the corpus, and the model that each names.
LOCAL = {
    "/Users/halid/Desktop/Arapça HTR Eğitimi/models/sherif1313-Arabic-English-handwritten-OCR-v3":
        "sherif1313-Arabic-English-handwritten-OCR-v3",
    "/Users/yushaolong/.cache/modelscope/hub/models/Qwen/Qwen3-1___7B": "Qwen3-1.7B",
    "/content/gemma3-270m": "gemma3-270m",
    "/home/nfs01/llama/model/llama-hf/llama-7b-hf": "llama-7b-hf",
    "/home/shadeform/northstar": "northstar",
    "/home/ubuntu/Development/LLM/LLAMA/7B/Transformer/": "LLAMA-7B",
    "/kaggle/input/models/metric/nemotron-3-nano-30b-a3b-bf16/transformers/default/1":
        "nemotron-3-nano-30b-a3b-bf16",
    "/root/xtuner019/personal_assistant/model/Shanghai_AI_Laboratory/internlm-chat-7b":
        "internlm-chat-7b",
    "./models/llama-3.2-3b-base": "llama-3.2-3b-base",
}  # fmt: skip


@pytest.mark.data
def test_every_base_that_a_real_config_declares_gets_a_name(data: Path) -> None:
    local = {}
    for file in sorted((data / "configs").glob("*.json")):
        raw = json.loads(file.read_bytes())
        declared = raw.get("base_model_name_or_path") if isinstance(raw, dict) else None
        if not declared or "peft_type" not in raw:
            continue
        name, how = infer_base(declared)
        if is_local_base(declared):
            local[declared] = name
        else:
            assert (name, how) == (declared, "declared")
        assert BaseName.parse(declared).words
    assert local == LOCAL


@pytest.mark.parametrize(
    "path",
    ["/home/alice/model", "/root/checkpoint-500", "/workspace/output", "/mnt/disk1/models",
     "/content/drive/MyDrive/models", "C:\\Users\\alice\\model", "/tmp/out"],
)  # fmt: skip
def test_a_path_that_only_says_whose_machine_it_was_names_no_base(path):
    assert infer_base(path) == (None, "unknown")


@pytest.mark.parametrize(
    ("path", "name"),
    [("/home/alice/llama-7b", "llama-7b"), ("/mnt/disk1/Qwen2.5-7B", "Qwen2.5-7B"),
     ("D:\\models\\gemma-2b", "gemma-2b"), ("/kaggle/input/phi-2/pytorch/1", "phi-2")],
)  # fmt: skip
def test_a_model_below_such_a_place_is_named(path, name):
    assert infer_base(path) == (name, "inferred")
