"""Mixtures beside a base: gates and Arrow on one module, an adapter a row, and whole models.

Claim: the operator takes at most 1/1.4 of the time of a loop over the adapters; a batch in which
each row has another of 16 adapters decodes with a cache in at most 1/2 (hidden 512) and 1/1.5
(hidden 1024) of the time of PEFT's ``adapter_names``, and reads its prompts no slower.

    python benchmarks/runtime.py

1. **One module**, 1024 (and 512) wide, rank 16: coefficients for each token and all of E adapters,
   ours against a loop over the adapters; Arrow's top 4 against PEFT's ``ArrowLoraLinearLayer``,
   both with the same prototypes. Nothing but the adapters' part is measured.
2. **Rows**: a random Llama with four projections adapted, 16 rows, 1 to 64 adapters among them.
3. **Models**: gates in the one pass of the model against X-LoRA's two passes (which has no cache,
   so neither side takes one), and tokens a second with a cache, gated and of the base alone.

Both sides give the same to float32 rounding before they are measured (X-LoRA is another method:
its coefficients are not ours, and its time alone counts).
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import peft
import torch
import transformers
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from torch import nn
from torch.nn import functional

import lorahub_registry.runtime  # noqa: F401
from lorahub_registry.adapters.dynamic import Constant, LoraFlow
from lorahub_registry.runtime.mixture import Coefficients, Experts, turned
from lorahub_registry.runtime.routers import arrow, gate
from lorahub_registry.weights.dynamic import Origin, save_dynamic
from lorahub_registry.weights.lowrank import LowRank

RANK, TOP_K, TARGETS = 16, 4, ("q_proj", "v_proj", "o_proj", "down_proj")
LOOP, DECODE, PREFILL = 1 / 1.4, {512: 1 / 2.0, 1024: 1 / 1.5}, 1.0


def module(width: int, experts: int, tokens: int, args: Any, turns: int) -> common.Json:
    """One module: a gate over all, and Arrow's few."""
    torch.manual_seed(args.seed)
    make = {"device": args.device}
    a = torch.randn(experts * RANK, width, **make) * 0.02
    b = torch.randn(width, experts * RANK, **make) * 0.02
    x, y = torch.randn(1, tokens, width, **make), torch.randn(1, tokens, width, **make)
    weight, bias = torch.randn(experts, width, **make) * 0.02, torch.randn(experts, **make)
    each = list(zip(*(_parts(t, experts, i) for i, t in enumerate((a, b))), strict=True))
    ours = Experts(turned(a), turned(b), [RANK] * experts)  # as a loaded mixture holds them

    def loop() -> torch.Tensor:
        c, out = gate(x, weight, bias, 1.0), y.clone()
        for e, (one, other) in enumerate(each):
            out += functional.linear(functional.linear(x, one) * c[..., e : e + 1], other)
        return out

    def operator() -> torch.Tensor:
        return ours.add(y.clone(), x, Coefficients(gate(x, weight, bias, 1.0)))

    facts: common.Json = {"width": width, "adapters": experts, "tokens": tokens}
    facts["gate"] = compared(operator, loop, LOOP, args, turns)
    if experts >= 2 * TOP_K:
        theirs, prototypes = pefts_arrow(width, each)

        def peft_arrow() -> torch.Tensor:
            found: torch.Tensor = theirs(x)
            return y + found

        def our_arrow() -> torch.Tensor:
            return ours.add(y.clone(), x, arrow(x, prototypes, TOP_K, 1.0))

        facts["arrow"] = compared(our_arrow, peft_arrow, 1.0, args, turns)
    return facts


def _parts(stack: torch.Tensor, experts: int, axis: int) -> list[torch.Tensor]:
    return [part.contiguous() for part in stack.chunk(experts, axis)]


