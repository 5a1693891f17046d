"""Arrow's mixtures: nearest prototypes, general knowledge taken off, no rows needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lorahub_registry.adapters.dynamic import FOLDER
from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.stock import stock_peft
from lorahub_registry.weights.dynamic import load_dynamic
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import weighted_sum
from tests import tiny
from tests.compose.dynamic import THREE, Made, logits, mix
from tests.compose.making import deltas, encoded


@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_arrow_sends_each_token_to_its_nearest(
    tiny_llama: tiny.Tiny, tmp_path: Path, top_k: int
) -> None:
    made = mix(tiny_llama, tmp_path / "out", {"type": "arrow", "top_k": top_k, "temperature": 0.5})
    found, experts, tensors = load_dynamic(tmp_path / "out" / FOLDER)
    assert found.router.top_k == min(top_k, 3)  # type: ignore[union-attr]
    # By the formula, on the inputs that a base with nothing else on it gives the first q_proj.
    name = "model.layers.0.self_attn.q_proj"
    module = PeftModel.from_pretrained(tiny_llama.model(), str(tmp_path / "out" / FOLDER)).eval()
    held: dict[str, torch.Tensor] = {}
    layer = module.get_base_model().get_submodule(name)
    layer.register_forward_hook(lambda _, args, out: held.update(x=args[0], y=out))
    logits(module)
    x = held["x"][0].double()
    near = (x @ tensors[f"{name}.lora_prototypes"].double().T).abs() / 0.5
    values, which = near.topk(min(top_k, 3), -1)
    c = torch.zeros_like(near).scatter(-1, which, values.softmax(-1))
    weight = tiny_llama.model().get_submodule(name).weight.double()
    expected = x @ weight.T
    for i, own in enumerate(experts):
        dense = own[name].dense().double()
        expected = expected + c[:, i : i + 1] * (x @ dense.T)
        # A prototype is the direction that the delta changes most.
        proto = tensors[f"{name}.lora_prototypes"][i].double()
        assert float((dense @ proto).norm()) == pytest.approx(
            float(torch.linalg.matrix_norm(dense, 2)), rel=1e-5
        )
    torch.testing.assert_close(held["y"][0].double(), expected, rtol=1e-4, atol=1e-4)
    assert made.made.routed is not None
    assert made.made.routed.loss == ()


@pytest.fixture(scope="module")
def known(tiny_llama: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two adapters less what a third, general one knows."""
    return mix(
        tiny_llama, tmp_path_factory.mktemp("known") / "out",
        {"type": "arrow", "general": ["plain"]}, ("wide", "plain", "rslora"),
    )  # fmt: skip


def test_general_knowledge_is_taken_off_those_that_speak(
    known: Made, tiny_llama: tiny.Tiny
) -> None:
    found, experts, _ = load_dynamic(known.out / FOLDER)
    assert found.names == ("wide", "rslora")
    general = deltas(tiny_llama, "plain")
    for name, own in zip(found.names, experts, strict=True):
        expected = weighted_sum([deltas(tiny_llama, name), general], [1.0, -1.0])
        assert own.keys() == expected.keys()
        for module, delta in expected.items():
            torch.testing.assert_close(own[module].dense(), delta.dense(), rtol=0, atol=1e-6)


def test_every_adapter_is_scored_as_it_is_and_stands_in_the_lineage(
    known: Made, tiny_llama: tiny.Tiny
) -> None:
    base = tiny_llama.base()
    batches = base.batches(encoded(base, 10)[6:])
    for kind in THREE:
        with stock_peft(base, tiny_llama.adapter(kind)) as model:
            assert known.table[kind] == pytest.approx(score(model, batches).mean, rel=1e-4)
    assert [m["name"] for m in known.facts["members"]] == ["wide", "plain", "rslora"]
    # Where both speak their shares make 1, so 1 of the general one is missing.
    assert known.made.coefficients["plain"] == pytest.approx(-1.0)


def test_the_plain_lora_of_a_general_one_is_that_of_its_coefficients(
    known: Made, tiny_llama: tiny.Tiny
) -> None:
    assert known.made.routed is not None
    found = load_deltas(known.out, read_facts(known.out))
    name = "model.layers.0.self_attn.v_proj"  # wide and plain sit there
    own = [deltas(tiny_llama, kind).get(name) for kind in ("wide", "rslora", "plain")]
    assert own[1] is None
    dense = found[name].dense()
    wide, plain = (d.dense() for d in own if d is not None)
    # c of wide is the rest of what rslora, which is there as minus the general one, has.
    solved = torch.linalg.lstsq(
        torch.stack([wide.flatten(), plain.flatten()], 1), dense.flatten()[:, None]
    )
    c, general = solved.solution.flatten().tolist()
    assert general == pytest.approx(-1.0, abs=1e-4)
    assert 0 < c < 1
    torch.testing.assert_close(c * wide - plain, dense, rtol=0, atol=1e-5)


def test_without_any_rows_arrow_is_written_and_unproven(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    made = mix(tiny_llama, tmp_path / "out", {"type": "arrow"}, train=0, test=0)
    assert made.made.proof is None
    assert made.made.change > 0
    assert "no data.train: the plain LoRA has the uniform average of the experts" in made.made.notes
    assert "static" not in made.facts["routing"]
    assert made.made.coefficients == pytest.approx(dict.fromkeys(THREE, 1 / 3))
    parts = [deltas(tiny_llama, kind) for kind in THREE]
    expected = weighted_sum(parts, [1 / 3] * 3)
    for name, delta in load_deltas(made.out, read_facts(made.out)).items():
        torch.testing.assert_close(delta.dense(), expected[name].dense(), rtol=0, atol=1e-6)
