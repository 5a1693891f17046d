"""LoRA-Flow's mixtures: what is written, what it is compared with, and who is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.dynamic import FOLDER
from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.compose.encoder import Rows
from lorahub_registry.compose.fit import fit
from lorahub_registry.compose.routed import mean_coefficients
from lorahub_registry.compose.run import compose
from lorahub_registry.errors import IncompatibleAdapters, NotApplied, RecipeError
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.stock import stock_peft
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.runtime.apply import applied
from lorahub_registry.runtime.mixture import Coefficients
from lorahub_registry.weights.dynamic import load_dynamic
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import weighted_sum
from tests import tiny
from tests.compose.dynamic import IDS, SHORT, STILL, THREE, Made, logits, mix, of_folder
from tests.compose.making import deltas, encoded, member, recipe, rows

MODEL = "learned static coefficients (per model)"
LAYER = "learned static coefficients (per layer)"


@pytest.fixture(scope="module")
def flow(tiny_llama: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Three adapters of different ranks and targets under gates for each layer."""
    return mix(
        tiny_llama, tmp_path_factory.mktemp("flow") / "out",
        {"type": "lora_flow", "training": SHORT | {"learning_rate": 0.1}},
    )  # fmt: skip


def test_it_is_proven_against_all_that_is_simpler(flow: Made) -> None:
    assert flow.made.proof is not None
    assert [(row.name, row.kind) for row in flow.made.proof.table] == [
        ("base", "base"), ("plain", "adapter"), ("wide", "adapter"), ("rslora", "adapter"),
        ("uniform average", "uniform"), (MODEL, "static"), (LAYER, "static"),
        ("plain LoRA with mean coefficients", "plain"), ("mixture", "mixture"),
    ]  # fmt: skip
    assert len(set(flow.table.values())) == 9
    # The root's deltas before they were written, not the mixture's.
    assert flow.made.proof.exact_nll == pytest.approx(
        flow.table["plain LoRA with mean coefficients"], rel=1e-5
    )


def test_the_plain_lora_is_the_sum_with_the_mean_coefficients(
    flow: Made, tiny_llama: tiny.Tiny
) -> None:
    mean = flow.facts["routing"]["mean"]
    assert list(mean) == ["model.layers.0", "model.layers.1"]
    found = load_deltas(flow.out, read_facts(flow.out))
    parts = [deltas(tiny_llama, kind) for kind in THREE]
    assert found.keys() == {name for part in parts for name in part}
    for layer, said in mean.items():
        assert list(said) == list(THREE)
        own = [{n: d for n, d in part.items() if n.startswith(layer)} for part in parts]
        expected = weighted_sum(own, [said[kind] for kind in THREE])
        for name, delta in expected.items():
            torch.testing.assert_close(found[name].dense(), delta.dense(), rtol=1e-5, atol=1e-7)


def test_mean_coefficients_are_those_of_every_token(flow: Made, tiny_llama: tiny.Tiny) -> None:
    # One row at a time, so without padding, and by PEFT alone.
    model = PeftModel.from_pretrained(tiny_llama.model(), str(flow.out / FOLDER)).eval()
    sums: dict[str, list[torch.Tensor]] = {}

    def seen(_: str, module: str, c: Coefficients) -> None:
        sums.setdefault(module, []).append(c.dense(3)[0])

    with torch.inference_mode(), model.watching(seen):
        for row in encoded(flow.base, 6):
            model(torch.tensor([[*row.prompt, *row.output]]))
    for layer, said in flow.facts["routing"]["mean"].items():
        every = torch.cat(sums[f"{layer}.self_attn.q_proj"])
        assert len(set(every[:, 0].tolist())) > 3, "they differ from token to token"
        assert list(said.values()) == pytest.approx(every.mean(0).tolist(), abs=1e-5)


