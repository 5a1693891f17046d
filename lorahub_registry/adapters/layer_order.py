"""Layers by their names, in the order in which a model runs them."""

from __future__ import annotations


def layer_order(layer: str) -> list[tuple[int, str]]:
    """A key that sorts ``layers.2`` before ``layers.10``."""
    return [(int(p), "") if p.isdigit() else (0, p) for p in layer.split(".")]
