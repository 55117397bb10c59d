"""What ``adaptive-ts`` needs: training, generation, evaluation and tables; the extra ``train``."""
