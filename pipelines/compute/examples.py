"""Rows that prepare wrote, as ids, and which of them are learned."""

import sys
from typing import Any

from chatglm3.chat import IGNORED, PromptFormat, example_ids, render
from chatglm3.errors import ModelError
from chatglm3.tokenizer import ChatGlmTokenizer


def encode(
    row: dict[str, Any],
    tokenizer: ChatGlmTokenizer,
    prompt_format: PromptFormat,
    max_input_length: int = sys.maxsize,
    max_output_length: int = sys.maxsize,
) -> tuple[list[int], list[bool]]:
    """The row's ids, and for each whether its prediction is learned. The bare format cuts both sides to their limits.

    Raises ModelError for a conversation in the bare format, and KeyError, TypeError or ValueError for what is no row.
    """
    if prompt_format == "bare":
        if "messages" in row:
            raise ModelError("a conversation has turns, which --prompt_format bare has not: give single questions")
        ids, labels = example_ids(tokenizer, row["instruction"], row["output"], max_input_length, max_output_length)
        return ids, [label != IGNORED for label in labels]
    if "messages" in row:
        return render(tokenizer, row["messages"], row.get("tools"))
    pair = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
    return render(tokenizer, pair)
