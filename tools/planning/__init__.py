"""What a training step takes on a machine that is not there: work, hardware, and the model of time between them."""
