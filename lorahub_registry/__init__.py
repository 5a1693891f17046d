"""Find, mix, prove and publish LoRA adapters.

    import lorahub_registry as lr

    lr.search(base="mistral-7b", skill="code")
    lr.pull("uukuguy/speechless-multi-loras-r64")
    mixture = lr.compose("recipe.yaml")
    print(mixture.verdict)
    lr.load(mixture.path).generate("Once upon a time")
    lr.push(mixture.path, "me/my-mixture")

Importing this is cheap: what needs torch or the Hub's client imports it when it is called.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lorahub_registry.api.dare import dare
    from lorahub_registry.api.explain import explain
    from lorahub_registry.api.extract import extract
    from lorahub_registry.api.find import pull, search, sync
    from lorahub_registry.api.index import add
    from lorahub_registry.api.lorahub import lorahub_inference, lorahub_learning
    from lorahub_registry.api.merge import merge
    from lorahub_registry.api.mix import Mixture, compose
    from lorahub_registry.api.publish import card, push
    from lorahub_registry.api.resize import resize
    from lorahub_registry.api.route import route
    from lorahub_registry.api.talk import Loaded, load
    from lorahub_registry.api.train import Trained, train
    from lorahub_registry.errors import LoraregError
    from lorahub_registry.registry.store import Registry

__all__ = [
    "Loaded",
    "LoraregError",
    "Mixture",
    "Registry",
    "Trained",
    "add",
    "card",
    "compose",
    "dare",
    "explain",
    "extract",
    "load",
    "lorahub_inference",
    "lorahub_learning",
    "merge",
    "pull",
    "push",
    "resize",
    "route",
    "search",
    "sync",
    "train",
]

_WHERE = {
    "Loaded": "api.talk",
    "LoraregError": "errors",
    "Mixture": "api.mix",
    "Registry": "registry.store",
    "Trained": "api.train",
    "add": "api.index",
    "card": "api.publish",
    "compose": "api.mix",
    "dare": "api.dare",
    "explain": "api.explain",
    "extract": "api.extract",
    "load": "api.talk",
    "lorahub_inference": "api.lorahub",
    "lorahub_learning": "api.lorahub",
    "merge": "api.merge",
    "pull": "api.find",
    "push": "api.publish",
    "resize": "api.resize",
    "route": "api.route",
    "search": "api.find",
    "sync": "api.find",
    "train": "api.train",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """Keeps ``lr.compose`` and ``lr.card`` the functions once the rooms so called are imported.

    ``from lorahub_registry.compose import …`` finds the room all the same.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