def test_coefficients_are_means_over_the_modules_an_adapter_sits_on(
    flow: Made, tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    said = flow.facts["routing"]["mean"].values()
    for one in flow.facts["members"]:
        layers = [layer[one["name"]] for layer in said]
        assert one["coefficient"] == pytest.approx(sum(layers) / 2)
    # An arrow's module has no word for who does not sit there: three shares make 1 where all do.
    arrow = mix(tiny_llama, tmp_path / "out", {"type": "arrow"}, test=0)
    assert sum(arrow.made.coefficients.values()) > 1.2


def test_loaded_again_it_gives_what_was_proven(flow: Made, tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    batch = base.batches(encoded(base, 10)[6:])
    with stock_peft(base, flow.out / FOLDER) as model:
        assert score(model, batch).mean == pytest.approx(flow.table["mixture"], rel=1e-5)
    assert not torch.equal(
        of_folder(tiny_llama, flow.out), of_folder(tiny_llama, flow.out / FOLDER)
    )


def test_without_our_import_the_root_loads_and_the_rest_is_refused(
    flow: Made, tiny_llama: tiny.Tiny
) -> None:
    program = f"""
import json, sys, torch, transformers
from peft import PeftModel
def base(): return transformers.AutoModelForCausalLM.from_pretrained({str(tiny_llama.folder)!r})
with torch.inference_mode():
    model = PeftModel.from_pretrained(base(), {str(flow.out)!r})
    print(json.dumps(model(torch.tensor({IDS.tolist()})).logits.flatten()[:50].tolist()))
assert "lorahub_registry" not in sys.modules
try:
    PeftModel.from_pretrained(base(), {str(flow.out / FOLDER)!r})
except Exception as error:
    print(type(error).__name__, error)
else:
    print("loaded")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/"
    )
    first, second = done.stdout.splitlines()[-2:]
    expected = of_folder(tiny_llama, flow.out).flatten()[:50]
    torch.testing.assert_close(torch.tensor(json.loads(first)), expected, rtol=0, atol=1e-4)
    assert second.startswith(("KeyError", "ValueError"))
    assert "LORA_MIXTURE" in second


def test_results_tell_how_it_came_about(flow: Made) -> None:
    routing = flow.facts["routing"]
    assert (routing["type"], routing["per"], routing["temperature"]) == ("lora_flow", "layer", 1.0)
    assert (routing["folder"], routing["peft_type"]) == ("dynamic", "LORA_MIXTURE")
    assert [step for step, _ in routing["loss"]] == [1, 2, 3]
    assert set(routing["static"]) == set(THREE)
    made, _, _ = load_dynamic(flow.out / FOLDER)
    assert made.names == THREE
    assert [expert.ref for expert in made.experts] == ["./plain", "./wide", "./rslora"]
    assert all(expert.digest and expert.sha256 for expert in made.experts)
    assert flow.out.as_posix() not in (flow.out / FOLDER / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("method", "per", "sizes"),
    [
        ({"type": "lora_flow", "training": STILL}, ["model", "layer"], [2, 4]),
        ({"type": "lora_flow", "per": "module", "training": STILL}, ["model", "module"], [2, 8]),
        ({"type": "lora_flow", "per": "model", "training": STILL}, ["model"], [2]),
        ({"type": "arrow"}, ["model", "module"], [2, 8]),
    ],
)
def test_static_coefficients_have_no_penalty_and_are_as_many_as_what_decides(
    tiny_llama: tiny.Tiny, tmp_path: Path, method: Any, per: list[str], sizes: list[int]
) -> None:
    kinds = ["plain", "same"]
    made = mix(tiny_llama, tmp_path / "out", method, kinds)
    rivals = [name for name in made.table if name.startswith("learned static")]
    assert rivals == [f"learned static coefficients (per {one})" for one in per]
    for name, learn, size in zip(rivals, made.wanted.method.rivals, sizes, strict=True):
        assert learn.l1 == 0
        wanted = made.wanted.model_copy(update={"method": learn})
        members = [member(tiny_llama.adapter(kind)) for kind in kinds]
        fitted = fit(wanted, members, made.base, encoded(made.base, 6))
        assert len(fitted.pairs) == size
        batch = made.base.batches(encoded(made.base, 10)[6:])
        with applied(made.base.model, fitted.mixture):
            assert score(made.base.model, batch).mean == pytest.approx(made.table[name], rel=1e-5)


def test_more_coefficients_than_the_rows_have_tokens_are_no_rival_and_that_is_said(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    method = {"type": "lora_flow", "per": "module", "training": STILL}
    made = mix(tiny_llama, tmp_path / "out", method, train=1)
    assert MODEL in made.table
    assert "learned static coefficients (per module)" not in made.table
    [said] = [note for note in made.made.notes if "to compare with" in note]
    assert said.startswith("no learned static coefficients (per module) to compare with: per: mod")


@pytest.mark.parametrize("per", ["layer", "module", "model"])
def test_it_starts_as_one_adapter_where_it_is_told_to(
    tiny_llama: tiny.Tiny, tmp_path: Path, per: str
) -> None:
    method = {"type": "lora_flow", "per": per, "init": "wide", "training": STILL}
    made = mix(tiny_llama, tmp_path / "out", method)
    alone = of_folder(tiny_llama, tiny_llama.adapter("wide"))
    found = of_folder(tiny_llama, tmp_path / "out" / FOLDER)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-4)
    assert made.made.coefficients == pytest.approx({"plain": 0, "wide": 1, "rslora": 0}, abs=1e-6)
    assert made.table["mixture"] == pytest.approx(made.table["wide"], rel=1e-5)


ENOUGH = {"model": 1, "layer": 20, "module": 64}
"""Rows whose outputs have ten tokens for each coefficient."""


@pytest.mark.parametrize("per", ["layer", "module", "model"])
def test_it_starts_as_the_static_mixture_that_it_has_to_beat(
    tiny_llama: tiny.Tiny, tmp_path: Path, per: str
) -> None:
    method = {"type": "lora_flow", "per": per, "training": STILL}
    made = mix(tiny_llama, tmp_path / "out", method, train=ENOUGH[per])
    rival = MODEL.replace("(per model)", f"(per {per})")
    assert made.table["mixture"] == pytest.approx(made.table[rival], rel=1e-5)
    if per == "model":
        assert made.made.coefficients == pytest.approx(made.facts["routing"]["static"], abs=1e-5)
    else:
        assert made.table[rival] != pytest.approx(made.table[MODEL], rel=1e-4)


def test_it_starts_as_the_next_coarser_one_where_that_cannot_be_learned(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    method = {"type": "lora_flow", "per": "module", "training": STILL}
    made = mix(tiny_llama, tmp_path / "out", method, train=1)  # too few rows for one a module
    assert made.table["mixture"] == pytest.approx(made.table[MODEL], rel=1e-5)


def test_it_starts_as_the_next_coarser_one_where_rows_are_too_few_to_trust_it(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    method = {"type": "lora_flow", "training": STILL}
    made = mix(tiny_llama, tmp_path / "out", method, train=ENOUGH["layer"] // 2)
    assert made.table["mixture"] == pytest.approx(made.table[MODEL], rel=1e-5)
    assert made.table["mixture"] != pytest.approx(made.table[LAYER], rel=1e-4)
    [said] = [note for note in made.made.notes if "coarser" in note]
    assert said.startswith(f"the gates start with coarser coefficients than {LAYER}: 6 of them")


def test_uniform_is_uniform(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    made = mix(
        tiny_llama, tmp_path / "out", {"type": "lora_flow", "init": "uniform", "training": STILL}
    )
    assert made.table["mixture"] == pytest.approx(made.table["uniform average"], rel=1e-5)


def test_one_row_is_enough_and_what_it_cannot_tell_is_said(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    made = mix(tiny_llama, tmp_path / "out", {"type": "lora_flow"}, train=1)
    assert len(made.facts["routing"]["loss"]) == 5, "five epochs of one row"


def test_where_nothing_static_can_be_learned_it_starts_uniform_and_says_so(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    # So faint that float32 tells no loss with them from one without.
    members = []
    for kind in ("plain", "same"):
        folder = Path(shutil.copytree(tiny_llama.adapter(kind), tmp_path / kind))
        file = folder / "adapter_model.safetensors"
        faint = {k: v * (1e-6 if "lora_B" in k else 1) for k, v in load_file(file).items()}
        save_file(faint, file, metadata={"format": "pt"})
        members.append(member(folder))
    out = tmp_path / "out"
    out.mkdir()
    wanted = recipe({"type": "lora_flow", "training": STILL}, ["./plain", "./same"])
    made = compose(wanted, members, tiny_llama.base(), Rows(rows(6), rows(8)[6:]), out)
    assert made.proof is not None
    assert "static" not in {row.kind for row in made.proof.table}
    assert made.coefficients == pytest.approx({"plain": 0.5, "same": 0.5})
    [model, layer, start] = made.notes
    assert model.startswith(f"no {MODEL} to compare with: no mixture is")
    assert layer.startswith(f"no {LAYER} to compare with: no mixture is")
    assert start == "the gates start with the uniform average"


def test_the_experts_are_written_in_the_dtype_that_is_asked_for(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    made = mix(
        tiny_llama, tmp_path / "out", {"type": "lora_flow", "training": SHORT},
        output={"dtype": "bfloat16"}, dtype=torch.bfloat16,
    )  # fmt: skip
    kept = load_file(made.out / FOLDER / "adapter_model.safetensors")
    assert {str(v.dtype) for k, v in kept.items() if "lora_A" in k} == {"torch.bfloat16"}
    assert {str(v.dtype) for k, v in kept.items() if ".lora_gate" in k} == {"torch.float32"}
    assert made.made.change > 0


def test_heads_have_gates_of_their_own(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    method = {"type": "lora_flow", "per": "module", "training": SHORT | {"learning_rate": 0.1}}
    made = mix(tiny_llama, tmp_path / "out", method, ["plain", "head"])
    mean = made.facts["routing"]["mean"]
    assert list(mean) == ["", "model.layers.0", "model.layers.1"]
    assert mean[""]["plain"] == 0, "it does not sit there"
    expected = weighted_sum([deltas(tiny_llama, "head")], [mean[""]["head"]])["lm_head"]
    found = load_deltas(made.out, read_facts(made.out))["lm_head"]
    torch.testing.assert_close(found.dense(), expected.dense(), rtol=1e-5, atol=1e-7)


def test_a_seq2seq_model_s_gates_and_their_means(
    tiny_t5: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.OTHERS, "small", ("Lora", tiny.OTHERS["t5"][1] | {"r": 2}))
    method = {"type": "lora_flow", "per": "module", "training": SHORT | {"learning_rate": 0.1}}
    made = mix(tiny_t5, tmp_path / "out", method, ["t5", "small"])
    assert made.table["mixture"] != made.table["plain LoRA with mean coefficients"]
    # As many tokens for the encoder as for the decoder: padding alone tells the sides apart.
    some = [Encoded([5, 6, 7, 8, 9, 2], [10, 11, 2]), Encoded([12, 13, 2], [9, 8, 7, 6, 5, 2])]
    both = mean_coefficients(made.base, made.out / FOLDER, some, 2)
    alone = [mean_coefficients(made.base, made.out / FOLDER, [row], 2) for row in some]
    for name, found in both.items():
        cross = "EncDecAttention.v" in name
        encoder = name.startswith("encoder") or cross
        counts = [6, 3] if encoder else [3, 6]
        expected = sum(n * one[name] for n, one in zip(counts, alone, strict=True)) / 9
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "kinds", "error", "said"),
    [
        ({"type": "lora_flow"}, ["plain", "head"], IncompatibleAdapters,
         "head: lm_head is in no layer"),
        ({"type": "lora_flow", "per": "model"}, ["plain", "head"], IncompatibleAdapters,
         "head: lm_head is in no layer"),
        ({"type": "lora_flow", "per": "module"}, ["plain", "embedding"], IncompatibleAdapters,
         "embedding: model.embed_tokens is an embedding"),
        ({"type": "arrow"}, ["plain", "embedding"], IncompatibleAdapters,
         "embedding: model.embed_tokens is an embedding"),
    ],
)  # fmt: skip
def test_places_that_no_expert_can_have_are_refused_before_anything_is_learned(
    tiny_llama: tiny.Tiny, tmp_path: Path, method: Any, kinds: Any, error: Any, said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        mix(tiny_llama, tmp_path / "out", method, kinds)
    assert caught.value.hint
    assert list((tmp_path / "out").iterdir()) == []


def test_cross_attention_wants_gates_of_its_own(
    tiny_t5: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.OTHERS, "small", ("Lora", tiny.OTHERS["t5"][1] | {"r": 2}))
    with pytest.raises(IncompatibleAdapters, match=r"t5: decoder.*EncDecAttention") as caught:
        mix(tiny_t5, tmp_path / "out", {"type": "lora_flow"}, ["t5", "small"])
    assert "per: module" in str(caught.value.hint)


def test_one_that_a_search_left_alone_is_refused(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    wanted = recipe({"type": "lora_flow"}, [{"search": {"skill": "code"}, "limit": 2}])
    with pytest.raises(RecipeError, match="chooses among two or more adapters, and there is 1"):
        compose(
            wanted, [member(tiny_llama.adapter("plain"))], tiny_llama.base(), Rows(rows(4)), out
        )


def test_a_divergence_leaves_nothing_on_the_base(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    base, out = tiny_llama.base(), tmp_path / "out"
    out.mkdir()
    before = logits(base.model)
    wanted = recipe(
        {"type": "lora_flow", "training": {"learning_rate": 1e9, "max_steps": 12}},
        ["./plain", "./wide"],
    )
    members = [member(tiny_llama.adapter(kind)) for kind in ("plain", "wide")]
    with pytest.raises(NotApplied, match="diverged"):
        compose(wanted, members, base, Rows(rows(4), rows(4)), out)
    assert torch.equal(logits(base.model), before)


def test_adapters_larger_than_memory_are_refused_before_they_are_read(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    wanted = recipe({"type": "arrow"}, [{"ref": f"./{kind}", "name": kind} for kind in THREE])
    members = [member(tiny_llama.adapter(kind)) for kind in THREE]
    members[1] = replace(members[1], facts=replace(members[1].facts, parameters=10**14))
    with pytest.raises(IncompatibleAdapters, match=r"the 3 adapters take 400000\.. GB"):
        compose(wanted, members, tiny_llama.base(), Rows(), tmp_path)
    assert not list(tmp_path.iterdir())
