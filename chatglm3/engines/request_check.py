"""What every engine refuses before it takes a request, so that no request can end an engine."""

from collections.abc import Sequence

from chatglm3.engines import Sampling
from chatglm3.engines.request_errors import PromptTooLong, RequestError


def check_request(prompt_ids: Sequence[int], sampling: Sampling, vocabulary: int, context_length: int) -> None:
    """RequestError for ids that a vocabulary of that size does not have, PromptTooLong for too many of them."""
    if not prompt_ids:
        raise RequestError("the prompt is empty")
    if len(prompt_ids) + sampling.max_tokens > context_length:
        raise PromptTooLong(
            f"the prompt's {len(prompt_ids)} tokens and max_tokens {sampling.max_tokens} together exceed the "
            f"model's context of {context_length} tokens; shorten the prompt or lower max_tokens"
        )
    if not all(0 <= token < vocabulary for token in prompt_ids):
        raise RequestError(f"the prompt has ids outside of the vocabulary of {vocabulary}")
    if not all(0 <= token < vocabulary for token, _ in sampling.logit_bias):
        raise RequestError(f"logit_bias has ids outside of the vocabulary of {vocabulary}")
