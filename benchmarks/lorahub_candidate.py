"""One candidate of the `lorahub` search costs no more than one forward through stock PEFT.

Claim: setting 20 coefficients, forward and loss of one candidate (factor form; T5 of 60M
parameters, 20 modules of rank 16 on q and v, 5 examples of 166 tokens) take at most 1.0 times the
CPU time, at one thread, of one forward of the same batch through stock PEFT with one adapter; and
the loss is the published formula's.

    python benchmarks/lorahub_candidate.py
    python benchmarks/lorahub_candidate.py --threads 2

Sides, in one process, in turns, all float32:

* stock_peft: one forward with loss, one adapter, loaded by ``PeftModel.from_pretrained``;
* lorahub: our candidate in factor form, as ``compose`` runs it;
* learn: our candidate in the exact delta form;
* published_loop: state dicts summed name by name, ``set_peft_model_state_dict``, a new
  ``DataLoader``, forward, as the published search does it;
* lorahub_set, learn_set: of our candidates, the coefficients alone.

Agreement: the same coefficient vectors through ours and through the published loop, and through
the formula in float64.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from peft import PeftModel
from published_loop import PublishedLoop
from safetensors.torch import load_file
from t5_modules import ALPHA, MODULES, RANK, make_base, write_modules
from torch import nn

from lorahub_registry.adapters.facts import AdapterFacts, read_facts
from lorahub_registry.compose.forms import DeltaForm, FactorForm, Form
from lorahub_registry.compose.objective import value
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.tokens import Batch, Encoded, batches
from lorahub_registry.runtime.apply import Applied
from lorahub_registry.weights.files import load_deltas

EXAMPLES, PROMPT_TOKENS = 5, 166
L1 = 0.05
EXACT = 1e-6
"""How near the losses have to be while coefficients are small."""
AS_NEAR = 1.5
"""At the bounds: our distance from float64 over the published loop's, each the root of the mean
square; which of two roundings lies nearer is chance in each vector."""

Coefficients = tuple[float, ...]


def make_rows(vocabulary: int, seed: int) -> list[Encoded]:
    """Rows of random words and EOS, outputs of 3 to 7 tokens."""
    random = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        words = torch.randint(3, vocabulary, (length - 1,), generator=random)
        return [*words.tolist(), 1]

    return [Encoded(text(PROMPT_TOKENS), text(3 + n)) for n in range(EXAMPLES)]


def rows_of(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """A batch row by row, as the loop's loader takes them."""
    rows = {name: tensor.cpu() for name, tensor in batch.inputs.items()}
    return [{name: tensor[n] for name, tensor in rows.items()} for n in range(len(batch.rows))]


def states(folders: Sequence[Path], device: str) -> list[dict[str, torch.Tensor]]:
    """Every module's tensors as they lie in its file."""
    read = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    return [{key: t.to(device) for key, t in tensors.items()} for tensors in read]


class Ours:
    """A candidate as ``compose`` evaluates it."""

    def __init__(self, base: nn.Module, form: Form, rows: Sequence[Batch]) -> None:
        self._base, self._form, self._rows = base, form, rows
        self.on = Applied(base, form.modules)

    def __call__(self, coefficients: Coefficients) -> tuple[float, float]:
        """(mean cross-entropy, objective); ``on`` has been entered, as a search does once."""
        self.set(coefficients)
        nll = score(self._base, self._rows)
        rows = len(nll.sums)
        return nll.mean, value(nll.mean, coefficients, l1=L1, kind="published", rows=rows)

    def set(self, coefficients: Coefficients) -> None:
        """Coefficients to deltas to weights."""
        self.on.set(self._form.at(coefficients))


