"""What is in a checkpoint, without running it."""
