"""Section 3.3: weights, and the change of their gradients."""
