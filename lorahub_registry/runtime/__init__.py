"""The operator that applies a mixture inside a loaded model."""
