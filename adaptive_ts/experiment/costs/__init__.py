"""What training costs: time, FLOPs, bytes and messages."""
