"""From facts to a README.md: the card of a mixture or of an adapter, as the Hub shows it.

Facts come from the adapter's own files: ``results.json``, and the recipe or factory that made it.
The templates in ``cards/`` are ``mixture``, ``adapter`` (trained), ``converted`` (gates) and
``experts`` (a converted MixLoRA, LoRAMoE or MoLA). Whatever is shown is escaped, and a missing
fact is an error, not a gap.
"""

from lorahub_registry.card.files import (
    FACTORY_NAME,
    GATES_NAME,
    LOG_NAME,
    LOSS_NAME,
    RECIPE_NAME,
    RESULTS_NAME,
    TRACE_NAME,
    is_generated,
    read_results,
    write_card,
)
from lorahub_registry.card.front import (
    holds_experts,
    is_converted,
    is_trained,
    license_id,
    metadata,
)
from lorahub_registry.card.markdown import cell, code, fence, literal, plusminus
from lorahub_registry.card.page import render

__all__ = [
    "FACTORY_NAME",
    "GATES_NAME",
    "LOG_NAME",
    "LOSS_NAME",
    "RECIPE_NAME",
    "RESULTS_NAME",
    "TRACE_NAME",
    "cell",
    "code",
    "fence",
    "holds_experts",
    "is_converted",
    "is_generated",
    "is_trained",
    "license_id",
    "literal",
    "metadata",
    "plusminus",
    "read_results",
    "render",
    "write_card",
]
