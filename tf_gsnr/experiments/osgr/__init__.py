"""Section 2.4: the one-step generalization ratio, predicted and measured."""
