"""The reference engine: `tf.vectorized_map` over `GradientTape` (`engine.py`)."""
