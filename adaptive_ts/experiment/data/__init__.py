"""Data sets: found, prepared, read and batched."""
