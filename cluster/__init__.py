"""Where work runs: configs, the command line, folders with receipts, the Ray session. Knows nothing of models."""
