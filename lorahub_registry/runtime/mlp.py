"""The feed-forward part of a decoder layer, known by its structure and by what it computes.

    y = down(act(gate x) * up x)        three linear modules
    y = down(act(g) * u), [g, u] = gate_up x    two, the first twice as wide
    y = fc2(act(fc1 x))                 two

Which module is which is tried out: the parts put together have to give what the module gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters
from lorahub_registry.runtime.linear import fans, is_trainable
from lorahub_registry.runtime.places import width_of

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mlp:
    """How one feed-forward module computes.

    Attributes:
        module: it, as it stands in the base.
        first: names of its linear modules that see the layer's tokens: gate and up, gate_up, fc1.
        last: the name of the one that gives the result.
        act: between them.
        gated: one part of what ``first`` gives multiplies the other.
        turned: of a gate_up, the half that passes the activation is the second.
        dropout: the name of what the module drops its result by in training: a Dropout, a share.
    """

    module: nn.Module
    first: tuple[str, ...]
    last: str
    act: Activation
    gated: bool
    turned: bool = False
    dropout: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Its linear modules."""
        return (*self.first, self.last)

    def linear(self, name: str) -> Any:
        """One of them."""
        return getattr(self.module, name)

    @property
    def width(self) -> tuple[int, int]:
        """(of the tokens, of what the last module gets)."""
        fan_in, fan_out = fans(self.linear(self.last))
        return fan_out, fan_in

    def between(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the last module gets, from what the first ones give: [..., ffn]."""
        if not self.gated:
            return self.act(parts[0])
        gate, up = parts[0].chunk(2, -1) if len(parts) == 1 else parts
        return self.act(up) * gate if self.turned else self.act(gate) * up

    def acting(self, name: str | None) -> Mlp:
        """The same with the activation that transformers knows by ``name``; None: its own.

        Raises:
            BrokenAdapter: transformers knows none of that name.
        """
        if name is None:
            return self
        if name not in ACT2FN:
            raise BrokenAdapter(
                f"act_fn is {name!r}, which transformers does not know",
                hint=f"one of {', '.join(sorted(ACT2FN))}, or leave it out for the base's own",
            )
        return replace(self, act=ACT2FN[name])

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """A result with the module's own dropout, where the module trains."""
        if self.dropout is None:
            return x
        held = getattr(self.module, self.dropout)
        found: torch.Tensor = (
            held(x)
            if isinstance(held, nn.Module)
            else functional.dropout(x, held, self.module.training)
        )
        return found

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """What the module gives, but for its dropout."""
        found: torch.Tensor = self.linear(self.last)(
            self.between([self.linear(name)(x) for name in self.first])
        )
        return found


def decoder_layers(model: Any) -> tuple[str, list[nn.Module]]:
    """(name of their list in the model, the layers of its decoder).

    Raises:
        IncompatibleAdapters: it has none, or an encoder beside them.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise IncompatibleAdapters(
            f"{name} has an encoder: experts stand in the layers of decoders",
            hint="take a base that is a decoder alone",
        )
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    prefix = next((n for n, module in model.named_modules() if module is decoder), "")
    for n, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return ".".join(part for part in (prefix, n) if part), list(module)
    raise IncompatibleAdapters(f"{name} has no list of layers", hint="take a decoder")


def mlp_of(layer: nn.Module, model: Any, where: str) -> tuple[str, Mlp]:
    """(its name in the layer, the feed-forward part of one decoder layer).

    Args:
        where: the layer's name.

    Raises:
        IncompatibleAdapters: none of the layer's modules is one; says what was found. Or it is
            one that drops something else than its result in training.
    """
    seen = []
    for name, module in layer.named_modules():
        linear = _linear(module)
        if not name or len(linear) < 2 or not _takes_tokens(module):
            continue
        seen.append(f"{name} ({type(module).__name__}: {', '.join(linear)})")
        for found in _candidates(module, model):
            if _computes(found, width_of(model)):
                return name, replace(found, dropout=_dropout_of(found, f"{where}.{name}"))
    raise IncompatibleAdapters(
        f"{where} has no feed-forward part of the forms gate/up/down, gate_up/down or fc1/fc2; "
        + (f"found {'; '.join(seen)}" if seen else f"it is a {type(layer).__name__} of "
           + ", ".join(f"{n} ({type(m).__name__})" for n, m in layer.named_children())),
        hint="experts can be put on dense decoders of these forms",
    )  # fmt: skip


def _candidates(module: nn.Module, model: Any) -> Iterator[Mlp]:
    """All that ``module`` might be, the likeliest first."""
    linear = _linear(module)
    acts = _activations(module, model)
    for last in linear:
        inner, width = fans(linear[last])
        first = [name for name in linear if name != last]
        wide = [fans(linear[name]) for name in first]
        if any(fan_in != width for fan_in, _ in wide) or len(first) > 2:
            continue
        for act in acts:
            if len(first) == 2 and all(out == inner for _, out in wide):
                gates_first = sorted(first, key=lambda name: "gate" not in name and name != "w1")
                for order in permutations(gates_first):
                    yield Mlp(module, tuple(order), last, act, gated=True)
            elif len(first) == 1 and wide[0][1] == 2 * inner:
                for turned in (False, True):
                    yield Mlp(module, (first[0],), last, act, gated=True, turned=turned)
            elif len(first) == 1 and wide[0][1] == inner:
                yield Mlp(module, (first[0],), last, act, gated=False)


def _computes(mlp: Mlp, width: int) -> bool:
    """Whether the parts give what the module gives, of a few drawn tokens."""
    if mlp.width[0] != width:
        return False
    weight = next(mlp.module.parameters())
    if weight.device.type == "meta":
        return True
    x = _drawn(mlp, width)
    with _as_training(mlp.module, False), torch.no_grad():
        wanted, found = mlp.module(x), mlp.plain(x)
    return _alike(wanted, found, x.dtype)


def _drawn(mlp: Mlp, width: int) -> torch.Tensor:
    """[1, 4, width], a few tokens, the same each time."""
    weight = next(mlp.module.parameters())
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    drawn = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
    return drawn.to(weight.device, dtype)


def _alike(wanted: Any, found: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two results are the same; attention gives more than a tensor."""
    if not isinstance(wanted, torch.Tensor) or wanted.shape != found.shape:
        return False
    near = 1e-4 if dtype in {torch.float32, torch.float64} else 2e-2
    apart = torch.dist(wanted.double(), found.double())
    return bool(apart <= near * wanted.double().norm())


@contextmanager
def _as_training(module: nn.Module, training: bool) -> Iterator[None]:
    before = {each: each.training for each in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for each, was in before.items():
            each.training = was


def _dropout_of(mlp: Mlp, where: str) -> str | None:
    """The name of what the module drops its result by in training, see :class:`Mlp`.

    Raises:
        IncompatibleAdapters: it drops something else, or more.
    """
    shares = {n: m.p for n, m in mlp.module.named_children() if isinstance(m, nn.Dropout)}
    shares |= {n: v for n, v in vars(mlp.module).items() if "drop" in n and isinstance(v, float)}
    names = [name for name, share in shares.items() if share > 0]
    if not names:
        return None
    if len(names) == 1 and next(mlp.module.parameters()).device.type == "meta":
        return names[0]  # nothing can be tried out
    if len(names) == 1:
        x, share = _drawn(mlp, mlp.width[0]), shares[names[0]]
        with _seeded(x.device), _as_training(mlp.module, True), torch.no_grad():
            given = mlp.module(x)
        with _as_training(mlp.module, False), torch.no_grad():
            kept = mlp.plain(x) / ((1 - share) or 1)
        if _alike(given, kept.where(given != 0, 0), x.dtype):
            return names[0]
    raise IncompatibleAdapters(
        f"in training, {where} drops more than its result ({', '.join(names)}), which experts in "
        "its place cannot",
        hint=f"set {' and '.join(names)} of the base to 0",
    )


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Nothing drawn in the block is missed after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _activations(module: nn.Module, model: Any) -> list[Activation]:
    """What may stand between the linear modules: its own, then what the config names."""
    # What accelerate hangs on a module, `forward` and `_old_forward`, is the module itself.
    said = {n: v for n, v in vars(module).items() if n != "forward" and not n.startswith("_")}
    own = [held for held in (*module._modules.values(), *said.values()) if callable(held)]
    found = [held for held in own if not is_trainable(held) and not isinstance(held, nn.Dropout)]
    config, named = model.config.get_text_config(), []
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        name = getattr(config, key, None)
        if isinstance(name, str) and name in ACT2FN:
            named.append(ACT2FN[name])
    if not named:  # some call a function that nothing names
        named = [ACT2FN["silu"], ACT2FN["gelu"]]
    return [each for each in (*found, *named) if _is_elementwise(each)]


def _is_elementwise(act: Any) -> bool:
    return not isinstance(act, nn.Module) or not list(act.parameters(recurse=True))


def _takes_tokens(module: nn.Module) -> bool:
    """Whether it is called with tokens and nothing else."""
    wanted = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}
    ]
    return len(wanted) == 1


def _linear(module: nn.Module) -> dict[str, nn.Module]:
    return {name: held for name, held in module.named_children() if is_trainable(held)}
