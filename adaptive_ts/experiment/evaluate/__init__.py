"""How good a run's model is: its bound, gradients and images."""
