"""The table of methods that a recipe may name, which help, docs and cards read.

A new method is a class in :mod:`.static`, :mod:`.learned`, :mod:`.routed` or :mod:`.mixlora`, and
its place in :data:`.static.AnyStatic` or :data:`AnyMethod`.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from lorahub_registry.recipes.learned import Learn, LoraHub
from lorahub_registry.recipes.method import MethodBase
from lorahub_registry.recipes.mixlora import MixLora
from lorahub_registry.recipes.routed import Arrow, LoraFlow, PromptRouter
from lorahub_registry.recipes.static import AnyStatic

AnyMethod = AnyStatic | Learn | LoraHub | LoraFlow | Arrow | PromptRouter | MixLora
Method = Annotated[AnyMethod, Field(discriminator="type")]
METHODS: dict[str, type[MethodBase]] = {cls.name(): cls for cls in get_args(AnyMethod)}
"""``method.type`` → its class, in the order in which help lists them."""
