"""The seam to Megatron-Core: every private or version-sensitive name that we use. Importing it imports nothing."""
