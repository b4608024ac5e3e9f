"""Section 3.1: GSNR while networks learn real labels and random ones."""
