"""MixLoRA, LoRAMoE and MoLA as commands show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.dynamic import FOLDER
from lorahub_registry.adapters.experts import of_folder, of_mix, told
from lorahub_registry.adapters.mixlora import KINDS, parse_mixlora
from lorahub_registry.errors import AdapterError
from lorahub_registry.registry.records import AdapterRecord


def facts(record: AdapterRecord) -> dict[str, Any] | None:
    """What ``show --json`` holds of experts; None where an adapter has none.

    Of a composed mixture whose record is its plain LoRA's they are those of the part that decides.
    """
    try:
        if record.peft_type in KINDS:
            return of_mix(parse_mixlora(record.config, record.name), record.modules)
        return _inside(record)
    except AdapterError as error:  # indexed by a version that did not look, or changed since
        return {"problem": str(error)}


def _inside(record: AdapterRecord) -> dict[str, Any] | None:
    """What the part that decides says, where it is here and a MixLoRA."""
    if record.local_path is None:
        return None
    folder = Path(record.local_path) / FOLDER
    return of_folder(folder) if (folder / CONFIG_NAME).is_file() else None


def lines(record: AdapterRecord) -> list[tuple[str, str]]:
    """(title, what to say) for people; empty where an adapter has no experts."""
    found = facts(record)
    if found is None:
        return []
    if "problem" in found:
        return [("experts", str(found["problem"]))]
    return told(found)
