"""Tokens on their way to the experts and back: the halves of a collective, flights, and plain tokens as cargo."""
