"""Weights: MixLoRA, LoRAMoE and MoLA between m-LoRA's pickles and PEFT's layout."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorahub_registry.adapters.bases import is_local_base
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.dynamic import FOLDER, folder_to_run
from lorahub_registry.adapters.facts import read_config
from lorahub_registry.adapters.mixlora import KINDS, MixLora, to_config
from lorahub_registry.api.experts_papers import Origin, origin_of, write_experts_papers
from lorahub_registry.api.output import check_output, new_folder, report_head, write_report
from lorahub_registry.api.publish import folder_of
from lorahub_registry.errors import IncompatibleAdapters, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry.index import record_of_folder
from lorahub_registry.registry.records import BaseRecord
from lorahub_registry.registry.store import Registry

Layout = Literal["peft", "mixlora"]
_CARD = "README.md"


@dataclass(frozen=True)
class Converted:
    """A folder that was written.

    Attributes:
        tensors: how many there are.
        notes: what one of m-LoRA's readers will not read.
        results: what ``results.json`` holds; None of m-LoRA's layout, which has none.
    """

    path: Path
    mix: MixLora
    tensors: int
    notes: tuple[str, ...]
    results: dict[str, Any] | None = None

    def report(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "path": str(self.path),
            "config": to_config(self.mix),
            "tensors": self.tensors,
            "notes": list(self.notes),
            **({"results": self.results} if self.results else {}),
        }


def convert_experts(
    place: str | Path,
    out: str | Path,
    layout: Layout,
    *,
    license: str | None = None,
    registry: Registry | None = None,
    timeout_s: float = 600.0,
    force: bool = False,
    progress: Progress = silent,
) -> Converted:
    """Write a MixLoRA, LoRAMoE or MoLA adapter in the other layout.

    For PEFT it gets a card of its own, which holds the source's, with its facts and a lock, and
    can be pushed; nothing is measured. For m-LoRA the source's card goes along as it is.

    Args:
        place: a folder, or a registered adapter's ref or name: with safetensors, or m-LoRA's
            ``adapter_model.bin``, which is read in a child process; of any age.
        out: a new folder.
        layout: ``peft``: safetensors and today's names, which
            ``peft.PeftModel.from_pretrained`` loads once ``lorahub_registry.runtime`` is
            imported; it is indexed, and names its base by no path. ``mixlora``: a float32
            ``adapter_model.bin``, which the packages ``mixlora`` and ``moe_peft`` read.
        license: of ``peft``; by default what the source's card says.
        force: replace what an earlier run wrote to ``out``.

    Raises:
        UsageError: a licence without a name, or one for m-LoRA's layout, which holds none.
        IncompatibleAdapters: another kind of adapter, or what the layout cannot hold.
        BrokenAdapter: config and tensors disagree, or are damaged.
        OutputError: ``out`` is not free.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return convert_experts(
                place, out, layout, license=license, registry=opened, timeout_s=timeout_s,
                force=force, progress=progress,
            )  # fmt: skip
    from lorahub_registry.weights.mixlora import read_any, write_mixlora, write_mlora

    if license is not None:
        _check_license(license, layout)
    source, target = folder_of(place, registry), Path(out)
    _check_kind(place, source, Path(out), layout)
    check_output(target, force=force, made_of=[source])
    with progress.task(f"Converting {source.name}"):
        mix, tensors = read_any(source, timeout_s=timeout_s)
        origin = origin_of(place, source, registry)
        base = origin.record.base
        if base.name and (mix.base is None or (layout == "peft" and _other(mix.base, base))):
            same = mix.base == base.name
            mix = replace(mix, base=base.name, revision=mix.revision if same else base.revision)
        notes: tuple[str, ...] = ()
        results: dict[str, Any] | None = None
        with new_folder(target, force=force) as folder:
            if layout == "peft":
                write_mixlora(folder, mix, tensors)
                results = write_experts_papers(folder, target.resolve().name, mix, origin, license)
            else:
                notes = write_mlora(folder, mix, tensors)
                if (source / _CARD).is_file():
                    shutil.copyfile(source / _CARD, folder / _CARD)
                write_report(folder, {**report_head("convert"), "layout": layout})
    target = target.resolve()
    if results is not None:
        registry.put(
            record_of_folder(
                target, base=base.name if base.how == "given" else None, progress=progress
            )
        )
        _warn(results, origin, progress)
    return Converted(target, mix, len(tensors), notes, results)


def _check_kind(place: str | Path, source: Path, out: Path, layout: Layout) -> None:
    """Whether it is not the root of a mixture, whose experts are in its part that decides.

    Raises:
        IncompatibleAdapters: the plain LoRA of a MixLoRA.
    """
    inner = folder_to_run(source)
    if inner == source or read_config(inner).peft_type not in KINDS:
        return
    kind = read_config(source).peft_type if (source / CONFIG_NAME).is_file() else "no adapter"
    if kind not in KINDS:
        raise IncompatibleAdapters(
            f"{place}: here it is {kind}; the experts of the mixture are in {FOLDER}/",
            hint=f"lorareg convert {inner} {out} --to {layout}",
        )


def _check_license(license: str, layout: Layout) -> None:
    if layout != "peft":
        raise UsageError(
            "a licence stands in a card, and m-LoRA's layout has none of its own",
            hint="--license goes with --to peft",
        )
    if not license.strip():
        raise UsageError("a licence without a name", hint="--license apache-2.0, or leave it out")


def _other(declared: str, base: BaseRecord) -> bool:
    """Whether a config is to say another base: somebody's path tells others nothing."""
    return base.how == "given" or is_local_base(declared)


def _warn(results: Mapping[str, Any], origin: Origin, progress: Progress) -> None:
    """Of what will keep it from being published."""
    if results["license"] is None:
        progress.warn(
            "its licence is unknown, and the unknown is not published: --license ID says it"
        )
    if results["base"]["name"] is None:
        progress.warn(
            "nothing tells its base, and so it cannot be published: say it by lorareg add "
            f"{origin.folder} --base ID, and convert again with --force"
        )
