"""How training and serving grow with the number of GPUs: a worker, or a replica, on each.

    python -m benchmarks.several_gpus train --base /models/chatglm3-6b --data out/data
    python -m benchmarks.several_gpus train --count 1 2 --strategies ddp zero3 --formats nf4
    python -m benchmarks.several_gpus serve --model /models/fp8
    python -m benchmarks.several_gpus serve --model /models/fp8 --count 1 --tensor_parallel 2

Training is weak scaling through Ray Train: every worker computes one packed block a step, so a perfect machine takes as
long for eight workers as for one, and what it takes longer is the exchange of gradients and waiting for the slowest.
Tokens that are not padding count; the median of the timed steps. Serving is a closed loop of so many users for each
replica, behind Ray Serve with HAProxy; prompts are random and answers 128 tokens, as in `vllm_over_http`; output tokens
count. Efficiency is the rate of one over that of the first line of the same kind, per GPU. Without GPUs the same runs
on CPU processes, which share the cores.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.vllm_over_http import Seen, ask_all, behind_haproxy, config_of, random_prompts, vocabulary_of
from chatglm3.folder import model_folder
from cluster import session, storage
from pipelines.run.packing import PackingConfig, pack_split
from pipelines.run.progress import read_metrics
from pipelines.training import TrainConfig, train

WARM_UP = 5
ANSWERS_A_USER = 4


@dataclass
class Line:
    """A line of the table."""

    kind: str
    count: int
    rate: float
    """Tokens a second of all together."""
    rest: str


def main() -> None:
    """Read the command line, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    training = parts.add_parser("train", help="tokens a second, and memory, by workers, strategy and base format")
    training.add_argument("--base", default="tiny", help="model folder (default: tiny)")
    training.add_argument("--data", required=True, help="folder that prepare wrote")
    training.add_argument("--strategies", nargs="+", default=["ddp", "zero2", "zero3"])
    training.add_argument("--formats", nargs="+", default=["nf4", "fp8"], help="formats of the base; fp8 goes with ddp")
    training.add_argument("--block_tokens", type=int, default=16384)
    training.add_argument("--steps", type=int, default=20, help="steps that count (default: 20)")
    training.set_defaults(lines=training_lines, head="step, s | memory, GB")
    serving = parts.add_parser("serve", help="output tokens a second, and latencies, by replicas")
    serving.add_argument("--model", default="tiny", help="folder that merge wrote (default: tiny)")
    serving.add_argument("--users", type=int, default=64, help="for each replica (default: 64)")
    serving.add_argument("--tensor_parallel", type=int, default=1, help="GPUs of a replica (default: 1)")
    serving.set_defaults(lines=serving_lines, head="first token, p50, ms | answer, p50, s | p99, s")
    for part in (training, serving):
        part.add_argument("--count", type=int, nargs="+", default=[1, 2, 4, 8], help="workers or replicas, in turn")
    chosen = parser.parse_args()
    columns = "--:|" * len(chosen.head.split("|"))
    print(f"| | GPUs | tokens/s | efficiency, % | {chosen.head} |\n|---|--:|--:|--:|{columns}")
    first: dict[str, Line] = {}
    for line in chosen.lines(chosen):
        start = first.setdefault(line.kind, line)
        share = 100 * line.rate / line.count * start.count / start.rate
        print(f"| {line.kind} | {line.count} | {line.rate:,.0f} | {share:.1f} | {line.rest} |", flush=True)


def training_lines(chosen: argparse.Namespace) -> Iterator[Line]:
    """A line for each format, strategy and number of workers."""
    session.connect()
    kinds = [(f, s) for f in chosen.formats for s in chosen.strategies if f != "fp8" or s == "ddp"]
    examples = _examples_of_a_block(TrainConfig(data=chosen.data, base=chosen.base, block_tokens=chosen.block_tokens))
    for base_format, strategy in kinds:
        for count in chosen.count:
            with tempfile.TemporaryDirectory() as folder:
                config = TrainConfig(
                    data=chosen.data,
                    base=chosen.base,
                    out=f"{folder}/adapter",
                    strategy=strategy,
                    base_format=base_format,
                    workers=count,
                    batch_size=max(1, round(count * examples)),
                    block_tokens=chosen.block_tokens,
                    max_steps=WARM_UP + chosen.steps,
                    epochs=10_000,
                    eval_steps=10**6,
                    save_steps=10**6,
                    score_rows=0,
                )
                adapter = Path(train(config))
                rows = read_metrics(adapter / "metrics.jsonl")
            yield _training_line(f"{base_format}, {strategy}", count, rows[WARM_UP:])


def _examples_of_a_block(config: TrainConfig) -> float:
    packing = PackingConfig(tokenizer=config.base, **config.model_dump(include=set(PackingConfig.model_fields)))
    with tempfile.TemporaryDirectory() as folder:
        blocks = pack_split(storage.open_folder(config.data, "prepare"), "train", packing, Path(folder))
        counts = storage.open_folder(blocks.parent).receipt.counts
    return counts["examples"] / counts["blocks"]


def _training_line(kind: str, count: int, rows: list[dict[str, float]]) -> Line:
    rate = median(row["tokens"] / row["seconds"] for row in rows)
    seconds = median(row["seconds"] for row in rows)
    memory = f"{rows[-1]['memory_gb']:.1f}" if torch.cuda.is_available() else "-"
    return Line(kind, count, rate, f"{seconds:.3f} | {memory}")


def serving_lines(chosen: argparse.Namespace) -> Iterator[Line]:
    """A line for each number of replicas."""
    model, chance = model_folder(chosen.model).resolve(), random.Random(0)
    for count in chosen.count:
        users, seen = chosen.users * count, Seen()
        config = config_of(model, chosen.users, separate=False)
        [application] = config["applications"]
        application["args"] |= {"engine": "auto", "tensor_parallel": chosen.tensor_parallel}
        application["deployments"][0]["num_replicas"] = count
        with behind_haproxy(config, count) as url:
            for answers, into in ((1, Seen()), (ANSWERS_A_USER, seen)):  # the first of each user does not count
                prompts = random_prompts(answers * users, vocabulary_of(model), chance)
                began = time.perf_counter()
                asyncio.run(ask_all(url, prompts, users, into))
                into.rounds_s.append(time.perf_counter() - began)
        last = quantiles(seen.answers_s, n=100)[98]
        times = f"{1000 * median(seen.waits_s):.0f} | {median(seen.answers_s):.2f} | {last:.2f}"
        yield Line(f"{chosen.tensor_parallel} GPU a replica", count * chosen.tensor_parallel, seen.rate, times)


if __name__ == "__main__":
    main()
