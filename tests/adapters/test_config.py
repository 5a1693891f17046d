"""``adapter_config.json``: what every age of PEFT wrote is read; everything else is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.adapters.config import parse_config
from lorahub_registry.errors import BrokenAdapter, ForeignFormat, LoraregError
from tests.adapters.making import config, fields

SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def test_a_plain_config_is_read() -> None:
    found = config()
    assert found.peft_type == "LORA"
    assert (found.r, found.lora_alpha) == (4, 8.0)
    assert found.targets == ("q_proj", "v_proj")
    assert found.unsupported == ()
    assert found.scaling_of("model.layers.0.self_attn.q_proj", 4) == 2.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", -5),
        ("r", 10**9),
        ("r", 10**4000),
        ("r", True),
        ("r", [8]),
        ("r", "8"),
        ("r", 4.5),
        ("lora_alpha", True),
        ("lora_alpha", [16]),
        ("lora_alpha", 1e30),
        ("lora_alpha", 10**4000),
        ("use_rslora", "yes"),
        ("use_dora", 1),
        ("target_modules", 7),
        ("target_modules", [["q_proj"]]),
        ("modules_to_save", {"a": 1}),
        ("base_model_name_or_path", ["a"]),
        ("base_model_name_or_path", "a\0b"),
        ("base_model_name_or_path", "\ud800"),
        ("base_model_name_or_path", "x" * 5000),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": None}),
        ("rank_pattern", {"q_proj": [4]}),
        ("alpha_pattern", {"q_proj": True}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": "NaN"}),
        ("alpha_pattern", {"(": 4}),
        ("alpha_pattern", {"(?i)q_proj": 4}),
        ("alpha_pattern", {"a{99999999999}": 4}),
    ],
)
def test_a_value_that_no_peft_meant_is_refused_by_its_key(key: str, value: Any) -> None:
    with pytest.raises(BrokenAdapter, match=f"^here: {key} ") as caught:
        config(**{key: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_number_that_is_none_is_refused(key: str, number: str) -> None:
    with pytest.raises(BrokenAdapter):
        parse_config(f'{{"peft_type": "LORA", "{key}": {number}}}', where="here")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(a*)*b",
        "((a|b)+)?c",
        "(a|a)" * 40 + "b",
        "(a|aa)" * 40 + "b",
        "a?" * 60 + "a" * 60,
        ".*" * 20,
        "a+" * 20,
        r"\d*" * 20,
        r"\\*" * 20,
        "a{0,50}" * 20,
        "a{,50}" * 20,
        "(?x:(a+)#c\n*)",
        "(a+)(?#c)*",
        "x" * 300,
    ],
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_may_never_end_is_refused(key: str, pattern: str) -> None:
    with pytest.raises(BrokenAdapter, match="may never end"):
        config(**{key: {pattern: 4}})


def test_patterns_that_people_write_are_taken() -> None:
    for pattern in (
        "q_proj",
        "model.layers.0.self_attn.q_proj",
        "^model.layers.0.self_attn.q_proj",
        r"model\.layers\.\d+\.self_attn\.(q|k)_proj",
        r".*layers\.(0|1|2)\.(self_attn|mlp)\.(q|up)_proj",
        r".*\.layers\..*\.self_attn\..*",
        r"(?:gate|up)_proj",
    ):
        assert config(rank_pattern={pattern: 2}).rank_pattern == {pattern: 2}


def test_the_regular_expression_of_target_modules_is_kept_and_never_run() -> None:
    bomb = "(a+)+" * 50
    found = config(target_modules=bomb)
    assert found.targets == ()
    assert found.target_regex == bomb


@pytest.mark.parametrize(
    ("value", "targets"),
    [
        (["v_proj", "q_proj", "q_proj"], ("q_proj", "v_proj")),
        ("query_key_value", ("query_key_value",)),
        ({"q_proj": True, "v_proj": True, "k_proj": False}, ("q_proj", "v_proj")),
        ("all-linear", ("all-linear",)),
        (None, ()),
    ],
)
def test_target_modules_of_every_age(value: Any, targets: tuple[str, ...]) -> None:
    assert config(target_modules=value).targets == targets


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"fine_tune_type": "lora", "num_layers": 8}, "MLX"),
        ({"lora_parameters": {"rank": 8}}, "MLX"),
        ({"config": {}, "model_class": "BertModel"}, "AdapterHub"),
        ({"_class_name": "UNet2DConditionModel"}, "diffusers"),
        ({"base_model": "lerobot/smolvla_base"}, "no 'peft_type'"),
        ({}, "nothing"),
        ({"peft_type": None}, "no 'peft_type'"),
        ({"peft_type": 7}, "no 'peft_type'"),
    ],
)
def test_another_tools_file_is_refused_by_that_tools_name(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ForeignFormat, match=said):
        parse_config(json.dumps(raw), where="here")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", "[" * 100_000, b"\xff\xfe\x00", " " * (1 << 21), "{'a': 1}"],
)
def test_what_is_no_json_object_is_refused(text: str | bytes) -> None:
    with pytest.raises(BrokenAdapter):
        parse_config(text, where="here")


@pytest.mark.parametrize(
    ("more", "feature"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"enable_lora": [True, False, True]}, "enable_lora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.gate"]}, "target_parameters"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
    ],
)
def test_what_a_sum_cannot_express_is_named(more: dict[str, Any], feature: str) -> None:
    assert config(**more).unsupported == (feature,)


def test_features_that_are_off_are_not_named() -> None:
    off = {
        "use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None,
        "enable_lora": None, "init_lora_weights": "gaussian", "layer_replication": None,
    }  # fmt: skip
    assert config(**off).unsupported == ()


def test_an_adalora_mask_is_no_rank_pattern() -> None:
    mask = {"base_model.model.q.lora_E": [True, False]}
    found = config(peft_type="ADALORA", rank_pattern=mask)
    assert found.peft_type == "ADALORA"
    assert found.rank_pattern == {}


def test_a_config_without_alpha_has_the_alpha_that_peft_gives_it() -> None:
    import peft

    raw = {k: v for k, v in fields().items() if k != "lora_alpha"}
    found = parse_config(json.dumps(raw), where="here")
    assert found.alpha_of("q_proj") == peft.LoraConfig().lora_alpha


def test_the_first_pattern_that_matches_the_end_of_a_name_counts() -> None:
    found = config(
        rank_pattern={"0.q_proj": 2, "q_proj": 3, "roj": 9, "^k_proj": 5},
        alpha_pattern={"q_proj": 1},
    )
    assert found.rank_of("model.layers.0.q_proj") == 2
    assert found.rank_of("model.layers.1.q_proj") == 3
    assert found.rank_of("model.layers.1.k_proj") == 4
    assert found.rank_of("k_proj") == 5
    assert found.alpha_of("model.layers.1.q_proj") == 1
    assert found.alpha_of("model.layers.1.v_proj") == 8


@given(
    names=st.lists(
        st.sampled_from(
            [
                "q_proj",
                "0.q_proj",
                "layers.1",
                "^model.q",
                "q.proj",
                r".*\.1\..*",
                "(q|k)_proj",
                "x",
            ]
        ),
        unique=True,
    ),
    module=st.sampled_from(
        [
            "model.layers.0.q_proj",
            "model.layers.1.k_proj",
            "q_proj",
            "model.q",
            "layers.1",
            "aq_proj",
        ]
    ),
)
def test_patterns_match_as_pefts_own_do(names: list[str], module: str) -> None:
    from peft.utils.other import get_pattern_key

    patterns = {name: n + 20 for n, name in enumerate(names)}
    found = config(rank_pattern=patterns)
    assert found.rank_of(module) == patterns.get(get_pattern_key(patterns.keys(), module), 4)


@given(st.sampled_from(sorted({*fields(), "rank_pattern", "alpha_pattern", "bias"})), ANYTHING)
def test_no_value_of_any_key_raises_anything_else(key: str, value: Any) -> None:
    try:
        config(**{key: value}).scaling_of("model.q_proj", 4)
    except LoraregError:
        pass


@given(ANYTHING)
def test_no_json_raises_anything_else(value: Any) -> None:
    with pytest.raises(LoraregError):
        parse_config(json.dumps(value), where="here")


# What the corpus holds that is no PEFT adapter, and whose it is.
FOREIGN = {
    "AnHu2410__MD_crosslingual__1": "AdapterHub",
    "Inishpy__lerobot-libero__1": "no 'peft_type' (it has 'base_model')",
    **dict.fromkeys(
        [
            "RoyK0108__amc-tutor-study__1",
            "RoyK0108__amc-tutor-study__2",
            "deboradum__SouthParkDataset__1",
            "egarim__poisoned-code-model__1",
            "jonatannietoa__create-solar-company-slm__1",
            "openatlaspro-AI__mlx-lora-finetune__1",
            "rohitguta2432__tinyvoice__1",
            "softwarewrighter__engram-poc__1",
            "tanishsidhu__payload-gen__1",
            "vishal-adithya__FineTune-DebateBots__1",
        ],
        "MLX",
    ),
}


@pytest.mark.data
def test_every_real_config_is_read_or_refused_by_its_formats_name(data: Path) -> None:
    files = [f for f in sorted((data / "configs").glob("*.json")) if f.name != "MANIFEST.json"]
    assert len(files) == 67
    kinds: Counter[str] = Counter()
    refused = {}
    for file in files:
        try:
            found = parse_config(file.read_bytes(), where=file.name)
        except ForeignFormat as error:
            refused[file.stem] = str(error)
        else:
            kinds[found.peft_type] += 1
            assert found.base
    assert refused.keys() == FOREIGN.keys()
    for name, words in FOREIGN.items():
        assert words in refused[name]
    assert kinds == {"LORA": 54, "PROMPT_TUNING": 1}
