"""Rows of configs compared with each other."""
