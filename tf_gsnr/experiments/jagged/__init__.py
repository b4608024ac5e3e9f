"""Why the GSNR jumps from epoch to epoch: the causes of figure 5a's jagged curve, each apart."""
