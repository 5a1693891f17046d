"""An adapter as files: config, safetensors header, digest, card, skills, and what base it sits on.

Nothing here imports torch or unpickles.
"""
