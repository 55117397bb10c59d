"""What images are compared in, and by."""
