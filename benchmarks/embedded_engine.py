"""The embedded engine on a GPU, with CUDA graphs and without: output tokens a second.

    python -m benchmarks.embedded_engine out/model-bf16 out/model-nf4

So many requests are sent at once, each a prompt of 512 random ids with a greedy answer of 128 tokens, after a round
that does not count.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from chatglm3 import load_model, load_tokenizer
from chatglm3.engines import Sampling, complete
from chatglm3.engines.decode_graphs import cuda_captures
from chatglm3.engines.transformers_engine import TransformersEngine

PROMPT, TOKENS = 512, 128


def rate(engine: TransformersEngine, at_once: int, seed: int) -> float:
    """Output tokens a second of one round."""
    chance = random.Random(seed)
    sampling = Sampling(max_tokens=TOKENS)
    prompts = [[chance.randrange(3, 60_000) for _ in range(PROMPT)] for _ in range(at_once)]

    async def ask() -> int:
        answers = await asyncio.gather(*(complete(engine, ids, sampling) for ids in prompts))
        return sum(len(answer.token_ids) for answer in answers)

    began = time.perf_counter()
    return asyncio.run(ask()) / (time.perf_counter() - began)


def rates(model: Path, counts: Sequence[int], has_graphs: bool) -> list[float]:
    """Of a model, for each number of requests."""
    native = load_model(model, dtype=torch.bfloat16, device_map="cuda:0")
    captures = cuda_captures if has_graphs else None
    engine = TransformersEngine(native, load_tokenizer(model), max_batch=max(counts), captures=captures)
    try:
        for count in counts:
            rate(engine, count, seed=1)
        return [rate(engine, count, seed=2) for count in counts]
    finally:
        engine.close()


def main() -> None:
    """Read the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders that merge wrote")
    parser.add_argument("--at_once", nargs="+", type=int, default=[1, 8, 32], help="(default: 1 8 32)")
    chosen = parser.parse_args()
    print(torch.cuda.get_device_name())
    print("| model | at once | kernel by kernel, tokens/s | graphs, tokens/s | times |")
    print("|---|--:|--:|--:|--:|", flush=True)
    for model in chosen.models:
        plain, graphs = (rates(model, chosen.at_once, has_graphs) for has_graphs in (False, True))
        for count, slow, fast in zip(chosen.at_once, plain, graphs, strict=True):
            print(f"| {model.name} | {count} | {slow:,.0f} | {fast:,.0f} | {fast / slow:.1f} |", flush=True)


if __name__ == "__main__":
    main()
