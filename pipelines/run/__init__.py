"""A training run: its settings and plan, workers, checkpoints, progress, report."""