class InDouble:
    """The published formula in float64, nothing rounded on the way."""

    def __init__(
        self, base: nn.Module, folders: Sequence[Path], facts: AdapterFacts, batch: Batch
    ) -> None:
        self._model: Any = copy.deepcopy(base).cpu().double()
        # T5 makes its norms in float32, whatever the weights are.
        for name, module in list(self._model.named_modules()):
            if type(module).__name__ == "T5LayerNorm":
                norm = nn.RMSNorm(module.weight.shape[0], module.variance_epsilon).double()
                norm.weight = module.weight
                self._model.set_submodule(name, norm)
        named = dict(self._model.named_modules())
        self._targets = [
            (named[m.name].weight, named[m.name].weight.clone(), m) for m in facts.modules
        ]
        tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        self._factors = {key: torch.stack([t[key].double() for t in tensors]) for key in tensors[0]}
        self._inputs = {name: tensor.cpu() for name, tensor in batch.inputs.items()}
        self._labels = batch.labels.cpu()

    def __call__(self, coefficients: Coefficients) -> tuple[float, float]:
        """(mean cross-entropy, objective)."""
        c = torch.tensor(coefficients, dtype=torch.float64)
        with torch.no_grad():
            for weight, original, module in self._targets:
                a = torch.tensordot(c, self._factors[module.key_a], 1)
                b = torch.tensordot(c, self._factors[module.key_b], 1)
                weight.copy_(original + module.scaling * (b @ a))
            logits = self._model(**self._inputs, use_cache=False).logits
            assert logits.dtype == torch.float64
            loss = float(nn.functional.cross_entropy(logits.flatten(0, 1), self._labels.flatten()))
        penalty = L1 * sum(map(abs, coefficients)) / len(coefficients)
        return loss, loss / len(self._labels) + penalty


def agreement(
    ours: Ours, published: PublishedLoop, exact: InDouble, vectors: Sequence[Coefficients]
) -> common.Json:
    """The same vectors through all three: how far the losses lie apart."""
    rows = [(ours(c), published(c), exact(c)) for c in vectors]

    def apart(left: int, right: int, of: int) -> common.Json:
        found = [row[left][of] - row[right][of] for row in rows]
        rms = math.sqrt(sum(x * x for x in found) / len(found))
        return {"max": common.rounded(max(map(abs, found))), "rms": common.rounded(rms)}

    facts: common.Json = {
        "vectors": len(vectors),
        "cross_entropies_float64": [round(row[2][0], 6) for row in rows],
    }
    for of, name in enumerate(("cross_entropy", "objective")):
        facts[name] = {
            "ours_from_published": apart(0, 1, of),
            "ours_from_float64": apart(0, 2, of),
            "published_from_float64": apart(1, 2, of),
        }
    return facts


