"""Formats on disk: what is read, and what is written, with nothing unpickled that could run code."""
