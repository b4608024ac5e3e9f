"""Run directories -> one HTML page; RESULTS.md where it is asked for. Never imports TensorFlow."""
