"""What every method of a recipe shares: what it is called, where it comes from, who gives c."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from pydantic import ConfigDict

from lorahub_registry.recipes.fields import Strict


@dataclass(frozen=True)
class MethodInfo:
    """What a method is, for help, docs and cards.

    Attributes:
        title: in a few words.
        summary: one sentence: what it computes.
        paper: the title of the work it comes from.
        link: where that work is.
    """

    title: str
    summary: str
    paper: str
    link: str


class MethodBase(Strict):
    """What all methods share.

    Attributes:
        info: title and paper.
        coefficients: ``given`` in the recipe, one an adapter; ``learned`` from its rows; or
            ``routed``: decided while the mixture runs.
        dynamic: whether they change from token to token, or from prompt to prompt.
        form: what they multiply: ``delta``, ``factor`` or ``entries``; a field where it is an
            option.
    """

    # A recipe must say the type; only Python code may leave it out.
    model_config = ConfigDict(json_schema_extra={"required": ["type"]})

    info: ClassVar[MethodInfo]
    coefficients: ClassVar[Literal["given", "learned", "routed"]]
    dynamic: ClassVar[bool] = False

    type: str  # here, so that it is written first

    @classmethod
    def name(cls) -> str:
        """What a recipe writes as ``method.type``."""
        return str(get_args(cls.model_fields["type"].annotation)[0])

    @property
    def learns(self) -> bool:
        """Whether it needs ``data.train``."""
        return self.coefficients == "learned"

    @property
    def reads_train(self) -> bool:
        """Whether it reads ``data.train`` where the recipe has it."""
        return self.coefficients != "given"
