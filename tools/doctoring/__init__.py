"""The parts of doctor.py: one file for each subject that is checked, and what runs the checks on all ranks."""
