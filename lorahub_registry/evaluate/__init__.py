"""One loaded base and many adapters: rows become tokens, tokens become scores, scores a verdict."""
