"""What answers are worth: questions, metrics, comparisons, the gate, their reports."""
