"""Whether what gradients show early in training ranks the gap at its end."""
