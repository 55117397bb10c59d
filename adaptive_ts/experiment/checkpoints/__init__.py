"""A run's checkpoints: saved, checked and found again."""
