"""Where the experts run, and how long things take. Nothing of Megatron here."""
