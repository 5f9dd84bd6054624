"""Megatron's models with our layers in them: one file for each of its containers."""
