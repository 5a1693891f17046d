"""The operator that applies a mixture inside a loaded model.

Importing this makes ``LORA_MIXTURE`` known to PEFT and transformers.
"""

import lorahub_registry.runtime.peft_type  # noqa: F401
