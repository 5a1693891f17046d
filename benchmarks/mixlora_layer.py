"""MixLoRA against its authors' package: one layer, a whole model, a training step, memory.

Claim: one feed-forward module with 8 experts of rank 16, 2 of them a token, gives what ``mixlora``
0.2.3 gives to 1e-5 and is at least 1.2, 1.6, 1.4 and 1.3 times faster at 1, 16, 128 and 512 tokens,
CPU time at one thread.

    pip install --no-deps mixlora==0.2.3
    python benchmarks/mixlora_layer.py

1. **Layers**: ours, the package's, and the naive form (each expert a feed-forward module of its own
   on its own tokens), without gradients.
2. **Models**: a random Llama of four layers, one forward.
3. **Training**: forward and backward of one layer, gradients to the tokens, the router and all
   factors; the bytes that lie from forward to backward, and how far the resident memory of a
   process grows that sends tokens eight times through it and back.
4. **DoRA**: experts with magnitudes over those without, ours (the package cannot load magnitudes).

The package's experts drop out even in evaluation; that is taken off, and ours is in evaluation, so
both sides compute the same. On a GPU the base is bfloat16 and one shape of a 7B model is measured.
There the package's factors and router are bfloat16, too, and ours float32, so results differ more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import peft
import torch
import transformers
from mixlora import inject_adapter_in_model, load_adapter_weights
from torch.nn import functional

import lorahub_registry.runtime  # noqa: F401
from lorahub_registry.adapters.mixlora import parse_mixlora
from lorahub_registry.weights.mixlora import write_mixlora, write_mlora

EXPERTS, RANK, TOP_K = 8, 16, 2
DEPTH = 8
TO_REACH = {1: 1.2, 16: 1.6, 128: 1.4, 512: 1.3}
TARGETS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Sides:
    """One checkpoint on equal bases: the models, and their first feed-forward modules."""

    ours: Any
    peer: Any
    layer: Any
    peer_layer: Any

    def peers_factors(self) -> list[torch.Tensor]:
        """What trains in the package's first layer."""
        experts = self.peer_layer.mixlora_moes["default"]
        found = [p for e in experts.experts_.values() for p in (e.lora_A.weight, e.lora_B.weight)]
        return [experts.gate_, *found]


def llama(width: int, inner: int, layers: int, args: Any) -> Any:
    """A random one."""
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return model.to(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)


def write(folder: Path, width: int, inner: int, layers: int, args: Any, *, dora: bool) -> None:
    """A random checkpoint."""
    made = torch.Generator().manual_seed(args.seed)
    config = {
        "peft_type": "MIXLORA", "routing_strategy": "mixlora", "task_type": "CAUSAL_LM", "r": RANK,
        "lora_alpha": 2 * RANK, "lora_dropout": 0.05, "num_experts": EXPERTS, "top_k": TOP_K,
        "act_fn": "silu", "target_modules": list(TARGETS), "base_model_name_or_path": "random",
        **({"use_dora": True} if dora else {}),
    }  # fmt: skip
    tensors = {}
    for i in range(layers):
        start = f"mixlora.layers.{i}.mlp"
        gate = torch.randn(EXPERTS, width, generator=made) * width**-0.5
        tensors[f"{start}.moe_gate.weight"] = gate
        for name in TARGETS:
            fan_in, fan_out = (inner, width) if name == "down_proj" else (width, inner)
            for e in range(EXPERTS):
                stem = f"{start}.{name}.experts.{e}"
                a = torch.randn(RANK, fan_in, generator=made)
                b = torch.randn(fan_out, RANK, generator=made)
                tensors[f"{stem}.lora_A.weight"] = a * 0.02
                tensors[f"{stem}.lora_B.weight"] = b * 0.02
                if dora:
                    tensors[f"{stem}.lora_magnitude_vector"] = torch.rand(fan_out, generator=made)
    mix = parse_mixlora(config, "random")
    (write_mixlora if dora else write_mlora)(folder, mix, tensors)


def loaded(folder: Path, width: int, inner: int, layers: int, args: Any) -> Any:
    """As PEFT loads it, and its first layer."""
    model = peft.PeftModel.from_pretrained(llama(width, inner, layers, args), str(folder)).eval()
    return model, model.base_model.model.model.layers[0].mlp


