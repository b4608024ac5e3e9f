"""Full-batch gradient descent: of one model, of an ensemble as one program, on many devices."""
