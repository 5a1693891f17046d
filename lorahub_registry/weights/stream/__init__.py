"""Checkpoints read and written tensor by tensor: nothing here holds a whole model."""