def sides(width: int, inner: int, layers: int, args: Any) -> Sides:
    """Both, on the same random checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), width, inner, layers, args, dora=False)
        ours, layer = loaded(Path(name), width, inner, layers, args)
        peer = llama(width, inner, layers, args)
        config, weights = load_adapter_weights(name, device=args.device, dtype=peer.dtype)
    inject_adapter_in_model(peer, config, weights)
    for each in peer.model.layers:
        for expert in each.mlp.mixlora_moes["default"].experts_.values():
            expert.dropout_.p = 0.0
    return Sides(ours, peer, layer, peer.model.layers[0].mlp)


def naive(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Each expert a feed-forward module of its own."""
    held, base = layer.lora_experts["default"], layer.base_layer

    def linear(name: str, x: torch.Tensor, e: int) -> torch.Tensor:
        a, b = getattr(held, f"{name}_A")[e], getattr(held, f"{name}_B")[e]
        found: torch.Tensor = getattr(base, name)(x)
        return found + 2 * (x.to(a) @ a.T @ b).to(x)

    def run(x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, which = functional.linear(flat.float(), held.gate).softmax(-1).topk(TOP_K)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e in range(EXPERTS):
            token, place = (which == e).nonzero(as_tuple=True)
            if len(token):
                seen = flat[token]
                inner = functional.silu(linear("gate_proj", seen, e)) * linear("up_proj", seen, e)
                part = linear("down_proj", inner, e) * weights[token, place, None].to(x)
                out.index_add_(0, token, part)
        return out.view_as(x)

    return run


def compared(
    runs: dict[str, Callable[[], Any]], args: Any, turns: int, *, over: float | None = None
) -> common.Json:
    """Times of all sides, once they give what ``ours`` gives."""
    results = {name: run() for name, run in runs.items()}
    near = 1e-5 if args.device == "cpu" else 5e-2
    facts: common.Json = {}
    for name, found in results.items():
        if name != "ours" and isinstance(found, torch.Tensor):
            far = float((found - results["ours"]).abs().max() / found.abs().max())
            facts[f"difference_from_{name}"] = common.rounded(far)
            if far > near:
                raise SystemExit(f"ours and {name} differ by {far}")
    wait = torch.cuda.synchronize if args.device == "cuda" else None
    samples = common.alternate(runs, turns=turns, warmup=2, wait=wait)
    side = "wall" if args.device == "cuda" else "cpu"
    for name, sample in samples.items():
        facts[name] = sample.json()
        if name != "ours":
            facts[f"ours_over_{name}"] = common.ratios(samples["ours"], sample)
            facts[f"{name}_over_ours"] = common.rounded(
                1 / facts[f"ours_over_{name}"][side]["median"]
            )
    if over is not None:
        facts["judged"] = common.judged(facts["ours_over_peer"][side]["median"], 1 / over)
    return facts


def tokens_of(tokens: int, width: int, both: Sides, args: Any) -> torch.Tensor:
    """Random ones of a layer."""
    made = torch.Generator().manual_seed(args.seed)
    x = torch.randn(1, tokens, width, generator=made)
    return x.to(args.device, both.peer.dtype)


@torch.no_grad()
def layer(both: Sides, width: int, tokens: int, args: Any, turns: int) -> common.Json:
    """One layer, without gradients."""
    x, plain = tokens_of(tokens, width, both, args), naive(both.layer)
    runs = {
        "ours": lambda: both.layer(x), "peer": lambda: both.peer_layer(x), "naive": lambda: plain(x)
    }  # fmt: skip
    return {"tokens": tokens} | compared(runs, args, turns, over=TO_REACH.get(tokens))


def training_steps(
    both: Sides, width: int, tokens: int, args: Any, depth: int = 1
) -> dict[str, Any]:
    """Forward and backward of each side: the result, or with ``saved``, bytes kept between.

    Args:
        depth: how often the layer's result goes through it again, as through layers of a model.
    """
    x = tokens_of(tokens, width, both, args).requires_grad_()
    gradient = torch.randn_like(x)
    ours = list(both.layer.lora_experts.parameters())
    factors = {"ours": ours, "peer": both.peers_factors()}
    for model in (both.ours, both.peer):
        for value in model.parameters():
            value.requires_grad_(False)
    for value in factors["ours"] + factors["peer"]:
        value.requires_grad_(True)
    lasting = (x, *both.layer.parameters(), *both.peer.parameters(), *factors["peer"])
    held = {each.untyped_storage().data_ptr() for each in lasting}

    def step(side: str, saved: bool = False) -> Any:
        module, kept = both.layer if side == "ours" else both.peer_layer, dict[int, int]()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = module(x)
            for _ in range(depth - 1):
                y = y + module(y)
        found = torch.autograd.grad(y, [x, *factors[side]], gradient)
        return sum(kept.values()) if saved else torch.cat([y.detach(), found[0]])

    return {"ours": lambda **kw: step("ours", **kw), "peer": lambda **kw: step("peer", **kw)}


def training(both: Sides, width: int, inner: int, tokens: int, args: Any, turns: int) -> Any:
    """A layer's step, and its memory."""
    steps = training_steps(both, width, tokens, args)
    facts = {"tokens": tokens} | compared(steps, args, turns)
    facts["saved_bytes"] = {name: step(saved=True) for name, step in steps.items()}
    if args.device == "cuda":
        deep = training_steps(both, width, tokens, args, DEPTH)
        facts["peak_bytes"] = {name: common.peak_on_gpu(step) for name, step in deep.items()}
    else:
        facts["peak_bytes"] = {
            name: in_a_process(name, width, inner, tokens, args) for name in steps
        }
    for kind in ("saved_bytes", "peak_bytes"):
        facts[f"{kind}_peer_over_ours"] = common.rounded(
            facts[kind]["peer"] / max(facts[kind]["ours"], 1)
        )
    return facts


def in_a_process(side: str, width: int, inner: int, tokens: int, args: Any) -> int:
    """By how many bytes the resident memory grows in three steps, alone in a process."""
    sizes = ["--alone", side, str(width), str(inner), str(tokens)]
    options = ["--seed", str(args.seed), "--threads", str(args.threads)]
    done = subprocess.run(
        [sys.executable, __file__, *sizes, *options], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def alone(args: Any) -> None:
    """What :func:`in_a_process` starts."""
    side, width, inner, tokens = args.alone[0], *map(int, args.alone[1:])
    both = sides(width, inner, 1, args)
    step = training_steps(both, width, tokens, args, DEPTH)[side]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, loading's, is forgotten
    before = resident_peak()
    for _ in range(3):
        step()
    print(json.dumps(resident_peak() - before))


def resident_peak() -> int:
    """Bytes, since it was last forgotten (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@torch.no_grad()
def dora(both: Sides, width: int, inner: int, args: Any, turns: int) -> list[common.Json]:
    """Experts with magnitudes over those without."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), width, inner, 1, args, dora=True)
        _, scaled = loaded(Path(name), width, inner, 1, args)
    found = []
    for tokens in (1, 128):
        x = tokens_of(tokens, width, both, args)
        samples = common.alternate(
            {"dora": lambda x=x: scaled(x), "plain": lambda x=x: both.layer(x)}, turns=turns,
            warmup=2, wait=torch.cuda.synchronize if args.device == "cuda" else None,
        )  # fmt: skip
        ratio = common.ratios(samples["dora"], samples["plain"])
        found.append({"tokens": tokens, "dora_over_plain": ratio})
    return found


@torch.no_grad()
def whole(width: int, inner: int, args: Any, turns: int) -> common.Json:
    """A model of four layers, one forward of 1 and of 128 tokens."""
    both, found = sides(width, inner, 4, args), []
    for tokens in (1, 128):
        ids = torch.randint(3, 512, (1, tokens), device=args.device)
        runs = {
            "ours": lambda ids=ids: both.ours(input_ids=ids, use_cache=False).logits,
            "peer": lambda ids=ids: both.peer(input_ids=ids, use_cache=False).logits,
        }
        found.append({"tokens": tokens} | compared(runs, args, turns))
    return {"width": width, "inner": inner, "layers": 4, "forward": found}


def main(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    if args.alone:
        alone(args)
        return
    packages = ("torch", "transformers", "peft", "mixlora")
    facts: common.Json = {
        "benchmark": "mixlora_layer", "experts": EXPERTS, "rank": RANK, "top_k": TOP_K,
        "environment": common.environment(packages, threads=args.threads, seeds={"all": args.seed}),
        "layers": [],
    }  # fmt: skip
    turns = 3 if args.quick else args.turns
    shapes = [(4096, 11008)] if args.device == "cuda" else [(1024, 2816), (2048, 5632)]
    shapes = [(256, 704)] if args.quick else shapes
    for width, inner in shapes:
        both = sides(width, inner, 1, args)
        part: common.Json = {"width": width, "inner": inner, "forward": [], "training": []}
        for tokens in (1, 16) if args.quick else (1, 16, 128, 512, 2048):
            times = turns * (4 if tokens <= 16 else 1)
            part["forward"].append(layer(both, width, tokens, args, times))
            say(f"{width} wide, {tokens} tokens", part["forward"][-1])
        part["dora"] = dora(both, width, inner, args, turns)
        for tokens in (16,) if args.quick else (128, 512, 2048):
            part["training"].append(training(both, width, inner, tokens, args, turns))
            say(f"{width} wide, training on {tokens} tokens", part["training"][-1])
        facts["layers"].append(part)
        for each in part["dora"]:
            ratio = each["dora_over_plain"]["cpu"]["median"]
            print(f"{width} wide, {each['tokens']} tokens: DoRA takes {ratio:.2f} of plain")
    facts["model"] = whole(*shapes[0], args, turns)
    for each in facts["model"]["forward"]:
        say(f"model of 4 layers, {each['tokens']} tokens", each)
    common.write("mixlora_layer", args, facts)


def say(what: str, facts: common.Json) -> None:
    """One line: how many times faster ours is, and how much less it keeps."""
    said = [f"{name} {facts[f'{name}_over_ours']:.2f}x" for name in ("peer", "naive")
            if name in facts]  # fmt: skip
    said += [f"{kind} {facts[f'{kind}_bytes_peer_over_ours']:.2f} of ours" for kind in
             ("saved", "peak") if f"{kind}_bytes" in facts]  # fmt: skip
    missed = "" if facts.get("judged", {}).get("reached", True) else " MISSED"
    print(f"{what}: {', '.join(said)}{missed}", flush=True)


if __name__ == "__main__":
    options = common.options(__doc__)
    options.add_argument("--turns", type=int, default=7)
    options.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)
    main(options.parse_args())
