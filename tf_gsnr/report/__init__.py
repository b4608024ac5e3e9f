"""Run directories -> RESULTS.md, its figures, and one HTML page. Never imports TensorFlow."""
