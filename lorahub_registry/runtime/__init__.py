"""The operator that applies a mixture inside a loaded model.

Importing this makes ``LORA_MIXTURE``, ``MIXLORA``, ``LORAMOE`` and ``MOLA`` known to PEFT, and the
first of them to transformers.
"""

import lorahub_registry.runtime.mixlora
import lorahub_registry.runtime.peft_type
import lorahub_registry.runtime.plugged  # noqa: F401
