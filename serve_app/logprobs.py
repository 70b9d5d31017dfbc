"""Logprobs of tokens in OpenAI's two shapes."""

from collections.abc import Sequence

from chatglm3.engines import TokenLogprob
from chatglm3.tokenizer import ChatGlmTokenizer
from serve_app.chat_schema import ContentLogprob, TopLogprob

LEAST = -9999.0
"""What OpenAI puts for the logprob of a token that could not come; minus infinity is no JSON."""


def content_logprob(tokenizer: ChatGlmTokenizer, found: TokenLogprob) -> ContentLogprob:
    """A token of a chat completion."""
    top = [_top(tokenizer, token, logprob) for token, logprob in found.top]
    return ContentLogprob(**_top(tokenizer, found.token_id, found.logprob).model_dump(), top_logprobs=top)


def text_logprobs(
    tokenizer: ChatGlmTokenizer, tokens: Sequence[TokenLogprob], offsets: Sequence[int]
) -> dict[str, list[object]]:
    """The tokens of a completion, which begin at these places in its text."""
    return {
        "tokens": [token_text(tokenizer, found.token_id) for found in tokens],
        "token_logprobs": [max(found.logprob, LEAST) for found in tokens],
        "top_logprobs": [
            # Two bytes that are one text, of a piece and of a byte: the more probable one is named.
            {token_text(tokenizer, token): max(logprob, LEAST) for token, logprob in reversed(found.top)}
            for found in tokens
        ],
        "text_offset": list(offsets),
    }


def token_text(tokenizer: ChatGlmTokenizer, token_id: int) -> str:
    """A token for people to read: its text, or a byte as \\xHH."""
    piece = tokenizer.piece(token_id)
    return f"\\x{piece[0]:02x}" if isinstance(piece, bytes) else piece.replace("▁", " ")


def token_bytes(tokenizer: ChatGlmTokenizer, token_id: int) -> bytes:
    """What a token adds to a text."""
    piece = tokenizer.piece(token_id)
    return piece if isinstance(piece, bytes) else piece.replace("▁", " ").encode()


def _top(tokenizer: ChatGlmTokenizer, token_id: int, logprob: float) -> TopLogprob:
    text, its_bytes = token_text(tokenizer, token_id), token_bytes(tokenizer, token_id)
    return TopLogprob(token=text, logprob=max(logprob, LEAST), bytes=list(its_bytes))
