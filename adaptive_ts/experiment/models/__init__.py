"""Networks: each equal to its authors' code for the same weights."""
