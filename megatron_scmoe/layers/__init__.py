"""A group of blocks and its parts; ``group.py`` is the file to read first."""
