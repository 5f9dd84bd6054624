"""The parts of preprocess_data.py, each importing only those before it: sources, encoding, workers, output."""
