"""Cargos that are smaller than the tokens they stand for, and who makes them."""