def vectors(count: int, bound: float, seed: int, *, corners: bool = False) -> list[Coefficients]:
    """Coefficient vectors within the bound, or with every one at plus or minus it."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, MODULES, generator=random) * 2 - 1
    drawn = (drawn.sign() if corners else drawn) * bound
    return [tuple(row) for row in drawn.tolist()]


def claim(
    samples: Mapping[str, common.Samples], near: common.Json, far: common.Json
) -> common.Json:
    """What was to be reached, and whether it was.

    The loss is the published one, cross-entropy divided by the number of examples plus the
    penalty; the loop gives its cross-entropy in float32, whose numbers near 11 are 1e-6 apart.
    """
    ratio = common.ratios(samples["lorahub"], samples["stock_peft"])["cpu"]["median"]
    difference = near["objective"]["ours_from_published"]["max"]
    errors = far["objective"]
    error = errors["ours_from_float64"]["rms"] / errors["published_from_float64"]["rms"]
    return {
        "candidate_over_stock_forward_cpu": common.judged(ratio, 1.0, 0.6),
        "loss_difference_within_0.5": common.judged(difference, EXACT),
        "error_over_published_error_at_1.5": common.judged(error, AS_NEAR),
    }


def main(args: argparse.Namespace) -> None:
    """Check agreement, measure, print and write."""
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    seeds = {"base": args.seed, "modules": args.seed + 1, "rows": args.seed + 2}
    seeds["coefficients"] = args.seed + 3
    environment = common.environment(
        ("torch", "transformers", "peft", "safetensors"), threads=args.threads, seeds=seeds
    )
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(seeds["base"])
        folders = write_modules(base, Path(folder), seeds["modules"])
        read = [read_facts(f) for f in folders]
        stock = PeftModel.from_pretrained(copy.deepcopy(base), folders[0]).to(args.device)
        loop_model = PeftModel.from_pretrained(copy.deepcopy(base), folders[0]).to(args.device)
        base.to(args.device)
        rows = batches(
            make_rows(base.config.vocab_size, seeds["rows"]),
            pad=0, seq2seq=True, device=args.device,
        )  # fmt: skip
        [batch] = rows
        factor = Ours(base, FactorForm(list(zip(folders, read, strict=True)), args.device), rows)
        deltas = [load_deltas(f, facts) for f, facts in zip(folders, read, strict=True)]
        delta = Ours(base, DeltaForm(deltas, args.device), rows)
        loop = PublishedLoop(loop_model, states(folders, args.device), rows_of(batch), args.device)
        exact = InDouble(base, folders, read[0], batch)

    first = seeds["coefficients"]
    count = 2 if args.quick else 8
    small, large = vectors(count, 0.5, first), vectors(count, 1.5, first + 1, corners=True)
    turn = itertools.cycle(vectors(64, 0.5, first + 2))

    def forward() -> float:
        with torch.inference_mode():
            return float(stock(**batch.inputs).loss)

    sides: dict[str, Callable[[], object]] = {
        "stock_peft": forward,
        "lorahub": lambda: factor(next(turn)),
        "learn": lambda: delta(next(turn)),
        "published_loop": lambda: loop(next(turn)),
        "lorahub_set": lambda: factor.set(next(turn)),
        "learn_set": lambda: delta.set(next(turn)),
    }
    with factor.on, delta.on:
        near, far = (agreement(factor, loop, exact, drawn) for drawn in (small, large))
        samples = common.alternate(
            sides,
            turns=3 if args.quick else 21,
            warmup=2,
            wait=torch.cuda.synchronize if cuda else None,
        )
        peaks = {name: common.peak_on_gpu(side) for name, side in sides.items()} if cuda else None

    stock_samples = samples["stock_peft"]
    multiples = {
        name: common.ratios(samples[name], stock_samples) for name in sides if name != "stock_peft"
    }
    facts: common.Json = {
        "benchmark": "lorahub_candidate",
        "claim": claim(samples, near, far),
        "work": {
            "base": "T5, t5-small's shape, initialised",
            "parameters": sum(p.numel() for p in base.parameters()),
            "attention": base.config._attn_implementation,
            "dtype": "float32",
            "modules": MODULES,
            "rank": RANK,
            "alpha": ALPHA,
            "adapted": len(read[0].modules),
            "examples": EXAMPLES,
            "prompt_tokens": list(batch.inputs["input_ids"].shape),
            "output_tokens": list(batch.labels.shape),
            "device": args.device,
        },
        "multiples_of_stock_forward": multiples,
        "samples": {name: sample.json() for name, sample in samples.items()},
        "agreement": {"within_0.5": near, "at_1.5": far},
        "peak_gpu_bytes_of_one_run": peaks,
        "peak_rss_bytes": common.peak_rss(),
        "environment": environment | {"load_after": common.load()},
    }
    report(facts)
    common.write("lorahub_candidate", args, facts)


def report(facts: common.Json) -> None:
    """The figures, for people."""
    for name, sample in facts["samples"].items():
        cpu, wall = sample["cpu_s"], sample["wall_s"]
        line = f"{name:15} cpu {cpu['median'] * 1e3:7.1f} ms   wall {wall['median'] * 1e3:7.1f} ms"
        if multiple := facts["multiples_of_stock_forward"].get(name):
            cpu, wall = multiple["cpu"], multiple["wall"]
            line += (
                f"   x stock: cpu {cpu['median']:.3f} ({cpu['q1']:.3f}–{cpu['q3']:.3f})"
                f"  wall {wall['median']:.3f}"
            )
        print(line)
    for where, found in facts["agreement"].items():
        for name in ("cross_entropy", "objective"):
            print(where, name, {pair: x["max"] for pair, x in found[name].items()})
    for name, found in facts["claim"].items():
        print(name, found)


if __name__ == "__main__":
    main(common.options(__doc__).parse_args())
