"""How training and serving grow with the number of GPUs: a worker, or a replica, on each.

    python -m benchmarks.several_gpus train --base /models/chatglm3-6b --data out/data
    python -m benchmarks.several_gpus train --count 1 2 --strategies ddp zero3 --formats nf4
    python -m benchmarks.several_gpus serve --model /models/fp8
    python -m benchmarks.several_gpus serve --model /models/fp8 --count 1 --tensor_parallel 2

Training is weak scaling through Ray Train: every worker computes one packed block a step, so a perfect machine takes as
long for eight workers as for one, and what it takes longer is the exchange of gradients and waiting for the slowest.
Tokens that are not padding count; the median of the timed steps. Serving is a closed loop of so many users for each
replica, behind Ray Serve with HAProxy; output tokens count. Efficiency is the rate of one over that of the
first line of the same kind, per GPU. Without GPUs the same runs on CPU processes, which share the cores.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.services import example_config, haproxy_environment, service
from chatglm3.endpoint import Endpoint
from cluster import session, storage
from pipelines.run.packing import PackingConfig, pack_split
from pipelines.run.progress import read_metrics
from pipelines.training import TrainConfig, train
from serve_app.load import Outcome, Prompt, at_once

WARM_UP = 5
READY_S = 400  # vLLM compiles, and captures CUDA graphs
SERVING_PROMPT = "根据公司的规定，介绍一下差旅费的报销流程。" * 40


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
    serving.add_argument("--tokens", type=int, default=128, help="of each answer (default: 128)")
    serving.add_argument("--tensor_parallel", type=int, default=1, help="GPUs of a replica (default: 1)")
    serving.set_defaults(lines=serving_lines, head="first token, p50, ms | between pieces, p50, ms | p99, ms")
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
    for count in chosen.count:
        config = example_config(count)
        [application] = config["applications"]
        [deployment] = application["deployments"]
        application["args"] |= {"model": chosen.model, "tensor_parallel": chosen.tensor_parallel}
        application["args"] |= {"name": "model", "max_batch": chosen.users}
        deployment |= {"max_ongoing_requests": chosen.users, "max_queued_requests": -1}
        with haproxy_environment() as env, service(config, env, count, ready_s=READY_S) as running:
            prompt = Prompt([{"role": "user", "content": SERVING_PROMPT}], chosen.tokens)
            users = chosen.users * count
            asyncio.run(_ask(running.url, [prompt] * users, users))
            outcomes = asyncio.run(_ask(running.url, [prompt] * 4 * users, users))
        failed = [outcome.error for outcome in outcomes if outcome.error]
        assert not failed, failed[:3]
        rate = sum(outcome.completion_tokens for outcome in outcomes) / max(outcome.ended for outcome in outcomes)
        waited = 1000 * median(outcome.texts[0] - outcome.sent for outcome in outcomes)
        gaps = quantiles((1000 * gap for outcome in outcomes for gap in outcome.gaps), n=100)
        gpus = count * chosen.tensor_parallel
        yield Line(
            f"{chosen.tensor_parallel} GPU a replica", gpus, rate, f"{waited:.0f} | {gaps[49]:.1f} | {gaps[98]:.1f}"
        )


async def _ask(url: str, prompts: list[Prompt], users: int) -> list[Outcome]:
    async with Endpoint(url) as endpoint:
        return await at_once(endpoint, "model", prompts, users)


if __name__ == "__main__":
    main()
