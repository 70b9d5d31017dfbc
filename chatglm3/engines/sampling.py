"""Drawing the next token of each request from the model's logits."""

from collections import Counter
from collections.abc import Sequence
from random import Random

import numpy as np
import torch

from chatglm3.engines import Sampling, TokenLogprob


def steered(
    logits: torch.Tensor,
    samplings: Sequence[Sampling],
    answers: Sequence[Sequence[int]],
    allowed: Sequence[bytes | None],
) -> torch.Tensor:
    """`logits` [rows, vocabulary] after each row's bias and penalties, with -inf for what its guide does not allow.

    `answers` are the tokens that each row has drawn, `allowed` its guide's bits, lowest first, a token each.
    """
    steers = [row for row, sampling in enumerate(samplings) if _steers(sampling)]
    if not steers:
        return logits
    scores = logits.to(torch.float32, copy=True)
    for row in steers:
        sampling, answer, bits = samplings[row], answers[row], allowed[row]
        if sampling.logit_bias:
            tokens, biases = zip(*sampling.logit_bias, strict=True)
            scores[row].index_add_(0, _ids(tokens, scores), torch.tensor(biases, device=scores.device))
        if answer and (sampling.presence_penalty or sampling.frequency_penalty):
            counts = Counter(answer)
            penalties = [sampling.presence_penalty + sampling.frequency_penalty * count for count in counts.values()]
            scores[row, _ids(list(counts), scores)] -= torch.tensor(penalties, device=scores.device)
        if bits is not None:
            scores[row].masked_fill_(~_unpacked(bits, logits.shape[1]).to(scores.device), -torch.inf)
    return scores


def token_logprobs(
    logits: torch.Tensor, tokens: Sequence[int | None], samplings: Sequence[Sampling]
) -> list[tuple[TokenLogprob, ...]]:
    """For each row of the model's own `logits`: its token's logprob and the most probable ones, if it asks for them."""
    found: list[tuple[TokenLogprob, ...]] = [()] * len(tokens)
    for row, (token, sampling) in enumerate(zip(tokens, samplings, strict=True)):
        if token is None or sampling.logprobs is None:
            continue
        logprobs = logits[row].float().log_softmax(-1)
        values, ids = logprobs.topk(sampling.logprobs)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found[row] = (TokenLogprob(token, logprobs[token].item(), top),)
    return found


def next_tokens(logits: torch.Tensor, samplings: Sequence[Sampling], randoms: Sequence[Random]) -> list[int | None]:
    """The next token of each row of `logits` [rows, vocabulary]; None where they are no numbers, or no token may come.

    A row depends on its own logits, sampling and random numbers alone. One number a token is drawn, on the CPU, so
    that a seed means the same on every device.
    """
    tokens = logits.argmax(-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        uniforms = [randoms[row].random() for row in drawn]
        tokens[drawn] = _draw(logits[drawn].double(), [samplings[row] for row in drawn], uniforms)
    tokens[~logits.amax(-1).isfinite()] = -1
    return [token if token >= 0 else None for token in tokens.tolist()]


def _steers(sampling: Sampling) -> bool:
    return bool(sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty or sampling.guide)


def _ids(tokens: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tokens, device=like.device)


def _unpacked(bits: bytes, size: int) -> torch.Tensor:
    """`bits` as `size` booleans; those past its end, which the tokenizer has no tokens for, are False."""
    given = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[:size]
    return torch.from_numpy(np.pad(given, (0, size - len(given))).astype(bool))


def _draw(logits: torch.Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> torch.Tensor:
    """A token for each row: the place where its cumulative distribution passes its uniform number.

    The sum runs in vocabulary order, not by rank: rounding differs with the size of the batch, which swaps the ranks
    of nearly equal tokens but hardly moves the sum.
    """
    # The largest becomes 0 first, so that the smallest temperature does not make infinity minus infinity.
    scores = logits - logits.amax(-1, keepdim=True)
    probabilities = (scores / _column(scores, [sampling.temperature for sampling in samplings])).softmax(-1)
    if any(sampling.top_k or sampling.top_p < 1 for sampling in samplings):
        probabilities = _cut(probabilities, samplings)
    cumulative = probabilities.cumsum(-1)
    target = _column(scores, uniforms) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _cut(probabilities: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Set what top_k, then top_p of the rest, leave out to 0. The most probable token always stays."""
    vocabulary = probabilities.shape[1]
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocabulary, device=ordered.device)
    ordered = ordered.where(
        rank < _column(ordered, [min(sampling.top_k or vocabulary, vocabulary) for sampling in samplings]), 0
    )
    more_probable = ordered.cumsum(-1) - ordered
    limit = _column(ordered, [sampling.top_p for sampling in samplings]) * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(ordered).scatter(-1, order, ordered.where(more_probable < limit, 0))


def _column(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    """A number for each row, [rows, 1], on the device of `like`."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
