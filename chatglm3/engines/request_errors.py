"""What a request is refused with before an engine sees it."""

from chatglm3.errors import ModelError


class RequestError(ValueError):
    """This request cannot be answered by any engine of this model; the message says why, with the numbers."""


class PromptTooLong(RequestError):
    """Prompt and answer do not fit into the model's context."""


class UnknownAdapter(RequestError):
    """There is no adapter of that name."""


class UnusableAdapter(ModelError):
    """The adapter's folder is damaged, or of another model."""
