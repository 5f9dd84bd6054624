"""The parts of slow_link.py."""
