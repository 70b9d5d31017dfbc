"""The error of this package that is meant for people."""


class ModelError(ValueError):
    """A model, adapter or message that cannot be used: one line that names file and field, and the remedy."""
