"""One adapter's parameters in one buffer: every A, then every B, then DoRA's magnitudes.

Copying, checking, clipping, saving and putting back an adapter is one operation on one tensor, and
an optimizer steps over two or three long tensors in place of hundreds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.recipes.training import LoraOptions
from lorahub_registry.runtime.grouped import Factors
from lorahub_registry.runtime.grouped_experts import LayerExperts
from lorahub_registry.runtime.linear import fans, is_trainable, weight_of


def targets(model: nn.Module, wanted: tuple[str, ...] | str) -> list[str]:
    """The modules that ``target_modules`` means, sorted: PEFT's rule.

    Args:
        wanted: last parts of names, or ``all-linear``: every linear module but the output layer.

    Raises:
        IncompatibleAdapters: one of them means no module, or one that cannot be trained.
    """
    modules = dict(model.named_modules())
    if wanted == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return sorted(n for n, m in modules.items() if is_trainable(m) and m is not head)
    found: set[str] = set()
    for target in wanted:
        caught = {n for n in modules if n == target or n.endswith(f".{target}")}
        if not caught:
            linear = sorted({n.rsplit(".", 1)[-1] for n, m in modules.items() if is_trainable(m)})
            raise IncompatibleAdapters(
                f"target_modules: the base has no module {target!r}",
                hint=f"its linear modules are: {', '.join(linear)}",
            )
        if other := sorted(n for n in caught if not is_trainable(modules[n])):
            raise IncompatibleAdapters(
                f"target_modules: {other[0]} is a {type(modules[other[0]]).__name__}, and adapters "
                "are trained on linear modules",
                hint="name others, or say all-linear",
            )
        found |= caught
    return sorted(found)


class Trainable(Protocol):
    """What a learner trains; see :class:`Parameters` for the attributes."""

    flat: torch.Tensor
    grad: torch.Tensor
    parts: dict[str, slice]
    factors: dict[str, Factors]
    experts: dict[str, LayerExperts]


class Parameters:
    """The trained numbers of one adapter.

    Args:
        model: the base, frozen.
        options: rank, scaling, targets, where it starts.
        seed: of the first A.
        names: the modules that get an adapter; None: those that the options name.
        more: name → size of further parts, zero, at the end.

    Attributes:
        flat, grad: float32, [parameters]; the values and what backward passes add up.
        factors: module → its parts, views of the two.
        experts: feed-forward module → its experts; none here.
        rank: what is written: twice the trained one where a start is taken off.
        parts: (optimizer's name → slice of ``flat``): ``a``, ``b`` and, for DoRA, ``magnitude``.
    """

    def __init__(
        self,
        model: nn.Module,
        options: LoraOptions,
        seed: int,
        *,
        names: Sequence[str] | None = None,
        more: Mapping[str, int] | None = None,
    ) -> None:
        self.options = options
        self.experts: dict[str, LayerExperts] = {}
        names = targets(model, options.target_modules) if names is None else names
        check_start(model, names, options)
        modules = {name: model.get_submodule(name) for name in names}
        shapes = {name: fans(module) for name, module in modules.items()}
        rank, device = options.r, next(model.parameters()).device
        sizes = {
            "a": sum(rank * fan_in for fan_in, _ in shapes.values()),
            "b": sum(rank * fan_out for _, fan_out in shapes.values()),
            "magnitude": sum(out for _, out in shapes.values()) if options.use_dora else 0,
            **(more or {}),
        }
        self.flat = torch.zeros(sum(sizes.values()), device=device)
        self.grad = torch.zeros_like(self.flat)
        self.parts: dict[str, slice] = {}
        at = 0
        for part, size in sizes.items():
            if size:
                self.parts[part] = slice(at, at + size)
            at += size
        self.factors: dict[str, Factors] = {}
        places = {part: where.start for part, where in self.parts.items()}
        generator = torch.Generator().manual_seed(seed)

        def views(part: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
            where = slice(places[part], places[part] + math.prod(shape))
            places[part] = where.stop
            return self.flat[where].view(shape), self.grad[where].view(shape)

        for name in names:
            fan_in, fan_out = shapes[name]
            a, grad_a = views("a", (rank, fan_in))
            b, grad_b = views("b", (fan_out, rank))
            start = _begin(a, b, modules[name], options, generator, seed)
            magnitude, grad_magnitude = None, None
            if options.use_dora:
                magnitude, grad_magnitude = views("magnitude", (fan_out,))
                magnitude.copy_(weight_of(modules[name]).norm(dim=1))
            self.factors[name] = Factors(
                a, b, grad_a, grad_b, options.scaling, start, magnitude, grad_magnitude,
                options.lora_dropout,
            )  # fmt: skip

    @property
    def rank(self) -> int:
        """Of the written adapter."""
        return self.options.r * (2 if self._starts else 1)

    @property
    def _starts(self) -> bool:
        return any(f.start is not None for f in self.factors.values())

    def written(self) -> dict[str, dict[str, torch.Tensor]]:
        """Module → its tensors as PEFT's files name them after ``lora_``, float32 on the CPU.

        A start that was moved out of the base comes back as ranks of its own, with the opposite
        sign: a plain LoRA on the base as it is.
        """
        found = {}
        for name, f in self.factors.items():
            a, b = f.a, f.b
            if f.start is not None:
                a, b = torch.cat([a, f.start[0]]), torch.cat([b, -f.start[1]], 1)
            found[name] = {"A.weight": a.cpu().clone(), "B.weight": b.cpu().clone()}
            if f.magnitude is not None:
                found[name]["magnitude_vector"] = f.magnitude.cpu().clone()
        return found


def check_start(model: nn.Module, names: Sequence[str], options: LoraOptions) -> None:
    """Whether the base can be started from, and learned on, as asked.

    Raises:
        IncompatibleAdapters: it cannot.
    """
    for name in names if options.changes_base else ():
        if options.r > (most := min(fans(model.get_submodule(name)))):
            raise IncompatibleAdapters(
                f"init_lora_weights: {options.init_lora_weights} takes {options.r} directions out "
                f"of {name}, which has {most}",
                hint=f"r of at most {most}, other target_modules, or init_lora_weights: true",
            )
    kinds = {type(model.get_submodule(name)).__name__ for name in names}
    if options.changes_base and kinds & {"Linear4bit", "Linear8bitLt"}:
        raise IncompatibleAdapters(
            f"init_lora_weights: {options.init_lora_weights} starts from the base's own weights, "
            "which a quantised base has lost",
            hint="train it without quantization, or start it with init_lora_weights: true",
        )
    if options.use_dora and "Linear8bitLt" in kinds:
        raise IncompatibleAdapters(
            "use_dora needs the norms of the base's weights, which are not at hand in 8 bits",
            hint="take quantization: 4bit, or leave out use_dora",
        )


def _begin(
    a: torch.Tensor,
    b: torch.Tensor,
    module: nn.Module,
    options: LoraOptions,
    generator: torch.Generator,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Fill A and B as PEFT does; gives a copy of both where their product starts from the base."""
    how = options.init_lora_weights
    if how is True or how == "gaussian":
        drawn = torch.empty(a.shape)
        if how == "gaussian":
            drawn.normal_(std=1 / options.r, generator=generator)
        else:
            bound = 1 / math.sqrt(a.shape[1])
            drawn.uniform_(-bound, bound, generator=generator)
        a.copy_(drawn)
        return None
    tensors = _by_peft(module, options, seed)
    a.copy_(tensors["A"])
    b.copy_(tensors["B"])
    return a.clone(), b.clone()


def _by_peft(module: nn.Module, options: LoraOptions, seed: int) -> Mapping[str, Any]:
    """PEFT's own PiSSA (arXiv:2404.02948) or OLoRA (arXiv:2406.01775) start of one module."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    turned = type(module).__name__ == "Conv1D"
    plain = copy.deepcopy(module)  # which PEFT takes the start out of
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        use_rslora=options.use_rslora,
        init_lora_weights=options.init_lora_weights,
        fan_in_fan_out=turned,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = Linear(
            plain, "start", config, r=options.r, lora_alpha=options.lora_alpha,
            is_target_conv_1d_layer=turned,
        )  # fmt: skip
    return {
        "A": layer.lora_A["start"].weight.detach().float(),
        "B": layer.lora_B["start"].weight.detach().float(),
    }
