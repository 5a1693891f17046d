"""A file loaded over an adapter that is there: PEFT keeps the config, so it has to say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.mixlora import MixLoraConfig
from lorahub_registry.runtime.plugged import MolaConfig
from tests.mixlora import ATTENTION, MLP, STRATEGIES
from tests.runtime.moe_making import base, checkpoint, load, logits, tree

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("kind", "other", "more", "said"),
    [
        ("mixlora", "mixlora", {"top_k": 3}, "top_k is 3 and not 2"),
        ("mixlora", "mixlora", {"lora_alpha": 1}, "lora_alpha is 1 and not 8"),
        ("mixlora", "mixlora", {"use_rslora": True}, "use_rslora is True and not absent"),
        ("mixlora", "mixlora", {"act_fn": "relu"}, "act_fn is 'relu' and not 'silu'"),
        ("mixlora", "mixlora", {"expert_lora": {"r": 4, "lora_alpha": 3}}, "expert_lora is"),
        ("mixlora", "mixlora", {"experts": 3}, "num_experts is 3 and not 4"),
        ("mixlora", "mixlora-dynamic", {}, "routing_strategy is 'mixlora-dynamic'"),
        ("mixlora-dynamic", "mixlora-dynamic", {"top_p": 0.3}, "top_p is 0.3 and not 0.8"),
        ("mixlora-switch", "mixlora-switch", {"expert_capacity": 5}, "expert_capacity is 5"),
        ("mola", "mola", {"top_k": 1}, "top_k is 1 and not 2"),
        ("mola", "loramoe", {}, "peft_type is LORAMOE and not MOLA"),
        ("loramoe", "loramoe", {"lora_alpha": 2}, "lora_alpha is 2 and not 8"),
    ],
)
@torch.no_grad()
def test_what_would_compute_otherwise_is_refused(
    kind: str, other: str, more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = load(checkpoint(tmp_path, kind, seed=1))
    file, before = str(checkpoint(tmp_path, other, seed=2, **more)), logits(model)
    with pytest.raises(IncompatibleAdapters, match=said) as caught:
        model.load_adapter(file, "default")
    assert "delete_adapter('default')" in str(caught.value.hint)
    assert torch.equal(logits(model), before)
    if kind.partition("-")[0] != other.partition("-")[0]:
        return  # two PEFT types, of which a model has one
    wanted = logits(load(Path(file)))
    model.load_adapter(file, "another")
    model.set_adapter("another")
    assert torch.equal(logits(model), wanted)
    model.delete_adapter("default")
    model.load_adapter(file, "default")
    model.set_adapter("default")
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("kind", STRATEGIES)
@torch.no_grad()
def test_the_same_config_is_no_hindrance(kind: str, tmp_path: Path) -> None:
    """Nor is one that differs in what only training reads."""
    model = load(checkpoint(tmp_path, kind, seed=1), is_trainable="mix" in kind).eval()
    file = checkpoint(
        tmp_path, kind, seed=2, lora_dropout=0.2, router_loss=False, task_type="SEQ_2_SEQ_LM",
        base_model_name_or_path="elsewhere", revision="c0ffee",
    )  # fmt: skip
    before, wanted = logits(model), logits(load(file))
    model.load_adapter(str(file), "default")
    assert torch.equal(logits(model.eval()), wanted)
    assert not torch.equal(before, wanted)


@torch.no_grad()
def test_a_file_without_an_activation_means_the_bases(tmp_path: Path) -> None:
    silent = checkpoint(tmp_path, seed=2, act_fn=None)
    wanted = logits(load(silent))
    for said in ("silu", None):
        model = load(checkpoint(tmp_path, seed=1, act_fn=said))
        model.load_adapter(str(silent), "default")
        assert torch.equal(logits(model), wanted)
    model = load(checkpoint(tmp_path, seed=1, act_fn="relu"))
    with pytest.raises(IncompatibleAdapters, match="act_fn is 'silu' and not 'relu'"):
        model.load_adapter(str(silent), "default")


@torch.no_grad()
def test_one_that_was_made_here_takes_its_own_checkpoints_alone(tmp_path: Path) -> None:
    def made(**more: Any) -> Any:
        more = {"target_modules": "all-linear", "num_experts": 4, "r": 4, **more}
        return get_peft_model(base(), MixLoraConfig(task_type="CAUSAL_LM", **more)).eval()

    for number, more in enumerate(({}, {"routing_strategy": "mixlora-switch", "sparse_step": 1})):
        model, folder = made(**more), tmp_path / str(number)
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data = torch.randn_like(value) * 0.3
        model.save_pretrained(folder)
        fresh = made(**more)
        fresh.load_adapter(str(folder), "default", is_trainable=True)
        assert torch.equal(logits(fresh.eval()), logits(model))
        with pytest.raises(IncompatibleAdapters, match="lora_alpha"):
            made(**more, lora_alpha=3).load_adapter(str(folder), "default")


def test_a_config_that_was_read_is_of_that_file_alone(tmp_path: Path) -> None:
    said = MixLoraConfig.from_pretrained(str(checkpoint(tmp_path, seed=1)))
    model = get_peft_model(base(), said)
    with pytest.raises(IncompatibleAdapters, match="top_k is 3 and not 2"):
        model.load_adapter(str(checkpoint(tmp_path, seed=2, top_k=3)), "default")


@pytest.mark.parametrize(("kind", "config"), [("mixlora", MixLoraConfig), ("mola", MolaConfig)])
@torch.no_grad()
def test_a_config_given_beside_the_folder_has_to_be_its_own(
    kind: str, config: Any, tmp_path: Path
) -> None:
    one, other = checkpoint(tmp_path, kind, seed=1), checkpoint(tmp_path, kind, seed=1, top_k=3)
    said, model = config.from_pretrained(str(one)), base().requires_grad_(False)
    before = tree(model)
    with pytest.raises(IncompatibleAdapters, match="top_k is 3 and not 2"):
        load(other, model, config=said)
    assert tree(model) == before
    wanted = logits(load(other))
    assert not torch.equal(logits(load(one)), wanted)
    said = config.from_pretrained(str(one))
    said.top_k = 3  # the caller's word
    assert torch.equal(logits(load(one, config=said)), wanted)


def test_plain_lora_is_another_type(tmp_path: Path) -> None:
    plain = get_peft_model(base(), LoraConfig(target_modules=[*ATTENTION, *MLP]))
    plain.save_pretrained(tmp_path / "plain")
    model = load(checkpoint(tmp_path))
    with pytest.raises(IncompatibleAdapters, match="peft_type is LORA and not MIXLORA"):
        model.load_adapter(str(tmp_path / "plain"), "default")


@pytest.mark.parametrize("kind", ["mixlora", "mola"])
def test_pefts_hotswap_does_not_know_these_types(kind: str, tmp_path: Path) -> None:
    model, other = load(checkpoint(tmp_path, kind)), checkpoint(tmp_path, kind, top_k=3)
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        hotswap_adapter(model, str(other), "default")
