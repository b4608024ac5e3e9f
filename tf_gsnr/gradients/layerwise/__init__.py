"""The layer-wise engine: one forward pass, one backward, and a rule per layer (`engine.py`)."""
