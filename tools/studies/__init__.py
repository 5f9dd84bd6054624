"""What ablate_overlap.py and ablate_codec.py share: figures with their spread, tables, plots, reports, requests."""
