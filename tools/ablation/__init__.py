"""The parts of tools/ablate_overlap.py: arms, measuring on the ranks, arithmetic, pictures."""
