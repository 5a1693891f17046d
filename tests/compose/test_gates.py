"""LoRA-Flow's gates, trained: against a plain loop, and nothing but the gates."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from lorahub_registry.adapters import dynamic
from lorahub_registry.compose.gates import Trained, start, train_gates
from lorahub_registry.errors import NotApplied
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.progress import silent
from lorahub_registry.recipes.routed import LoraFlow
from lorahub_registry.weights.dynamic import Origin, save_dynamic
from lorahub_registry.weights.lowrank import Deltas
from tests import tiny
from tests.compose.making import deltas, encoded

THREE = ("plain", "wide", "rslora")
RUN = {"max_steps": 4, "warmup_ratio": 0.0, "batch_size": 8, "learning_rate": 0.05}


def flow(per: str = "layer", **training: Any) -> LoraFlow:
    return LoraFlow.model_validate({"per": per, "temperature": 2.0, "training": RUN | training})


def written(
    folder: Path, base: LoadedBase, method: LoraFlow, experts: Mapping[str, Deltas]
) -> Path:
    """An untrained mixture that says the same of all its experts."""
    folder.mkdir()
    router = dynamic.LoraFlow(method.per, method.temperature)
    modules = {name for each in experts.values() for name in each}
    share = [1 / len(experts)] * len(experts)
    save_dynamic(
        folder, list(experts.values()), [Origin(name) for name in experts], router,
        start(router, dict.fromkeys(modules, share), base.model), base=base.name,
        base_revision=None, task_type=base.task_type,
    )  # fmt: skip
    return folder


def trained(
    place: Path, model: tiny.Tiny, method: LoraFlow, kinds: Sequence[str] = THREE, *,
    base: LoadedBase | None = None, seed: int = 0, rows: int = 6, **more: Any,
) -> Trained:  # fmt: skip
    base = base or model.base()
    folder = written(place, base, method, {kind: deltas(model, kind) for kind in kinds})
    return train_gates(method, base, folder, encoded(base, rows), seed=seed, **more)


class Loop:
    """The paper's formulas, adapter by adapter and without a buffer, in the base's own hooks."""

    def __init__(self, base: LoadedBase, method: LoraFlow, experts: Sequence[Deltas]) -> None:
        self.method, self.base, k = method, base, len(experts)
        self.gates: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self.now: dict[str, torch.Tensor] = {}
        layers = [(f"model.layers.{i}", m) for i, m in enumerate(base.model.model.layers)]
        seers = layers if method.per == "layer" else layers[:1] if method.per == "model" else []
        for name, layer in seers:
            self._gate(f"{name}.mixture", k, 32)
            layer.register_forward_pre_hook(self._enter(f"{name}.mixture"), with_kwargs=True)
        for name in sorted({name for each in experts for name in each}):
            module = base.model.get_submodule(name)
            place = {
                "module": name, "model": "model.layers.0.mixture",
                "layer": f"{'.'.join(name.split('.')[:3])}.mixture",
            }[method.per]  # fmt: skip
            if method.per == "module":
                self._gate(name, k, module.in_features)
            module.register_forward_hook(self._add(place, [each.get(name) for each in experts]))

    def _gate(self, place: str, k: int, width: int) -> None:
        self.gates[place] = nn.Parameter(torch.zeros(k, width)), nn.Parameter(torch.zeros(k))

    def _say(self, place: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.gates[place]
        return torch.softmax(x @ weight.T / self.method.temperature, -1) + bias

    def _enter(self, place: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            self.now[place] = self._say(place, x)

        return hook

    def _add(self, place: str, experts: Sequence[Any]) -> Any:
        def hook(_: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
            c = self._say(place, args[0]) if self.method.per == "module" else self.now[place]
            for i, delta in enumerate(experts):
                if delta is not None:
                    y = y + c[..., i : i + 1] * (args[0] @ delta.a.T @ delta.b.T)
            return y

        return hook

    def train(self, rows: Sequence[Any]) -> list[float]:
        options = self.method.training
        assert options.max_grad_norm is not None
        values = [value for gate in self.gates.values() for value in gate]
        optimizer = torch.optim.AdamW(
            values, betas=(0.9, options.adam_beta2), weight_decay=options.weight_decay
        )
        total, losses = 4, []
        for step in range(total):
            share = step / total
            optimizer.param_groups[0]["lr"] = options.learning_rate * 0.5 * (
                1 + torch.cos(torch.tensor(share * torch.pi)).item()
            )  # fmt: skip
            optimizer.zero_grad()
            count = sum(len(row.output) for row in rows)
            loss = torch.stack([self._nll(row) for row in rows]).sum() / count
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
            nn.utils.clip_grad_norm_(values, options.max_grad_norm)
            optimizer.step()
        return losses

    def _nll(self, row: Any) -> torch.Tensor:
        ids = torch.tensor([[*row.prompt, *row.output]])
        logits = self.base.model(ids).logits[0, len(row.prompt) - 1 : -1]
        return functional.cross_entropy(logits, torch.tensor(row.output), reduction="sum")


@pytest.mark.parametrize("per", ["layer", "module", "model"])
@pytest.mark.parametrize("beta2", [0.95, 0.6])
def test_gates_become_what_a_plain_loop_makes_of_them(
    tiny_llama: tiny.Tiny, tmp_path: Path, per: str, beta2: float
) -> None:
    # Eight rows a step and six rows: every step sees all, in whatever order.
    method = flow(per, adam_beta2=beta2)
    found = trained(tmp_path / "out", tiny_llama, method)
    base = tiny_llama.base()
    loop = Loop(base, method, [deltas(tiny_llama, kind) for kind in THREE])
    losses = loop.train(encoded(base, 6))
    assert [step for step, _ in found.loss] == [1, 2, 3, 4]
    assert [loss for _, loss in found.loss] == pytest.approx(losses, rel=1e-4)
    assert found.tensors.keys() == {
        f"{place}.{name}" for place in loop.gates for name in ("lora_gate", "lora_gate_bias")
    }
    moved = []
    for place, (weight, bias) in loop.gates.items():
        for ours, theirs in ((".lora_gate", weight), (".lora_gate_bias", bias)):
            moved.append(float(theirs.detach().abs().max()))
            # Adam divides by the gradient's size: where that is rounding, so is the step.
            gap = (found.tensors[place + ours] - theirs).abs()
            assert gap.quantile(0.95) < 1e-3
            assert gap.max() < 0.05
    assert sorted(moved)[len(moved) // 2] > 0.02, "they were trained"


def test_adam_beta2_decides_the_steps(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    name = "model.layers.0.mixture.lora_gate_bias"
    short, long = (
        trained(tmp_path / str(beta2), tiny_llama, flow(adam_beta2=beta2)) for beta2 in (0.5, 0.999)
    )
    first, second = ([loss for _, loss in one.loss] for one in (short, long))
    assert first[:2] == pytest.approx(second[:2], abs=1e-5), "the first step is the same for any"
    assert not torch.equal(short.tensors[name], long.tensors[name])


def state(base: LoadedBase) -> dict[str, bytes]:
    return {
        name: value.view(torch.uint8).numpy().tobytes() if value.dim() else b""
        for name, value in base.model.state_dict().items()
    }


def clean(base: LoadedBase) -> bool:
    """Nothing of a mixture is left on the base."""
    modules = list(base.model.modules())
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)
    wrapped = any("mixture" in type(m).__module__ or "peft" in type(m).__module__ for m in modules)
    return not (hooks or wrapped or hasattr(base.model, "peft_config"))


def test_experts_and_base_stay_to_the_bit(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    base = tiny_llama.base()
    before = state(base)
    found = trained(tmp_path / "out", tiny_llama, flow(), base=base)
    assert state(base) == before
    assert clean(base)
    assert not any(p.requires_grad for p in base.model.parameters())
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any("lora_A" in name or "lora_B" in name for name in found.tensors)
    assert {name.removeprefix("base_model.model.") for name in kept if "lora_gate" in name} == set(
        found.tensors
    )
    a = torch.cat([deltas(tiny_llama, kind)["model.layers.0.self_attn.q_proj"].a for kind in THREE])
    assert torch.equal(kept["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], a)


def digest(found: Trained) -> str:
    total = hashlib.sha256()
    for name, value in sorted(found.tensors.items()):
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()


def test_a_seed_decides_the_bytes(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    method = flow(batch_size=2)
    one, again, other = (
        trained(tmp_path / str(n), tiny_llama, method, seed=seed)
        for n, seed in enumerate((0, 0, 1))
    )
    assert digest(one) == digest(again)
    assert digest(one) != digest(other)


class Stop:
    """A progress whose bar of steps is interrupted at the second one."""

    def __init__(self) -> None:
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(silent, name)

    def task(self, *_: Any, **__: Any) -> Any:
        return self

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def describe(self, _: str) -> None:
        pass

    def advance(self, n: float = 1) -> None:
        self.steps += int(n)
        if self.steps == 2:
            raise KeyboardInterrupt


def test_an_interrupt_leaves_the_base_as_it_was(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    base, ids = tiny_llama.base(), torch.tensor([[1, 40, 41, 42]])
    with torch.inference_mode():
        before = base.model(ids).logits
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "out", tiny_llama, flow(), base=base, progress=Stop())
    assert clean(base)
    with torch.inference_mode():
        assert torch.equal(base.model(ids).logits, before)


def test_a_divergence_is_told(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    base, method = tiny_llama.base(), flow(learning_rate=1e9, max_steps=12)
    with pytest.raises(NotApplied, match=r"gates' training diverged: its .* at step") as caught:
        trained(tmp_path / "out", tiny_llama, method, base=base)
    assert "learning_rate" in str(caught.value.hint)
    assert clean(base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_stay_float32_on_a_half_precision_base(
    tiny_llama: tiny.Tiny, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tiny_llama.base(dtype)
    found = trained(tmp_path / "half", tiny_llama, flow(), base=base)
    full = trained(tmp_path / "full", tiny_llama, flow())
    assert {value.dtype for value in found.tensors.values()} == {torch.float32}
    for name, value in found.tensors.items():
        if name.endswith("bias"):
            torch.testing.assert_close(value, full.tensors[name], rtol=0, atol=0.05)
            assert value.abs().max() > 0.05


def test_a_gpt2_s_layers_and_a_t5_s_modules(
    tiny_gpt2: tiny.Tiny, tiny_t5: tiny.Tiny, tmp_path: Path
) -> None:
    found = trained(tmp_path / "gpt2", tiny_gpt2, flow(), ["gpt2"])
    assert {name.rpartition(".")[0] for name in found.tensors} == {
        "transformer.h.0.mixture", "transformer.h.1.mixture",
    }  # fmt: skip
    found = trained(tmp_path / "t5", tiny_t5, flow("module"), ["t5"])
    assert "decoder.block.0.layer.1.EncDecAttention.v.lora_gate" in found.tensors
    assert found.loss[-1][1] < found.loss[0][1]


@pytest.mark.parametrize("per", ["layer", "module", "model"])
def test_gates_start_at_the_coefficients_they_are_given(tiny_llama: tiny.Tiny, per: str) -> None:
    modules = sorted(deltas(tiny_llama, "wide"))
    said = {name: [0.9, -0.4] for name in modules}
    found = start(dynamic.LoraFlow(per), said, tiny_llama.model())  # type: ignore[arg-type]
    places = {"layer": 2, "module": len(modules), "model": 1}[per]
    assert len(found) == 2 * places
    for name, value in found.items():
        if name.endswith("bias"):
            torch.testing.assert_close(value + 0.5, torch.tensor([0.9, -0.4]))
        else:
            assert not value.any()
            fan_in = 48 if "down_proj" in name else 32
            assert value.shape == (2, fan_in)


def test_a_gate_of_several_modules_starts_at_their_mean_over_those_an_expert_sits_on(
    tiny_llama: tiny.Tiny,
) -> None:
    layers = "model.layers.0.self_attn", "model.layers.1.self_attn"
    said = {
        f"{layers[0]}.q_proj": [0.9, math.nan, math.nan],
        f"{layers[0]}.v_proj": [0.5, 0.2, math.nan],
        f"{layers[1]}.q_proj": [0.1, 0.3, math.nan],
    }
    found = start(dynamic.LoraFlow("layer"), said, tiny_llama.model())
    for n, expected in enumerate(([0.7, 0.2, 0.0], [0.1, 0.3, 0.0])):
        bias = found[f"model.layers.{n}.mixture.lora_gate_bias"]
        torch.testing.assert_close(bias + 1 / 3, torch.tensor(expected))