def pefts_arrow(
    width: int, each: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """PEFT's layer on these adapters, and the prototypes that it takes."""
    config = ArrowConfig(top_k=TOP_K, router_temperature=1.0, rng_seed=0)
    names = [f"task_{i}" for i in range(len(each))]
    config.task_adapter_names = names
    layer = ArrowLoraLinearLayer(width, config)
    factors = []
    for side in (0, 1):
        modules = nn.ModuleDict()
        for name, pair in zip(names, each, strict=True):
            modules[name] = nn.Linear(1, 1, bias=False)
            modules[name].weight = nn.Parameter(pair[side], requires_grad=False)
        factors.append(modules)
    nothing, scaling = nn.Identity(), dict.fromkeys(names, 1.0)
    layer.build_prototypes(*factors)

    def run(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = layer(x, *factors, nothing, scaling)
        return found

    return run, layer.prototypes.detach()


def compared(
    ours: Callable[[], Any], peer: Callable[[], Any], target: float, args: Any, turns: int
) -> common.Json:
    """Both sides' times, once they give the same."""
    found, expected = ours(), peer()
    facts: common.Json = {}
    if isinstance(found, torch.Tensor):
        facts["largest_difference"] = common.rounded(
            float((found - expected).abs().max() / expected.abs().max())
        )
        if facts["largest_difference"] > 1e-4:
            raise SystemExit(f"the sides differ by {facts['largest_difference']}")
    wait = torch.cuda.synchronize if args.device == "cuda" else None
    samples = common.alternate({"ours": ours, "peer": peer}, turns=turns, warmup=2, wait=wait)
    ratio = common.ratios(samples["ours"], samples["peer"])
    side = "wall" if args.device == "cuda" else "cpu"
    return {
        **facts,
        "ours_over_peer": ratio,
        "judged": common.judged(ratio[side]["median"], target),
        "ours_s": common.spread(getattr(samples["ours"], side))["median"],
        "peer_s": common.spread(getattr(samples["peer"], side))["median"],
    }


def llama(width: int, layers: int, seed: int) -> Any:
    """A random Llama."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def adapters(model: Any, count: int, seed: int) -> list[dict[str, LowRank]]:
    """Random adapters on the projections."""
    made = torch.Generator().manual_seed(seed)
    found: list[dict[str, LowRank]] = [{} for _ in range(count)]
    for name, linear in model.named_modules():
        if name.endswith(TARGETS):
            for one in found:
                a = torch.randn(RANK, linear.in_features, generator=made) * 0.05
                b = torch.randn(linear.out_features, RANK, generator=made) * 0.05
                one[name] = LowRank(a, b)
    return found


def mixture(model: Any, experts: list[dict[str, LowRank]], router: Any, device: str) -> Any:
    """The model with a mixture, as PEFT loads it."""
    tensors = {}
    if isinstance(router, LoraFlow):
        for i in range(model.config.num_hidden_layers):
            place = f"model.layers.{i}.mixture.lora_gate"
            tensors[place] = torch.randn(len(experts), model.config.hidden_size) * 0.02
            tensors[f"{place}_bias"] = torch.zeros(len(experts))
    with tempfile.TemporaryDirectory() as folder:
        save_dynamic(
            Path(folder), experts, [Origin(f"e{i}") for i in range(len(experts))], router,
            tensors, base="random", base_revision=None, task_type="CAUSAL_LM",
        )  # fmt: skip
        return peft.PeftModel.from_pretrained(model, folder).to(device).eval()


def stock(model: Any, experts: list[dict[str, LowRank]], device: str) -> Any:
    """The model with the same adapters as PEFT's own."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), inference_mode=True
    )
    found = peft.get_peft_model(model, config, adapter_name="a0")
    for i in range(1, len(experts)):
        found.add_adapter(f"a{i}", config)
    for name, layer in model.named_modules():
        if name in experts[0]:
            for i, one in enumerate(experts):
                layer.lora_A[f"a{i}"].weight.data = one[name].a.clone()
                layer.lora_B[f"a{i}"].weight.data = one[name].b.clone()
    return found.to(device).eval()


def rows(width: int, count: int, args: Any, turns: int) -> common.Json:
    """A batch in which each row has its own adapter."""
    batch, prompt, layers = max(16, count), 32 if args.quick else 64, 2
    base = llama(width, layers, args.seed)
    experts = adapters(base, count, args.seed)
    ours = mixture(llama(width, layers, args.seed), experts, Constant((0.0,) * count), args.device)
    peer = stock(base, experts, args.device)
    which = torch.arange(batch, device=args.device) % count
    names = [f"a{i}" for i in which.tolist()]
    c = Coefficients(torch.ones(batch, 1, 1, device=args.device), which.view(-1, 1, 1))
    ids = torch.randint(3, 512, (batch, prompt), device=args.device)
    step = torch.randint(3, 512, (batch, 1), device=args.device)

    def read(**more: Any) -> Any:
        with ours.base_model.coefficients(c):
            return ours(input_ids=ids, **more)

    def peer_read(**more: Any) -> Any:
        return peer(input_ids=ids, adapter_names=names, **more)

    caches = {"ours": read().past_key_values, "peer": peer_read().past_key_values}

    def decode() -> torch.Tensor:
        with ours.base_model.coefficients(c):
            found = ours(input_ids=step, past_key_values=caches["ours"]).logits
        caches["ours"].crop(-1)
        return found

    def peer_decode() -> torch.Tensor:
        found = peer(input_ids=step, past_key_values=caches["peer"], adapter_names=names).logits
        caches["peer"].crop(-1)
        return found

    whole = read().logits
    for i in range(min(count, 3)):
        peer.set_adapter(names[i])
        alone = peer(input_ids=ids[i : i + 1]).logits[0]
        torch.testing.assert_close(whole[i], alone, rtol=1e-3, atol=1e-4)
    return {
        "width": width, "layers": layers, "rows": batch, "prompt": prompt, "adapters": count,
        "decode": compared(decode, peer_decode, DECODE.get(width, 1.0), args, 3 * turns),
        "prefill": compared(
            lambda: read().logits, lambda: peer_read().logits, PREFILL, args, turns
        ),
    }  # fmt: skip


def models(width: int, args: Any, turns: int) -> common.Json:
    """Gates beside X-LoRA's two passes, and beside nothing."""
    layers, count, new = 4, 4, 8 if args.quick else 32
    base = llama(width, layers, args.seed)
    experts = adapters(base, count, args.seed)
    gated = mixture(llama(width, layers, args.seed), experts, LoraFlow(), args.device)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = stock(llama(width, layers, args.seed), experts, args.device)
        plain.save_pretrained(folder, save_embedding_layers=False)
        paths = {str(i): f"{folder}/a{i}" for i in range(count)}
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=width, xlora_depth=1, adapters=paths
        )
        bare = llama(width, layers, args.seed)
        bare.config.use_cache = False  # X-LoRA wants it so
        xlora = peft.get_peft_model(bare, config).to(args.device).eval()
    base = base.to(args.device)
    ids = torch.randint(3, 512, (1, 64), device=args.device)
    mask = torch.ones_like(ids)

    def generate(model: Any) -> Callable[[], None]:
        def run() -> None:
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
                do_sample=False,
            )  # fmt: skip

        return run

    def forward(model: Any) -> Callable[[], None]:
        def run() -> None:
            model(input_ids=ids, attention_mask=mask, use_cache=False)

        return run

    one_pass = compared(forward(gated), forward(xlora), 1.0, args, turns)
    beside = compared(generate(gated), generate(base), 2.0, args, turns)
    return {
        "width": width, "layers": layers, "adapters": count, "new_tokens": new,
        "forward_over_xlora": one_pass,
        "generate_over_base": beside,
        "gated_tokens_per_s": common.rounded(new / beside["ours_s"]),
        "base_tokens_per_s": common.rounded(new / beside["peer_s"]),
    }  # fmt: skip


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    environment = common.environment(
        ("torch", "transformers", "peft"), threads=args.threads, seeds={"all": args.seed}
    )
    turns = 3 if args.quick else args.turns
    widths = (512,) if args.quick else (512, 1024)
    facts: common.Json = {"benchmark": "runtime", "module": [], "rows": [], "models": []}
    for width in widths:
        for experts in (2, 8) if args.quick else (2, 8, 32, 128):
            for tokens in (1, 16, 512):
                times = 2 * turns if tokens > 16 else 8 * turns
                found = module(width, experts, tokens, args, times)
                facts["module"].append(found)
                show(f"{width} wide, {experts} adapters, {tokens} tokens", found, "gate", "arrow")
        for count in (1, 4) if args.quick else (1, 4, 16, 64):
            found = rows(width, count, args, turns)
            facts["rows"].append(found)
            show(f"rows: {width} wide, {count} adapters", found, "decode", "prefill")
    found = models(widths[0], args, turns)
    facts["models"].append(found)
    show("models", found, "forward_over_xlora", "generate_over_base")
    common.write("runtime", args, facts | {"environment": environment})


def show(what: str, facts: common.Json, *parts: str) -> None:
    """One line: how many times faster ours is."""
    said = []
    for part in parts:
        if part in facts:
            judged = facts[part]["judged"]
            mark = "" if judged["reached"] else " MISSED"
            said.append(f"{part} {1 / judged['measured']:.2f}x{mark}")
    print(f"{what}: {', '.join(said)}", flush=True)


if __name__ == "__main__":
    options = common.options(__doc__)
    options.add_argument("--turns", type=int, default=7)
    main(options.parse_args())
