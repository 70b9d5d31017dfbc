"""What HTTP through Ray Serve costs over the bare application, with Serve's own proxy and with HAProxy.

    python -m benchmarks.serving_cost

An engine without a model says a token every 20 ms to each client (benchmarks/stand_in.py); the application is the
product's, with all that stands before it. CPU time is that of the processes that the answer passes through: the
application, and the proxy if there is one. First tokens and gaps are as the clients see them.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from statistics import quantiles

import psutil

from benchmarks.fault_places import free_port, ray_environment
from benchmarks.processes import end_tree
from benchmarks.services import HAPROXY_PROCESS, PROXY, REPLICA, Service, haproxy_environment, service
from benchmarks.stand_in import NAME, config
from chatglm3.endpoint import Endpoint
from serve_app.load import Outcome, Prompt, at_once

TOKENS_PER_S, TOKENS, REQUESTS, CLIENTS = 50, 100, 300, (1, 8, 64)
ON_THE_WAY = (REPLICA, PROXY, HAPROXY_PROCESS)
QUESTION = [{"role": "user", "content": "介绍一下你自己。"}]


@contextmanager
def bare(tokens_per_s: float = TOKENS_PER_S, joins: bool = False) -> Iterator[Service]:
    """The application under uvicorn, in one process."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "benchmarks.stand_in:bare", "--port", str(port)]
    env = os.environ | {"TOKENS_PER_S": str(tokens_per_s), "OMP_NUM_THREADS": "1"} | ({"JOINS": "1"} if joins else {})
    process = subprocess.Popen([*command, "--log-level", "error"], env=env)
    running = Service(f"http://127.0.0.1:{port}", [process.pid])
    try:
        while not running.answers():
            time.sleep(0.1)
        yield running
    finally:
        end_tree(process.pid)
        process.wait()


@contextmanager
def behind_proxy(tokens_per_s: float = TOKENS_PER_S, joins: bool = False) -> Iterator[Service]:
    """Behind Ray Serve's own proxy, in Python."""
    with service(config(tokens_per_s, joins), ray_environment()) as running:
        yield running


@contextmanager
def behind_haproxy(tokens_per_s: float = TOKENS_PER_S, joins: bool = False) -> Iterator[Service]:
    """Behind HAProxy, as Ray Serve runs it."""
    with haproxy_environment() as env, service(config(tokens_per_s, joins), env) as running:
        yield running


PLACES = {"uvicorn alone": bare, "Ray Serve": behind_proxy, "Ray Serve, HAProxy": behind_haproxy}


def cpu_seconds(running: Service) -> float:
    """CPU time of the processes that an answer passes through, since their start."""
    found = [process for name in ON_THE_WAY for process in running.processes(name)]
    times = [process.cpu_times() for process in found or map(psutil.Process, running.roots)]
    return sum(each.user + each.system for each in times)


@dataclass
class Load:
    """What clients saw, and what it took."""

    outcomes: Sequence[Outcome]
    cpu_s: float

    def first_tokens_ms(self) -> list[float]:
        """From the request to the first text."""
        return [1000 * (one.texts[0] - one.sent) for one in self.outcomes]

    def gaps_ms(self) -> list[float]:
        """Between one text and the next."""
        return [1000 * gap for gap in chain.from_iterable(one.gaps for one in self.outcomes)]


async def load(running: Service, clients: int, requests: int, tokens: int) -> Load:
    """So many clients, each of whom asks again when answered."""
    async with Endpoint(running.url) as endpoint:
        await at_once(endpoint, NAME, [Prompt(QUESTION, 2)] * clients * 3, clients)  # warm, connections open
        before = cpu_seconds(running)
        outcomes = await at_once(endpoint, NAME, [Prompt(QUESTION, tokens)] * requests, clients)
        took = cpu_seconds(running) - before
    assert not any(outcome.error for outcome in outcomes), outcomes
    return Load(outcomes, took)


def p50_p99(values: Sequence[float]) -> str:
    """As a cell of the table."""
    cuts = quantiles(values, n=100)
    return f"{cuts[49]:.1f} / {cuts[98]:.1f}"


def token_us(short: Load, streams: Load) -> float:
    """CPU time of a streamed token: what streams took beyond what as many short answers do."""
    requests_s = short.cpu_s / len(short.outcomes) * len(streams.outcomes)
    return 1e6 * (streams.cpu_s - requests_s) / sum(one.completion_tokens for one in streams.outcomes)


def main() -> None:
    """Measure each place, print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| | clients | a request, ms (p50 / p99) | its CPU, ms | CPU a token, µs | between tokens, ms (p50 / p99) |")
    print("|---|--:|--:|--:|--:|--:|")
    alone_us: dict[int, float] = {}
    for name, place in PLACES.items():
        with place() as running:
            for clients in CLIENTS:
                short = asyncio.run(load(running, clients, REQUESTS, 2))
                streams = asyncio.run(load(running, clients, max(8, 4 * clients), TOKENS))
                us = token_us(short, streams)
                ratio = us / alone_us.setdefault(clients, us)
                cells = [name, str(clients), p50_p99(short.first_tokens_ms())]
                cells += [f"{1000 * short.cpu_s / len(short.outcomes):.1f}", f"{us:.0f} ({ratio:.1f}×)"]
                print(f"| {' | '.join([*cells, p50_p99(streams.gaps_ms())])} |", flush=True)


if __name__ == "__main__":
    main()
