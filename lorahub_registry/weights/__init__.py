"""Tensors in, tensors out: low-rank deltas and their exact algebra."""
