"""Three adapters summed and truncated to one of their ranks take a 500th of PEFT's time.

Claim: the weighted sum of three rank-16 adapters on one 4096 x 4096 module, truncated to rank 16,
takes at most 1/500 of the CPU time of PEFT's ``add_weighted_adapter(combination_type="svd")`` at
one thread, and has the same singular values to 1e-5 of the largest.

    python benchmarks/truncate.py

Both sides start from the same factors in memory, float32. PEFT forms the dense delta and takes
its full SVD, minutes at this size, so it runs once; ours runs many times, and the figure is PEFT's
time over the median of ours. ``--quick`` takes a 512 x 512 module.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorahub_registry.weights.lowrank import LowRank, weighted_sum
from lorahub_registry.weights.truncate import truncate

SIZE, QUICK_SIZE = 4096, 512
NAMES, RANK, ALPHA = ("first", "second", "third"), 16, 32
COEFFICIENTS = (0.7, 0.5, -0.4)
DECAY = 0.9
"""Each rank of an adapter is this much of the one before it: trained deltas have a spectrum."""
TIMES, EXACT = 500.0, 1e-5


def peft_model(size: int, seed: int, device: str) -> Any:
    """One linear module with three adapters."""
    torch.manual_seed(seed)
    base = nn.Sequential()
    base.add_module("proj", nn.Linear(size, size, bias=False))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["proj"])
    model = get_peft_model(base, config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    decay = DECAY ** torch.arange(RANK)
    for name in NAMES:
        b = layer_of(model).lora_B[name].weight
        b.data = 0.02 * torch.randn(b.shape) * decay
    return model.to(device)


def layer_of(model: Any) -> Any:
    """The adapted module."""
    return model.base_model.model.proj


def factors(model: Any, name: str) -> LowRank:
    """An adapter of a PEFT model as our algebra has it."""
    layer = layer_of(model)
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    return LowRank(a, b * layer.scaling[name])


def agreement(ours: LowRank, peft: LowRank) -> common.Json:
    """How far the two results lie apart; PEFT's B is U·S, so its columns' norms are its values."""
    s, t = ours.singular_values(), peft.b.double().norm(dim=0)
    both = LowRank(torch.cat([ours.a, peft.a]), torch.cat([ours.b, -peft.b], 1))
    return {
        "singular_values_over_largest": common.rounded(float((s - t).abs().max() / t[0])),
        "singular_values_each": common.rounded(float(((s - t).abs() / t).max())),
        "matrices_frobenius": common.rounded(both.norm() / float(t.norm())),
    }


def times(peft: Sequence[float], ours: Sequence[float]) -> float:
    """How often ours fits into the peer's."""
    return common.spread(peft)["median"] / common.spread(ours)["median"]


def main(args: argparse.Namespace) -> None:
    """Check agreement, measure, print and write."""
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    wait = torch.cuda.synchronize if cuda else None
    size = QUICK_SIZE if args.quick else SIZE
    environment = common.environment(
        ("torch", "peft"), threads=args.threads, seeds={"factors": args.seed}
    )
    model = peft_model(size, args.seed, args.device)
    adapters = [{"proj": factors(model, name)} for name in NAMES]

    def ours() -> LowRank:
        return truncate(weighted_sum(adapters, COEFFICIENTS)["proj"], rank=RANK).delta

    def peft() -> None:
        if "svd" in model.peft_config:
            model.delete_adapter("svd")
        model.add_weighted_adapter(
            list(NAMES), list(COEFFICIENTS), "svd", combination_type="svd", svd_rank=RANK
        )

    def measure(side: Callable[[], object], turns: int, warmup: int) -> common.Samples:
        return common.alternate({"one": side}, turns=turns, warmup=warmup, wait=wait)["one"]

    # Ours before and after PEFT's runs, so that both meet the same machine.
    before = measure(ours, 3 if args.quick else 20, 2)
    samples = {"peft_svd": measure(peft, 3 if args.quick else args.peft_runs, int(args.quick))}
    after = measure(ours, 3 if args.quick else 20, 1)
    samples["ours"] = common.Samples(before.wall + after.wall, before.cpu + after.cpu)

    found = agreement(ours(), factors(model, "svd"))
    faster = times(samples["peft_svd"].cpu, samples["ours"].cpu)
    differs = found["singular_values_over_largest"]
    facts: common.Json = {
        "benchmark": "truncate",
        "claim": {
            "ours_over_peft_cpu": common.judged(1 / faster, 1 / TIMES),
            "times_faster_cpu": common.rounded(faster),
            "times_faster_wall": common.rounded(
                times(samples["peft_svd"].wall, samples["ours"].wall)
            ),
            "singular_values_over_largest": common.judged(differs, EXACT),
        },
        "work": {
            "module": [size, size],
            "adapters": len(NAMES),
            "rank_of_each": RANK,
            "truncated_to": RANK,
            "coefficients": COEFFICIENTS,
            "dtype": "float32 (ours works in float64)",
            "device": args.device,
        },
        "samples": {name: sample.json() for name, sample in samples.items()},
        "agreement": found,
        "peak_rss_bytes": common.peak_rss(),
        "environment": environment | {"load_after": common.load()},
    }
    for name, sample in samples.items():
        cpu, wall = common.spread(sample.cpu)["median"], common.spread(sample.wall)["median"]
        print(f"{name:10} cpu {cpu:9.4f} s   wall {wall:9.4f} s   of {len(sample.cpu)}")
    print(found)
    for name, judged in facts["claim"].items():
        print(name, judged)
    common.write("truncate", args, facts)


if __name__ == "__main__":
    parser = common.options(__doc__)
    parser.add_argument("--peft-runs", type=int, default=3, help="how often PEFT's side runs")
    main(parser.parse_args())
