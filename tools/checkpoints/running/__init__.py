"""A checkpoint as a model that runs forward, on any layout; and two of them compared."""
