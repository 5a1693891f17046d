"""What stands beside a converted MixLoRA, LoRAMoE or MoLA: its facts, lock and card."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.bases import is_local_base
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.experts import of_folder
from lorahub_registry.adapters.facts import digest_of, read_facts
from lorahub_registry.adapters.mixlora import MixLora
from lorahub_registry.adapters.readme import read_card, sentences
from lorahub_registry.adapters.tensors import PICKLE_NAME, WEIGHTS_NAME, file_sha256
from lorahub_registry.api.gates_papers import command_digest, put_papers
from lorahub_registry.api.output import report_head
from lorahub_registry.errors import UnknownRef
from lorahub_registry.lock import Lock, Pin
from lorahub_registry.refs import expand
from lorahub_registry.registry.index import record_of
from lorahub_registry.registry.records import AdapterRecord, BaseRecord, RepoRecord
from lorahub_registry.registry.store import Registry

_README = "README.md"
_LANGUAGE = re.compile(r"[a-z]{2,3}\Z")  # what the Hub takes as one


@dataclass(frozen=True)
class Origin:
    """What is converted, and what is known of it.

    Attributes:
        record: the registry's, or what its files say where it is not registered.
        text: its card, or its repo's; "" where there is none.
    """

    folder: Path
    record: AdapterRecord
    text: str

    @property
    def ref(self) -> str | None:
        """``owner/name/sub``; None of a folder of the user's, which is never named."""
        record = self.record
        if record.repo.kind != "hub":
            return None
        return "/".join(p for p in (record.repo.name, record.subfolder) if p)


def origin_of(place: str | Path, folder: Path, registry: Registry) -> Origin:
    """What is known of ``folder``, which ``place`` has meant."""
    try:
        # A plain name may be a folder here and something else in the registry.
        named = str(folder) if expand(str(place)).is_dir() else str(place)
        record = registry.get(named).record
    except UnknownRef:
        text = _card_text(folder, "")
        card = read_card(text)
        repo = RepoRecord("local", str(folder), license=card.license)
        return Origin(folder, record_of(read_facts(folder), repo=repo, card=card), text)
    within = record.subfolder if record.repo.kind == "hub" else ""
    return Origin(folder, record, _card_text(folder, within))


def write_experts_papers(
    folder: Path, name: str, mix: MixLora, origin: Origin, license: str | None
) -> dict[str, Any]:
    """Write facts, lock and card beside the tensors in ``folder``; the facts.

    Args:
        name: what ``folder`` will be called.
        mix: what the config in ``folder`` says.
        license: the user's word, over the source's card.
    """
    found, record, card = read_facts(folder), origin.record, read_card(origin.text)
    said = card.license or record.repo.license
    notes = []
    if license and said and license.lower() != said.lower():
        notes.append(f"its licence was given as {license}, but its source's card says {said}")
    pickled = not (origin.folder / WEIGHTS_NAME).is_file()
    file = PICKLE_NAME if pickled else WEIGHTS_NAME
    # What the config says now; the path of an unknown base is told to nobody.
    base = mix.base if mix.base and not is_local_base(mix.base) else None
    known = record.base if record.base.name == base else BaseRecord(base)
    facts: dict[str, Any] = {
        "kind": "converted",
        "name": name,
        "base": {"name": base, "revision": known.revision, "digest": known.digest},
        "seq2seq": mix.task_type == "SEQ_2_SEQ_LM",
        "method": {"type": mix.kind.lower()},
        "made_by": _command(origin, name, license),
        "experts": of_folder(folder),
        "parameters": found.parameters,
        "dtype": found.dtype,
        "digest": digest_of(folder),
        "source": {
            "name": origin.ref or origin.folder.name,
            "ref": origin.ref,
            "revision": record.revision or None,
            "file": file,
            "sha256": file_sha256(origin.folder / file),
            "config_sha256": file_sha256(origin.folder / CONFIG_NAME),
            "pickle": pickled,
            "card": origin.text,
        },
        "skills": list(dict.fromkeys(skill.name for skill in record.skills)),
        "languages": [x for x in map(str.lower, card.languages) if _LANGUAGE.match(x)],
        "description": sentences(card.description, 2) or card.title,
        "license": license or said,
        "datasets": list(card.datasets),
        "notes": notes,
        "versions": report_head("convert")["versions"],
    }
    put_papers(folder, facts, _lock(facts))
    return facts


def _card_text(folder: Path, within: str) -> str:
    """The card in ``folder``; without one, that of its repo, in which it is at ``within``."""
    root = folder.parents[within.count("/")] if within else folder
    for place in (folder, root):
        if (place / _README).is_file():
            return (place / _README).read_text("utf-8", errors="replace")
    return ""


def _command(origin: Origin, name: str, license: str | None) -> str:
    """What made it, as one would type it; of folders, only names."""
    revision = origin.record.revision
    source = f"{origin.ref}@{revision}" if origin.ref and revision else origin.ref
    words = ["lorareg", "convert", source or origin.folder.name, name, "--to", "peft"]
    return shlex.join([*words, *(["--license", license] if license else [])])


def _lock(facts: Mapping[str, Any]) -> Lock:
    base, source = facts["base"], facts["source"]
    files = {CONFIG_NAME: source["config_sha256"], source["file"]: source["sha256"]}
    return Lock(
        recipe=command_digest(facts),
        base=Pin(base["name"] or "", base["revision"], digest=base["digest"]),
        adapters={source["name"]: Pin(source["name"], source["revision"], files)},
    )
