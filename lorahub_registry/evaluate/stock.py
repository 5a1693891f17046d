"""An adapter's folder on a loaded base, as PEFT loads it: what users will run is judged.

A dynamic mixture is of a type of our own, which PEFT knows by ``lorahub_registry.runtime``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.tensors import PICKLE_NAME, WEIGHTS_NAME
from lorahub_registry.errors import NotApplied
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.runtime.fits import take_off
from lorahub_registry.runtime.moe_hooks import tidy


@contextmanager
def stock_peft(base: LoadedBase, folder: Path, *, is_trainable: bool = False) -> Iterator[Any]:
    """The adapter in ``folder`` on the base, loaded by stock PEFT; taken off again afterwards.

    Args:
        is_trainable: whether what of it can be trained requires gradients.

    Raises:
        NotApplied: PEFT cannot load it, or did not find a tensor for every place.
    """
    from peft import PeftModel

    # PEFT would ask the Hub for a repo of that path.
    if not any((folder / name).is_file() for name in (WEIGHTS_NAME, PICKLE_NAME)):
        raise NotApplied(f"{folder / WEIGHTS_NAME}: no such file, so there is nothing to load")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                wrapped = PeftModel.from_pretrained(
                    base.model, str(folder), is_trainable=is_trainable
                )
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                said = " ".join(str(error).split())[:200]
                raise NotApplied(f"{folder}: stock PEFT cannot load it: {said}") from error
        if missing := [w for w in caught if "missing adapter keys" in str(w.message)]:
            raise NotApplied(f"{folder}: stock PEFT says: {missing[0].message}")
        wrapped.eval()
        yield wrapped
    finally:
        unload(base.model)


def unload(model: Any) -> None:
    """Put the base's own modules back, also where PEFT stopped half-way."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    take_off(model)
    tuned = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name in tuned:
        model.set_submodule(name, model.get_submodule(name).get_base_layer())
    tidy(model)
    # PEFT leaves its config on the base, and warns about it at the next load.
    if hasattr(model, "peft_config"):
        del model.peft_config
