"""What stands beside converted gates, and their mixture's entry in the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.compat import Member
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.dynamic import FOLDER, PEFT_TYPE
from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.adapters.tensors import PICKLE_NAME, WEIGHTS_NAME, file_sha256
from lorahub_registry.card import RESULTS_NAME, write_card
from lorahub_registry.lock import LOCK_NAME, Lock, Pin
from lorahub_registry.registry.index import record_of_folder
from lorahub_registry.registry.records import (
    BaseRecord,
    MemberRecord,
    MixtureRecord,
    StoredAdapter,
)
from lorahub_registry.registry.store import Registry

METHOD = "lora_flow"
UNMEASURED = "not measured here"


def member_facts(member: Member) -> dict[str, Any]:
    """Where an adapter came from, and what its file was; ``key`` is its folder in the source."""
    folder = Path(member.key)
    pickled = read_facts(folder).weights == "pickle"
    file = PICKLE_NAME if pickled else WEIGHTS_NAME
    return {
        "name": member.name,
        # A folder's path says whose machine this is; a name does not.
        "ref": member.ref or member.name,
        "revision": member.revision or None,
        "digest": member.digest,
        "ranks": sorted(member.facts.ranks),
        "license": member.license,
        "file": file,
        "files": {name: file_sha256(folder / name) for name in (CONFIG_NAME, file)},
        "pickle": pickled,
    }


def agreed_license(
    given: str | None, members: Sequence[Member], gates: str | None
) -> tuple[str | None, list[str]]:
    """(the mixture's licence, what is to be noted of it).

    It is the user's word, else what all adapters say, where the gates' card says nothing else.
    """
    each = {member.name: member.license for member in members} | {"the gates' card": gates}
    said = {name: text.strip() for name, text in each.items() if text and text.strip()}
    alike = {text.lower() for text in said.values()}
    if given is not None:
        others = [f"{name} says {text}" for name, text in said.items()
                  if text.lower() != given.lower()]  # fmt: skip
        return given, [f"it was given as {given}, but {', '.join(others)}"] if others else []
    if len(alike) == 1 and all(member.license for member in members):
        return next(iter(alike)), []
    told = ", ".join(f"{name} says {text}" for name, text in said.items())
    return None, [f"on its licence: {told}"] if said else []


def write_papers(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the facts, the lock and the card into a mixture's folder."""
    put_papers(folder, facts, _lock(facts))


def put_papers(folder: Path, facts: Mapping[str, Any], lock: Lock) -> None:
    """The same, of whatever was converted."""
    text = json.dumps(facts, indent=2) + "\n"
    (folder / RESULTS_NAME).write_text(text, encoding="utf-8")
    (folder / LOCK_NAME).write_text(lock.dumps(), encoding="utf-8")
    write_card(folder)


def enter(folder: Path, facts: Mapping[str, Any], registry: Registry) -> StoredAdapter:
    """Put the mixture and its lineage into the registry.

    Args:
        folder: where it stays.
    """
    base, members = facts["base"], facts["members"]
    # The words of its card are ours: they tell of no skill.
    record = replace(
        record_of_folder(folder, name=facts["name"]),
        base=BaseRecord(base["name"], "given", base["name"], base["revision"], base["digest"]),
        description=f"{len(members)} adapters by published gates: {UNMEASURED}",
        skills=(),
        scores=(),
    )
    lineage = MixtureRecord(
        name=facts["name"],
        method=METHOD,
        # No recipe made it; a command did.
        recipe_yaml=f"# {facts['made_by']}\n",
        recipe_digest=command_digest(facts),
        seed=0,
        verdict=UNMEASURED,
        members=tuple(
            MemberRecord(m["ref"], m["name"], m["coefficient"], digest=m["digest"]) for m in members
        ),
    )
    return registry.add_mixture(record, lineage)


def routing_facts(
    names: Sequence[str], plain: Mapping[str, Sequence[float]], temperature: float
) -> dict[str, Any]:
    """What decides, as a composed mixture's results say it.

    Args:
        plain: layer → each adapter's coefficient in the plain LoRA.
    """
    return {
        "type": METHOD,
        "per": "layer",
        "temperature": temperature,
        "folder": FOLDER,
        "peft_type": PEFT_TYPE,
        "mean": {layer: dict(zip(names, each, strict=True)) for layer, each in plain.items()},
    }


def _lock(facts: Mapping[str, Any]) -> Lock:
    base, gates = facts["base"], facts["gates"]
    named = gates["ref"] or gates["file"]
    return Lock(
        recipe=command_digest(facts),
        base=Pin(base["name"], base["revision"], digest=base["digest"]),
        adapters={
            m["name"]: Pin(m["ref"], m["revision"], m["files"], m["digest"])
            for m in facts["members"]
        },
        data={"gates": Pin(named, gates["revision"], {gates["file"]: gates["sha256"]})},
    )


def command_digest(facts: Mapping[str, Any]) -> str:
    """Over the command that made it, which says all that was chosen: in the place of a recipe's."""
    return sha256(facts["made_by"].encode()).hexdigest()
