"""Which prediction of the generalisation gap holds through training."""
