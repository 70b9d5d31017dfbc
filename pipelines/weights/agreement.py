"""How far a model is from the one it was made of: next-token distributions at the answers of a data set's dev rows."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import GlmForCausalLM

from chatglm3 import load_tokenizer
from chatglm3.chat import PromptFormat
from cluster.errors import StageError
from cluster.progress import track
from pipelines.compute.examples import encode
from pipelines.rows.lines import cut, read_line, read_lines
from pipelines.scores.metrics import by_group, resampled_sums

MOST_TOKENS = 2048
"""Answer tokens that are compared: their distributions over 65,024 ids take 0.5 GB, and 2,000 tell a KL to a few %."""


@dataclass(frozen=True)
class Example:
    """A row as ids, and which of them are learned."""

    ids: list[int]
    is_target: list[bool]
    group: str
    """Of documents, as in `questions.groups_of`."""


@dataclass(frozen=True)
class Agreement:
    """A model beside the reference, at each answer token, all means over tokens."""

    kl: float
    """Kullback-Leibler divergence of its distribution from the reference's, in nats."""
    top1: float
    """Share of the tokens that both find the likeliest."""
    loss: float
    """Its cross-entropy on the right tokens, in nats."""
    losses: tuple[tuple[float, int], ...] = ()
    """The same summed up over each example's tokens, and how many these are."""


def shuffled_examples(data: Path, split: str, folder: Path | str, prompt_format: PromptFormat) -> Iterator[Example]:
    """Rows of the split in a random order that is always the same. StageError if there are none."""
    # A few rows are wanted, of a split of any size.
    pieces = [piece for file in sorted((data / split).glob("*.jsonl")) for piece in cut(file)]
    places = [(piece.path, line.offset) for piece in pieces for line in read_lines(piece)]
    if not places:
        raise StageError(f"--data {data} has no {split} rows to go by; prepare again, or give another folder")
    random.Random(0).shuffle(places)
    tokenizer = load_tokenizer(folder)
    rows = (json.loads(read_line(path, offset)) for path, offset in places)
    return (
        Example(*encode(row, tokenizer, prompt_format), str(row.get("group", f"row {number}")))
        for number, row in enumerate(rows)
    )


def take(examples: Iterable[Example], most: int, size: Callable[[Example], int]) -> list[Example]:
    """The first examples whose sizes together come to `most`, or all."""
    taken, total = [], 0
    for example in examples:
        taken.append(example)
        total += size(example)
        if total >= most:
            break
    return taken


@torch.inference_mode()
def answer_distributions(model: GlmForCausalLM, examples: list[Example], what: str) -> list[Tensor]:
    """Log probabilities of the next token before each answer token, one [targets, vocabulary] in fp32 an example."""
    device = next(model.parameters()).device
    found = []
    for example in track(examples, f"measure {what}", len(examples)):
        ids = torch.tensor([example.ids], device=device)
        before = torch.tensor(example.is_target[1:]).nonzero().flatten().to(device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=before).logits[0]
        found.append(logits.float().log_softmax(-1).cpu())
    return found


def compare(reference: Iterable[Tensor], found: Iterable[Tensor], examples: list[Example]) -> Agreement:
    """The agreement of two models' distributions."""
    kl = same = 0.0
    losses: list[tuple[float, int]] = []
    for wanted, given, example in zip(reference, found, examples, strict=True):
        right = torch.tensor(example.ids[1:])[torch.tensor(example.is_target[1:])]
        kl += float((wanted.exp() * (wanted - given)).sum())
        same += float((wanted.argmax(-1) == given.argmax(-1)).sum())
        losses.append((-float(given.gather(1, right[:, None]).sum()), len(right)))
    loss, tokens = map(sum, zip(*losses, strict=True))
    return Agreement(kl / tokens, same / tokens, loss / tokens, tuple(losses))


def loss_apart(new: Agreement, old: Agreement, examples: list[Example]) -> tuple[float, float]:
    """95 % interval of how far the new model's loss is above the old one's: the paired bootstrap (Koehn 2004) over
    document groups.
    """
    both = np.hstack([np.array(new.losses), np.array(old.losses)])
    (sums,) = resampled_sums([by_group(both, [example.group for example in examples])])
    apart = (sums[:, 0] - sums[:, 2]) / sums[:, 1]
    low, high = np.quantile(apart, (0.025, 0.975))
    return float(low), float(high)
