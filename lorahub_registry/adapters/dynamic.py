"""What the config of a dynamic mixture says: its experts, and what chooses among them.

PEFT drops keys that a config class does not declare, so all of it stands under one, ``mixture``,
with a version of its own. Nothing is loaded here; see ``runtime/`` for what computes with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from lorahub_registry.adapters.config import CONFIG_NAME, MAX_RANK
from lorahub_registry.errors import BrokenAdapter

PEFT_TYPE = "LORA_MIXTURE"
"""Its ``peft_type``: known to PEFT once ``lorahub_registry.runtime`` is imported."""
VERSION = 1
FOLDER = "dynamic"
"""Under a mixture's folder, which holds its plain LoRA: the part that decides."""

Site = Literal["model", "prompt", "layer", "module"]
"""Where coefficients are decided: never, for each prompt, on entering a layer, in each module."""


@dataclass(frozen=True)
class Expert:
    """One adapter of the mixture; its tensors are in the mixture's own file.

    Attributes:
        r: its rank on every module that ``rank_pattern`` does not name.
        rank_pattern: module (its full name) → rank; 0 where it does not sit.
        ref, revision: where it came from.
        digest: content digest of the adapter it came from, as the registry has it.
        sha256: of its tensors in the mixture's file.
    """

    name: str
    r: int
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    ref: str | None = None
    revision: str | None = None
    digest: str | None = None
    sha256: str | None = None

    def rank_of(self, module: str) -> int:
        """Its rank on ``module``; 0 where it does not sit."""
        return self.rank_pattern.get(module, self.r)


@dataclass(frozen=True)
class Constant:
    """The same coefficients everywhere.

    Attributes:
        coefficients: one an expert.
    """

    type: ClassVar[str] = "constant"
    coefficients: tuple[float, ...]

    @property
    def site(self) -> Site:
        """Nothing is decided."""
        return "model"


@dataclass(frozen=True)
class LoraFlow:
    """LoRA-Flow's gate (arXiv:2402.11455): ``softmax(W x / temperature) + b`` for each token.

    Attributes:
        per: what has a gate of its own: each decoder layer, whose input is the residual stream;
            each module, whose input is the module's own; or the model, which has the first layer's.
    """

    type: ClassVar[str] = "lora_flow"
    per: Literal["layer", "module", "model"] = "layer"
    temperature: float = 1.0

    @property
    def site(self) -> Site:
        """The first layer's gate decides for all, where the model has one."""
        return "module" if self.per == "module" else "layer"


@dataclass(frozen=True)
class Arrow:
    """Arrow (arXiv:2405.11157): how far each token lies along each expert's prototype."""

    type: ClassVar[str] = "arrow"
    top_k: int = 3
    temperature: float = 1.0
    site: ClassVar[Site] = "module"


@dataclass(frozen=True)
class PromptRouter:
    """The experts whose own rows lie nearest to the prompt in the base's hidden space.

    Attributes:
        layer: which hidden state, 0 being the embeddings.
    """

    type: ClassVar[str] = "prompt_router"
    top_k: int = 1
    temperature: float = 1.0
    layer: int = 0
    site: ClassVar[Site] = "prompt"


Router = Constant | LoraFlow | Arrow | PromptRouter
_ROUTERS: dict[str, type[Any]] = {r.type: r for r in (Constant, LoraFlow, Arrow, PromptRouter)}


@dataclass(frozen=True)
class Dynamic:
    """A mixture that decides as it runs.

    Attributes:
        sha256: of the router, its tensors, and whom it chooses among.
    """

    experts: tuple[Expert, ...]
    router: Router
    sha256: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The experts', in their order."""
        return tuple(expert.name for expert in self.experts)

    def ranks_on(self, module: str) -> tuple[int, ...]:
        """Each expert's rank on ``module``."""
        return tuple(expert.rank_of(module) for expert in self.experts)

    def dump(self) -> dict[str, Any]:
        """As it stands in the config."""
        experts = [{k: v for k, v in asdict(e).items() if v or k == "r"} for e in self.experts]
        router = {"type": self.router.type, **asdict(self.router)}
        return {"version": VERSION, "experts": experts, "router": router, "sha256": self.sha256}


def parse_dynamic(raw: Any, *, where: str) -> Dynamic:
    """Read what :meth:`Dynamic.dump` wrote.

    Raises:
        BrokenAdapter: it is none, is newer, or says what cannot be.
    """
    try:
        if raw["version"] != VERSION:
            raise BrokenAdapter(
                f"{where}: its mixture is of version {raw['version']}, and this program knows "
                f"{VERSION}",
                hint="pip install --upgrade lorareg",
            )
        found = Dynamic(
            tuple(Expert(**entry) for entry in raw["experts"]),
            _router(dict(raw["router"])),
            raw.get("sha256"),
        )
        _check(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise BrokenAdapter(f"{where}: its mixture cannot be read ({said})") from None
    return found


def folder_to_run(folder: Path) -> Path:
    """What of a mixture's folder is to be loaded: the part that decides, where it has one."""
    inner = folder / FOLDER
    return inner if (inner / CONFIG_NAME).is_file() else folder


def plain_instead(folder: Path) -> str:
    """What to take where a plain LoRA is wanted and ``folder`` holds a mixture that decides."""
    if (folder.parent / CONFIG_NAME).is_file():
        return f"it decides while it runs; its plain LoRA stands beside it: {folder.parent}"
    return "it decides while it runs; take the adapters that it is made of"


def _router(raw: dict[str, Any]) -> Router:
    kind = raw.pop("type")
    if kind not in _ROUTERS:
        raise ValueError(f"unknown router {kind!r}; known are {', '.join(sorted(_ROUTERS))}")
    if "coefficients" in raw:
        raw["coefficients"] = tuple(map(float, raw["coefficients"]))
    made: Router = _ROUTERS[kind](**raw)
    return made


def _check(found: Dynamic) -> None:
    names = found.names
    if not names or len(set(names)) < len(names):
        raise ValueError("its experts have no names of their own")
    for expert in found.experts:
        ranks = [expert.r, *expert.rank_pattern.values()]
        if not all(type(rank) is int and 0 <= rank <= MAX_RANK for rank in ranks):
            raise ValueError(f"expert {expert.name} has the ranks {sorted(set(ranks))}")
    router = found.router
    if isinstance(router, Constant):
        if len(router.coefficients) != len(names) or not all(
            map(math.isfinite, router.coefficients)
        ):
            raise ValueError(f"{len(names)} experts, {len(router.coefficients)} coefficients")
        return
    if not (router.temperature > 0 and math.isfinite(router.temperature)):
        raise ValueError(f"a temperature of {router.temperature}")
    if not isinstance(router, LoraFlow) and not 1 <= router.top_k <= len(names):
        raise ValueError(f"top_k {router.top_k} of {len(names)} experts")
    if isinstance(router, LoraFlow) and router.per not in {"layer", "module", "model"}:
        raise ValueError(f"gates per {router.per!r}")
