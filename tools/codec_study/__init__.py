"""The parts of tools/ablate_codec.py: arms, one training, many trainings, arithmetic, pictures."""
