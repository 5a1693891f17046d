"""What is known of a trained adapter: how it came about, and what it scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorahub_registry import __version__
from lorahub_registry.adapters.mixlora import MixLora, to_config
from lorahub_registry.api.centroids import centroid_of_rows
from lorahub_registry.api.factory import Order, Ready
from lorahub_registry.errors import NotApplied
from lorahub_registry.progress import Progress
from lorahub_registry.refs import looks_like_path
from lorahub_registry.registry.records import CentroidRecord

if TYPE_CHECKING:
    from lorahub_registry.evaluate.base import LoadedBase
    from lorahub_registry.train.learner import Learner
    from lorahub_registry.train.run import Run

_LOOKED_AT = 256  # rows that tell where an adapter's prompts lie


def scored(
    folder: Path,
    ready: Ready,
    order: Order,
    base: LoadedBase,
    before: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """The table of test scores and what it means; without test rows, only whether it applies."""
    from lorahub_registry.evaluate.measure import TestSet
    from lorahub_registry.evaluate.stock import stock_peft
    from lorahub_registry.train.scoring import Scoring

    scoring = Scoring(progress)
    test = order.splits.get("test")
    if test is None:
        probe = base.batches(order.splits["train"].tokens.rows[:8])
        what = f"training rows of {order.plan.name}"
        plain = scoring.score(what, base.model, probe)
        with stock_peft(base, folder) as model:
            _check_applied(folder, plain.mean, scoring.score(what, model, probe).mean)
        return {"test": None}
    rows, plan = test.tokens.rows, order.plan
    # Plain text has no answer that could be right.
    plain_text = plan.data.test is not None and plan.data.test.text is not None
    wanted = TestSet(
        rows,
        base.batches(rows),
        ["nll"] if plain_text else ready.factory.evaluate,
        ready.factory.max_new_tokens,
        plan.data.eos,
    )
    # Adapters may be scored on the same rows; what they have in common is the base's score.
    tokens = repr([(row.prompt, row.output) for row in rows]) + repr(plan.data.eos)
    known = sha256(tokens.encode()).hexdigest()
    if known not in before:
        before[known] = scoring.measure(base.model, base, "base", "base", wanted, progress=progress)
    (plain, first), kind = before[known], "adapter"
    with stock_peft(base, folder) as model:
        scores, second = scoring.measure(model, base, plan.name, kind, wanted, progress=progress)
    _check_applied(folder, plain.mean, scores.mean)
    difference, error = scores.minus(plain)
    if difference < -2 * error:
        text = f"beats the base by {-difference:.3f} ± {error:.3f} NLL"
    else:
        text = f"no better than the base: use the base (NLL {difference:+.3f} ± {error:.3f})"
    return {
        "test": [asdict(first), asdict(second)],
        "verdict": {"text": text, "difference": difference, "stderr": error},
    }


def _check_applied(folder: Path, before: float, after: float) -> None:
    if before == after:
        raise NotApplied(
            f"{folder.name}, loaded by stock PEFT, changes nothing on its rows",
            hint="a higher learning_rate or more steps, or lora_dropout below 1",
        )


def risen(loss: Sequence[tuple[int, float]]) -> list[str]:
    """What to say of a training loss that is higher at the end than at the start."""
    tenth = len(loss) // 10
    if not tenth:
        return []
    first, last = (fmean(nll for _, nll in part) for part in (loss[:tenth], loss[-tenth:]))
    if last <= 1.1 * first:
        return []
    return [f"the training loss rose from {first:.3f} to {last:.3f}: take a lower learning_rate"]


def results_of(
    ready: Ready, order: Order, base: LoadedBase, learner: Learner, run: Run
) -> dict[str, Any]:
    """Everything that ``results.json`` says but the scores; no paths, no names of machines."""
    plan, at, factory = learner.plan, learner.at, ready.factory
    lora = plan.lora
    kinds = {
        "rsLoRA": lora.use_rslora,
        "DoRA": lora.use_dora,
        "PiSSA": str(lora.init_lora_weights).startswith("pissa"),
        "OLoRA": lora.init_lora_weights == "olora",
        "LoRA+": lora.loraplus_lr_ratio is not None,
    }
    method = " ".join(name for name, used in kinds.items() if used) or "LoRA"
    if plan.method is not None:
        dora = plan.method.expert_lora.use_dora
        mixes = "MixDoRA" if (lora.use_dora if dora is None else dora) else "MixLoRA"
        rest = [name for name in ("rsLoRA", "LoRA+") if kinds[name]]
        _, _, how = plan.method.routing_strategy.partition("-")
        method = " ".join([mixes, *([f"({how})"] if how else []), *rest])
    notes = [*order.notes, *risen(at.loss)]
    if run.reduced:
        notes.append(f"memory ran out {len(run.reduced)} times, and fewer adapters went together")
    splits = (plan.data.train, plan.data.validation, plan.data.test)
    datasets = {found for split in splits if (found := _on_hub(split))}
    return {
        "kind": "trained",
        "name": plan.name,
        "description": plan.description or "",
        "skills": list(plan.skills),
        "base": ready.base.facts.named,
        "seq2seq": base.seq2seq,
        "method": f"Q{method}" if factory.quantization and method == "LoRA" else method,
        "lora": lora.model_dump(mode="json"),
        "experts": _experts(learner.parameters.mix) if plan.method else None,  # type: ignore[attr-defined]
        "training": plan.training.model_dump(mode="json"),
        "quantization": factory.quantization,
        "objective": plan.data.train.objective,
        "modules": len(learner.parameters.factors) + len(learner.parameters.experts),
        "parameters": learner.parameters.flat.numel(),
        "seed": learner.seed,
        "data": {
            name: order.splits[name].facts if name in order.splits else None
            for name in ("train", "validation", "test")
        },
        "tokens": plan.data.model_dump(include={"template", "max_length", "eos"}),
        "steps": at.step,
        "epochs": round(learner.epoch, 4),
        "stopped": f"early: {at.why}" if at.state == "early" else None,
        "best_step": at.best_step,
        "loss": at.loss,
        "validation_loss": at.validation,
        "task": plan.name,
        "seconds": round(at.seconds, 3),
        "together": run.together,
        "notes": notes,
        "license": plan.license,
        "datasets": sorted(datasets),
        "versions": {
            "lorareg": __version__,
            **{name: version(name) for name in ("torch", "transformers", "peft")},
        },
        "device": str(base.device.type),
        "dtype": str(base.model.dtype).removeprefix("torch."),
    }


def _experts(mix: MixLora) -> dict[str, Any]:
    """What experts there are and who chooses among them, everything said."""
    said = to_config(mix)
    keys = ("routing_strategy", "num_experts", "top_k", "top_p", "expert_capacity", "ffn_dropout")
    coefficients = ("router_loss", "router_aux_loss_coef", "router_init_range", "jitter_noise")
    return {
        **{key: said[key] for key in keys if key in said},
        **({"act_fn": mix.act_fn} if mix.act_fn else {}),
        **{key: getattr(mix, key) for key in coefficients},
        "expert_lora": asdict(mix.experts),
    }


def ended(learner: Learner) -> str:
    """One line of how an adapter came to its end."""
    at = learner.at
    found = f"{learner.plan.name}: {at.step} of {learner.total} steps done"
    if at.why:
        found += f", {at.why}"
    if at.loss:
        found += f": loss {at.loss[-1][1]:.3f}"
    if at.validation:
        found += f", validation {at.validation[-1][1]:.3f}"
    return found


def _on_hub(split: object) -> str | None:
    """The Hub id of the dataset that a split's rows are from; None where there is none."""
    dataset = getattr(split, "dataset", None)
    return None if dataset is None or looks_like_path(dataset) else dataset.partition("@")[0]


def place_of(ready: Ready, order: Order, base: LoadedBase, progress: Progress) -> CentroidRecord:
    """Where the adapter's rows lie in the base's hidden space, so that prompts find it."""
    split = order.splits["train"]
    return centroid_of_rows(
        base,
        split.tokens.rows[:_LOOKED_AT],
        template=order.plan.data.template,
        rows_digest=split.sha256,
        base_digest=ready.base.facts.digest or "",
        text=order.plan.data.train.objective == "lm",
        progress=progress,
    )
