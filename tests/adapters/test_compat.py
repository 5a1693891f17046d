"""What fits together: sums, LoraHub's factors, and the base, each refusal by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from lorahub_registry.adapters.base_files import BaseFacts, base_digest, read_base
from lorahub_registry.adapters.compat import check_base, check_factors, check_sum
from lorahub_registry.adapters.config import REFUSED
from lorahub_registry.errors import IncompatibleAdapters
from tests import tiny
from tests.adapters.making import BASE, Q, V, adapter, lora, member

SHAPES = {f"{module}.weight": (8, 8) for module in (Q, V)}


@pytest.mark.parametrize("kind", ["plain", "wide", "head", "rslora", "patterns", "embedding"])
def test_lora_of_any_rank_and_scaling_can_be_summed(tiny_llama: tiny.Tiny, kind: str) -> None:
    check_sum([member(tiny_llama.adapter(kind)), member(tiny_llama.adapter("plain"))])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("dora", "dora: DoRA scales the whole weight"),
        (
            "bias",
            "bias: it changes the base's biases, which are no low-rank deltas: bias is lora_only",
        ),
        ("lora_bias", "lora_bias: it adds a bias of its own (lora_bias)"),
        ("modules_to_save", "modules_to_save: it replaces whole modules"),
        ("ia3", "ia3: it is IA3"),
        ("adalora", "adalora: it is ADALORA"),
    ],
)
def test_what_a_sum_cannot_express_is_refused_by_name(
    tiny_llama: tiny.Tiny, kind: str, said: str
) -> None:
    plain = member(tiny_llama.adapter("plain"))
    with pytest.raises(IncompatibleAdapters) as caught:
        check_sum([plain, member(tiny_llama.adapter(kind))])
    assert str(caught.value).startswith(said)
    assert "leave it out, or merge it into the base first" in str(caught.value.hint)


def test_other_refusals_of_a_sum(tmp_path: Path) -> None:
    conv = {
        f"m.lora_{side}.weight": ("F32", [4, 4, 1, 1], bytes(64)) for side in "AB"
    }  # fmt: skip
    for name, tensors, more, said in (
        ("conv", conv, {}, "m is conv LoRA"),
        ("extra", lora() | {"model.norm.weight": ("F32", [1], bytes(4))}, {}, "holds model.norm"),
        ("pissa", lora(), {"init_lora_weights": "pissa"}, "init_lora_weights is pissa"),
        ("later", lora(), {"use_foo": True}, "use_foo, which lorareg does not know"),
        ("old", lora(), {"enable_lora": [True]}, "merged LoRA of PEFT before 0.3"),
    ):
        with pytest.raises(IncompatibleAdapters, match=said):
            check_sum([member(adapter(tmp_path / name, tensors, **more))])
    bare = adapter(tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    with pytest.raises(IncompatibleAdapters, match="no weights"):
        check_sum([member(bare)])
    (bare / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(IncompatibleAdapters, match="a pickle") as caught:
        check_sum([member(bare)])
    assert caught.value.hint == "lorareg convert k"  # what the registry finds it by


def test_a_module_of_two_shapes_is_refused_with_both_and_both_adapters(tmp_path: Path) -> None:
    one = member(adapter(tmp_path / "one"))
    wide = member(adapter(tmp_path / "wide", lora((Q, V), fan_out=16)))
    narrow = lora((Q,)) | lora((V,), fan_in=4)
    other = member(adapter(tmp_path / "other", narrow))
    same = member(adapter(tmp_path / "same", lora((Q,), rank=2), r=2))
    check_sum([one, same])
    for members, said in (
        ([one, same, wide], f"one and wide cannot be mixed: {Q} is linear 8x8 in the one and "
                            "linear 16x8"),
        ([one, other], f"one and other cannot be mixed: {V} is linear 8x8 in the one and linear "
                       "8x4"),
    ):  # fmt: skip
        with pytest.raises(IncompatibleAdapters, match=said):
            check_sum(members)


def test_whole_tensors_of_the_base_beside_the_factors_are_refused_with_the_way_out(
    tmp_path: Path,
) -> None:
    for name in ("model.embed_tokens.base_layer.weight", "lm_head.weight"):
        extra = {f"base_model.model.{name}": ("F32", [8, 8], bytes(256))}
        with pytest.raises(IncompatibleAdapters, match=f"holds base_model.model.{name}") as caught:
            check_sum([member(adapter(tmp_path / name, lora() | extra))])
        assert "save_embedding_layers=False" in (caught.value.hint or "")


PAGE = Path(__file__).resolve().parents[2] / "docs" / "algebra.md"
ON = {
    "alora_invocation_tokens": [1, 2],
    "bias": "all",
    "use_dora": True,
    "init_lora_weights": "pissa",
    "modules_to_save": ["lm_head"],
    "enable_lora": [True, False],
    "layer_replication": [[0, 2]],
    "target_parameters": ["experts.up"],
    "trainable_token_indices": [1],
}
# Rows of the page that name no key of the config: the tests above, and those of weights/files.
ELSEWHERE = (
    "whole embeddings in the file",
    "conv LoRA",
    "a switch that a later PEFT brought",
    "other kinds: IA³, AdaLoRA, LoHa…",
    "NaN or infinity",
    "a module of two shapes",
)


def page_rows(word: str) -> list[str]:
    cells = [line.split(" | ") for line in PAGE.read_text("utf-8").splitlines()]
    return [row[0].removeprefix("| ") for row in cells if len(row) > 2 and row[1] == word]


@pytest.mark.parametrize("row", page_rows("refused"))
def test_what_the_page_says_is_refused_is(tmp_path: Path, row: str) -> None:
    if row.startswith(ELSEWHERE):
        return
    (key,) = re.findall(r"\(`(\w+)`\)", row)
    values = re.findall(r"`(\w+)`", row.partition("): ")[2]) or [ON.get(key, {"some": 1})]
    for number, value in enumerate(values):
        folder = adapter(tmp_path / str(number), **{key: value})
        with pytest.raises(IncompatibleAdapters, match=key) as caught:
            check_sum([member(folder)])
        assert caught.value.hint


def test_the_page_has_a_row_for_all_that_is_refused() -> None:
    refused = " ".join(page_rows("refused"))
    assert all(f"`{key}`" in refused for key in REFUSED)
    assert all(any(row.startswith(name) for row in page_rows("refused")) for name in ELSEWHERE)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_alone_are_taken(tmp_path: Path, init: Any) -> None:
    check_sum([member(adapter(tmp_path, init_lora_weights=init))])
    [row] = [r for r in page_rows("handled") if r.startswith("inits")]
    assert isinstance(init, bool) or f"`{init}`" in row


# What PEFT's config may say, and why it does not change what B·A means.
HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "runtime_config",
    # The tensors say which modules there are.
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # Training only, or what an init was told: the init itself is looked at.
    "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
HANDLED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"}


def test_every_field_of_pefts_config_is_harmless_handled_or_refused() -> None:
    from peft import LoraConfig

    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    known = HARMLESS | HANDLED | (REFUSED.keys() - {"enable_lora"})  # of PEFT before 0.3
    assert fields - known == set(), "new in PEFT: does a sum of deltas express it?"
    assert known - fields == set(), "no longer in PEFT"


def test_factors_need_one_rank_scaling_and_set_of_targets(tmp_path: Path) -> None:
    def made(name: str, modules: tuple[str, ...] = (Q, V), rank: int = 4, **more: Any) -> Any:
        return member(adapter(tmp_path / name, lora(modules, rank=rank), r=rank, **more))

    one = made("one")
    check_factors([one])
    check_factors([one, made("two")])
    for other, said in (
        (made("rank", rank=2, lora_alpha=4), "rank 4 and 2"),
        (made("alpha", lora_alpha=16), "scaled by 2 and 4"),
        (made("rs", use_rslora=True), "scaled by 2 and 4"),
        (made("targets", (Q,)), f"only one of them adapts {V}"),
        (made("more", (Q, V, "model.x")), "only one of them adapts model.x"),
    ):
        with pytest.raises(IncompatibleAdapters, match=said) as caught:
            check_factors([one, one, other])
        assert "one and " in str(caught.value)
        assert "learn" in (caught.value.hint or "")


def test_an_adapter_fits_the_base_it_names(tmp_path: Path) -> None:
    one = member(adapter(tmp_path / "one"))
    assert check_base([one], BaseFacts(BASE, SHAPES)) == []
    assert check_base([one], BaseFacts("unsloth/mistral-7b-bnb-4bit", SHAPES)) == []
    assert check_base([one], BaseFacts(BASE)) == []


def test_another_variant_is_refused_though_its_shapes_are_the_same(tmp_path: Path) -> None:
    one = member(adapter(tmp_path / "one"))
    other = BaseFacts("mistralai/Mistral-7B-Instruct-v0.2", SHAPES)
    with pytest.raises(IncompatibleAdapters, match=f"one was made for {BASE}, not for") as caught:
        check_base([one], other)
    assert "allow_base" in (caught.value.hint or "")
    (passed,) = check_base([one], other, allow=True)
    assert passed == f"one was made for {BASE}, not for {other.name}"


def test_what_no_word_makes_fit_is_not_offered_to_be_allowed(tmp_path: Path) -> None:
    one = member(adapter(tmp_path / "one"))
    wide = BaseFacts("me/wide-7b", {f"{module}.weight": (16, 16) for module in (Q, V)})
    with pytest.raises(IncompatibleAdapters, match=f"one was made for {BASE}, not for") as caught:
        check_base([one], wide)
    assert f"one does not fit me/wide-7b: {Q} is 8x8 in the adapter and 16x16" in str(caught.value)
    assert caught.value.hint == "leave it out, or take the base that it was made for"


def test_an_adapter_that_names_no_base_is_refused(tmp_path: Path) -> None:
    one = member(adapter(tmp_path / "one"), base=None)
    with pytest.raises(IncompatibleAdapters, match="does not say which base"):
        check_base([one], BaseFacts(BASE, SHAPES))


def test_other_shapes_are_refused_even_where_the_base_is_allowed(tmp_path: Path) -> None:
    one = member(adapter(tmp_path / "one"))
    wide = BaseFacts(BASE, {**SHAPES, f"{V}.weight": (16, 8)})
    for allow in (False, True):
        with pytest.raises(IncompatibleAdapters, match=rf"{V} is 8x8 .* and 16x8 in the base"):
            check_base([one], wide, allow=allow)


def test_packed_weights_are_not_compared_by_shape(tmp_path: Path) -> None:
    one = member(adapter(tmp_path / "one"))
    assert check_base([one], BaseFacts(BASE, {f"{Q}.weight": (32, 1)})) == []


def test_a_base_that_has_none_of_the_modules_is_refused(tmp_path: Path) -> None:
    one = member(adapter(tmp_path / "one"))
    for allow in (False, True):
        with pytest.raises(IncompatibleAdapters, match=f"the base has no {Q}"):
            check_base([one], BaseFacts(BASE, {"transformer.h.0.weight": (8, 8)}), allow=allow)


def test_a_recorded_digest_decides_over_names(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "one")
    said = {"base": "me/renamed", "base_digest": "a" * 64}
    right, wrong = (BaseFacts(BASE, SHAPES, digest=d * 64) for d in "ab")
    assert check_base([member(folder, **said)], right) == []
    with pytest.raises(IncompatibleAdapters, match=r"other weights.*a{12}.*b{12}"):
        check_base([member(folder, **{**said, "base": BASE})], wrong)
    assert len(check_base([member(folder, **said)], wrong, allow=True)) == 1


@pytest.mark.data
def test_the_right_base_is_taken_and_the_wrong_one_of_the_same_width_refused(data: Path) -> None:
    names = ("zog", "arr", "upper", "shakespeare")
    folders = [data / "adapters" / "stories260k" / n for n in names]
    members = [member(f, base="stories260k") for f in folders]
    check_sum(members)
    check_factors(members)
    right = read_base(data / "models" / "stories260k")
    wrong = read_base(data / "models" / "aidreams260k")
    assert check_base(members, right) == []
    with pytest.raises(IncompatibleAdapters, match="zog was made for stories260k, not for aidre"):
        check_base(members, wrong)
    # Their shapes are the same where both have a layer, so only the name or a digest can tell.
    digests = {base_digest(data / "models" / b.name) for b in (right, wrong)}
    assert len(digests) == 2
