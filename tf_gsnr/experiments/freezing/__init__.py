"""Section 3.2: GSNR of the layers behind one that is frozen."""
