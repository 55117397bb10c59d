"""Devices and processes: meshes, signals, compilation."""
