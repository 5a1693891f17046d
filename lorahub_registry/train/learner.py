"""One adapter while it trains: what it sees next, how it steps, when it ends.

Nothing here knows of the other adapters. Which rows a step takes, and in which order, follows from
the seed and the step's number alone, so that a run that goes on from a checkpoint sees what it
would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lorahub_registry.evaluate.packing import pack
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.recipes.factory import AdapterPlan
from lorahub_registry.recipes.training import TrainingOptions
from lorahub_registry.runtime.seeds import seed_of
from lorahub_registry.train.experts import parameters_of
from lorahub_registry.train.parameters import Trainable

Item = tuple[Encoded, ...]
"""What takes one row of a batch: a row of the data, or several packed together."""
State = Literal["running", "done", "early", "diverged", "failed"]
_BUCKET = 50  # batches that are sorted by length together, as transformers does
_INWARD = {"a", "expert_a", "gate"}  # what LoRA+ does not step further on
_SCALE = 2.0**16  # of float16's gradients, at first
_BLOWN = 10  # steps in a row far over what knowing nothing costs


@dataclass(frozen=True)
class Micro:
    """Rows of one adapter that go through the base together."""

    adapter: int
    items: tuple[Item, ...]
    seed: int
    packed: bool = False

    @property
    def rows(self) -> int:
        """How many rows of a batch."""
        return len(self.items)

    @property
    def width(self) -> int:
        """Positions of the longest."""
        return max(length(item) for item in self.items)

    @property
    def outputs(self) -> int:
        """How many tokens are learned from."""
        return sum(len(row.output) for item in self.items for row in item)


def length(item: Item) -> int:
    """Positions that an item takes."""
    return sum(len(row.prompt) + len(row.output) for row in item)


def items_of(rows: Sequence[Encoded], plan: AdapterPlan) -> list[Item]:
    """What takes one row of a batch each: the rows, or packs of them."""
    if not plan.training.packing:
        return [(row,) for row in rows]
    assert plan.data.max_length is not None
    return pack(rows, plan.data.max_length)


def steps_of(items: int, options: TrainingOptions) -> tuple[int, int]:
    """(optimizer steps of one epoch, of the whole run)."""
    per_epoch = math.ceil(items / (options.batch_size * options.gradient_accumulation_steps))
    return per_epoch, options.max_steps or per_epoch * options.num_train_epochs


@dataclass
class Progressed:
    """What a checkpoint keeps of a learner beside its tensors."""

    step: int = 0
    state: State = "running"
    why: str = ""
    loss: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    waited: int = 0
    blown: int = 0
    scale: float = 1.0
    scaled_well: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Learner:
    """One adapter's run.

    Args:
        number: its place among the adapters.
        plan: its options.
        items: training rows, tokenised.
        validation: held-out rows; may be none.
        seed: of its first A, its order of rows and its dropout.
        vocabulary: how many tokens the base knows.
        half: the base computes in float16: gradients are scaled up on their way.
        parameters: what it trains; None: a fresh adapter as ``plan.lora`` has it.
    """

    def __init__(
        self,
        number: int,
        plan: AdapterPlan,
        model: Any,
        items: Sequence[Item],
        validation: Sequence[Encoded],
        *,
        seed: int,
        vocabulary: int,
        half: bool = False,
        parameters: Trainable | None = None,
    ) -> None:
        self.number, self.plan, self.seed = number, plan, seed
        self.items, self.validation = list(items), list(validation)
        self.parameters = parameters or parameters_of(plan, model, seed)
        self._half = half
        self.at = Progressed(scale=_SCALE if half else 1.0)
        self.best: torch.Tensor | None = None
        self._ignorant = math.log(vocabulary)
        self._options = options = plan.training
        self._per_step = options.batch_size * options.gradient_accumulation_steps
        self.steps_per_epoch, self.total = steps_of(len(self.items), options)
        self._epoch: tuple[int, list[int]] = (-1, [])
        self.optimizer = self._optimizer()

    @property
    def running(self) -> bool:
        """Whether it takes another step."""
        return self.at.state == "running"

    @property
    def epoch(self) -> float:
        """How many times it has seen its rows."""
        return self.at.step / self.steps_per_epoch

    def micros(self) -> list[Micro]:
        """What its next step takes, in the order in which it is drawn."""
        epoch, place = divmod(self.at.step, self.steps_per_epoch)
        order = self._order(epoch)[place * self._per_step : (place + 1) * self._per_step]
        size = self._options.batch_size
        return [
            Micro(
                self.number,
                tuple(self.items[i] for i in order[begin : begin + size]),
                seed_of(self.seed, self.at.step, n),
                self._options.packing,
            )
            for n, begin in enumerate(range(0, len(order), size))
        ]

    def learning_rate(self) -> float:
        """Of the next step, as transformers' schedules have it."""
        options, step, total = self._options, self.at.step, self.total
        warm = math.ceil(options.warmup_ratio * total)
        if step < warm:
            return options.learning_rate * step / max(1, warm)
        if options.lr_scheduler_type == "constant":
            return options.learning_rate
        share = (step - warm) / max(1, total - warm)
        if options.lr_scheduler_type == "cosine":
            return options.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        return options.learning_rate * (1 - share)

    def step(self, loss: float) -> dict[str, Any] | None:
        """Take a step along the gradients that lie in ``parameters.grad``; they are zeroed.

        Args:
            loss: mean over the step's output tokens, in nats.

        Returns:
            What the log says of it; None where it took none, because float16 overflowed.
        """
        grad, at = self.parameters.grad, self.at
        if at.scale != 1:
            grad /= at.scale
        norm = float(grad.norm())
        if not math.isfinite(norm) and math.isfinite(loss) and self._half and at.scale > 2**-8:
            at.scale, at.scaled_well = at.scale / 2, 0
            grad.zero_()
            return None
        rate = self.learning_rate()
        if not (math.isfinite(norm) and math.isfinite(loss)):
            what = "gradient" if math.isfinite(loss) else "loss"
            self._diverged(f"its {what} is not finite at step {at.step + 1}")
            return {"step": at.step + 1, "diverged": at.why}
        clip = self._options.max_grad_norm
        if clip is not None and norm > clip:
            grad *= clip / (norm + 1e-6)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        self.optimizer.step()
        grad.zero_()
        at.step += 1
        at.scaled_well += 1
        if self._half and at.scaled_well == 2000 and at.scale < _SCALE:
            at.scale, at.scaled_well = at.scale * 2, 0
        at.loss.append((at.step, loss))
        far = loss > 2 * max(self._ignorant, at.loss[0][1])
        at.blown = at.blown + 1 if far else 0
        if at.blown == _BLOWN:
            self._diverged(
                f"its loss stayed over {2 * max(self._ignorant, at.loss[0][1]):.1f} nats a token "
                f"for {_BLOWN} steps, to step {at.step}"
            )
        elif at.step == self.total:
            at.state = "done"
        return {
            "step": at.step,
            "epoch": round(self.epoch, 4),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
        }

    @property
    def wants_validation(self) -> bool:
        """Whether the step just taken is one after which the validation rows are scored."""
        every = self._options.eval_steps or self.steps_per_epoch
        due = self.at.step % every == 0 or self.at.state == "done"
        seen = self.at.validation and self.at.validation[-1][0] == self.at.step
        able = self.at.state != "failed"
        return bool(able and due and self.validation and self.at.step and not seen)

    def validated(self, nll: float) -> None:
        """Take note of the validation rows' NLL after the step just taken; it may end the run."""
        at, options = self.at, self._options
        at.validation.append((at.step, nll))
        if options.early_stopping_patience is None:
            return
        known = [n for step, n in at.validation if step == at.best_step]
        if math.isfinite(nll) and (not known or nll < known[0] - options.early_stopping_threshold):
            at.best_step, at.waited = at.step, 0
            # In the machine's memory: the device's may be full.
            self.best = self.parameters.flat.to("cpu", copy=True)
            return
        at.waited += 1
        if at.waited >= options.early_stopping_patience and at.state == "running":
            at.state = "early"
            at.why = f"no gain over {at.waited} evaluations"

    def finish(self) -> None:
        """The parameters are those of the best step, where validation chooses one."""
        if self.best is not None and self.at.best_step != self.at.step:
            self.parameters.flat.copy_(self.best)

    def fail(self, why: str) -> None:
        """It cannot go on; the others can."""
        self.at.state, self.at.why = "failed", why

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        found = {"flat": self.parameters.flat}
        if self.best is not None:
            found["best"] = self.best
        for i, group in enumerate(self.optimizer.param_groups):
            for key, value in self.optimizer.state.get(group["params"][0], {}).items():
                found[f"optimizer.{i}.{key}"] = value
        return found

    def restore(self, at: Progressed, tensors: dict[str, torch.Tensor]) -> None:
        """Be what was kept."""
        self.at = at
        self.parameters.flat.copy_(tensors["flat"])
        self.best = tensors.get("best")
        for i, group in enumerate(self.optimizer.param_groups):
            parameter, start = group["params"][0], f"optimizer.{i}."
            kept = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            if kept:
                # Copies: where a file's bytes happen to lie decides how sums are rounded.
                self.optimizer.state[parameter] = {
                    key: value.to(parameter.device, copy=True) for key, value in kept.items()
                }

    def _diverged(self, why: str) -> None:
        self.at.state, self.at.why = "diverged", why
        self.parameters.grad.zero_()

    def _order(self, epoch: int) -> list[int]:
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
            order = torch.randperm(len(self.items), generator=generator).tolist()
            if self._options.group_by_length:
                order = self._by_length(order, generator)
            self._epoch = epoch, order
        return self._epoch[1]

    def _by_length(self, order: list[int], generator: torch.Generator) -> list[int]:
        """Steps of rows of like length, the steps in a drawn order."""
        size = self._per_step
        runs = [order[i : i + _BUCKET * size] for i in range(0, len(order), _BUCKET * size)]
        for run in runs:
            run.sort(key=lambda i: -length(self.items[i]))
        steps = [run[i : i + size] for run in runs for i in range(0, len(run), size)]
        # One that is not full stays last, where every epoch looks for it.
        last = [steps.pop()] if len(steps[-1]) < size else []
        drawn = torch.randperm(len(steps), generator=generator).tolist()
        return [i for step in [*(steps[n] for n in drawn), *last] for i in step]

    def _optimizer(self) -> torch.optim.AdamW:
        """AdamW as transformers has it; LoRA+ (arXiv:2402.12354) steps further on B."""
        ratio, parameters = self.plan.lora.loraplus_lr_ratio, self.parameters
        groups = []
        for part, where in parameters.parts.items():
            value = torch.nn.Parameter(parameters.flat[where])
            value.grad = parameters.grad[where]
            groups.append(
                {
                    "params": [value],
                    "times": ratio if ratio is not None and part not in _INWARD else 1.0,
                    "weight_decay": self._options.weight_decay,
                }
            )
        betas = 0.9, self._options.adam_beta2
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        # AdamW would make these in its first step, and leave half a step where memory runs out.
        for group in optimizer.param_groups:
            value = group["params"][0]
            optimizer.state[value] = {
                "step": torch.zeros((), device=value.device),
                "exp_avg": torch.zeros_like(value),
                "exp_avg_sq": torch.zeros_like(value),
            }
        return optimizer
