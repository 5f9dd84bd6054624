"""Around Megatron's trainer: the command line, what is refused, checkpoints, and what happens between steps."""
