"""Training adapters on one base, and the small self-made material that the quickstart mixes."""
