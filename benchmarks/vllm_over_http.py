"""vLLM alone beside the whole HTTP path over it: output tokens a second, and the wait for the first of them.

    python -m benchmarks.vllm_over_http out/model-bf16 out/model-fp8 out/model-w4a16
    python -m benchmarks.vllm_over_http out/model-bf16 --places alone serve --at_once 1 8

Where it answers:
    alone      vLLM's offline interface, LLM.generate, started as the engine starts vLLM, in a process of its own
    async      vLLM's interface for servers, AsyncLLM.generate, a piece for each token, without any HTTP
    engine     this project's engine on top of that, whose pieces are joined, without any HTTP
    serve      `serve run`, Ray Serve's own proxy, one replica
    haproxy    the same with HAProxy as Serve's ingress
    engines    HAProxy with separate_engines=true: the engine in a replica of its own, behind two that speak HTTP

So many requests are sent at once, and the clock stops at the end of the last answer; then the next round. Prompts are
random ids, 64 to 1,022 of them (log-normal, 640 in the median), none asked twice; answers are greedy and 128 tokens
long unless the model ends them. The rate is all output tokens over all rounds' time. The wait is from a request's
sending to its first token, the median over all; vLLM alone counts it from when it takes the request. Two columns
compare: with the first place, and with the first model.
"""

import argparse
import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.fault_places import ray_environment
from benchmarks.services import example_config, haproxy_environment, service
from chatglm3.checkpoint import read_config
from chatglm3.endpoint import Endpoint
from chatglm3.engines import Sampling, load_engine

TOKENS = 128
WARM_UP = 32
READY_S = 400  # vLLM compiles, and captures CUDA graphs
NAME = "model"

Prompts = Sequence[list[int]]
Streams = Callable[[list[int]], AsyncIterator[int]]
"""What yields, for a prompt, how many tokens came each time."""


@dataclass
class Seen:
    """What came of the requests: seconds of each round, tokens of each answer, seconds to its first token and end."""

    rounds_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    answers_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Output tokens a second."""
        return sum(self.tokens) / sum(self.rounds_s)


def vocabulary_of(model: Path) -> int:
    """How many ids a prompt may be of."""
    return read_config(model).vocab_size - 1024  # the last rows of ChatGLM3's are nobody's


def rounds_of(at_once: int, vocabulary: int) -> Iterator[Prompts]:
    """Rounds of prompts, the same wherever they are asked."""
    chance = random.Random(at_once)
    for _ in range(max(2, 8 // at_once)):
        yield random_prompts(at_once, vocabulary, chance)


def random_prompts(count: int, vocabulary: int, chance: random.Random) -> Prompts:
    """Prompts of random ids, of the lengths that are measured with."""
    lengths = [max(64, min(1022, int(chance.lognormvariate(6.46, 0.55)))) for _ in range(count)]
    return [[chance.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def measure(ask: Callable[[Prompts, Seen], None], counts: Sequence[int], vocabulary: int) -> dict[int, Seen]:
    """Ask round after round for each of `counts`, after one that does not count."""
    chance = random.Random(0)
    ask([[chance.randrange(3, vocabulary) for _ in range(512)] for _ in range(min(WARM_UP, max(counts)))], Seen())
    found: dict[int, Seen] = {}
    for count in counts:
        found[count] = Seen()
        for prompts in rounds_of(count, vocabulary):
            began = time.perf_counter()
            ask(prompts, found[count])
            found[count].rounds_s.append(time.perf_counter() - began)
    return found


def alone(model: Path, counts: Sequence[int], vocabulary: int) -> dict[int, Seen]:
    """vLLM's offline interface."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # which gives the GPU's memory back at its end
        return process.submit(_alone, model, counts, vocabulary).result()


def _alone(model: Path, counts: Sequence[int], vocabulary: int) -> dict[int, Seen]:
    from vllm import LLM, SamplingParams

    from chatglm3.engines.vllm_engine import engine_arguments
    from chatglm3.tokenizer import load_tokenizer

    arguments = engine_arguments(model, max_batch=max(counts)) | {"disable_log_stats": False}  # which holds the waits
    engine = LLM(**arguments)
    stop_ids = list(load_tokenizer(model).stop_ids)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, stop_token_ids=stop_ids, detokenize=False)

    def ask(prompts: Prompts, seen: Seen) -> None:
        for output in engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False):
            seen.tokens.append(len(output.outputs[0].token_ids))
            seen.waits_s.append(output.metrics.first_token_latency)

    found = measure(ask, counts, vocabulary)
    engine.llm_engine.engine_core.shutdown()  # its process would be waited for without end
    return found


def inside(place: str, model: Path, counts: Sequence[int], vocabulary: int) -> dict[int, Seen]:
    """What a server has below its HTTP, in a process of its own: vLLM's asynchronous interface, or our engine."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_inside, place, model, counts, vocabulary).result()


def _inside(place: str, model: Path, counts: Sequence[int], vocabulary: int) -> dict[int, Seen]:
    with asyncio.Runner() as runner:  # the engine lives in one loop
        stream, close = runner.run(_STARTS[place](model, max(counts)))

        async def user(ids: list[int], seen: Seen) -> None:
            sent, waited, tokens = time.perf_counter(), 0.0, 0
            async for count in stream(ids):
                waited, tokens = waited or time.perf_counter() - sent, tokens + count
            seen.tokens.append(tokens)
            seen.waits_s.append(waited)

        async def ask_together(prompts: Prompts, seen: Seen) -> None:
            await asyncio.gather(*(user(ids, seen) for ids in prompts))

        try:
            return measure(lambda prompts, seen: runner.run(ask_together(prompts, seen)), counts, vocabulary)
        finally:
            close()


async def _start_async(model: Path, most: int) -> tuple[Streams, Callable[[], object]]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from chatglm3.engines.vllm_engine import engine_arguments
    from chatglm3.tokenizer import load_tokenizer

    arguments = AsyncEngineArgs(**engine_arguments(model, max_batch=most))
    engine = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)
    sampling = SamplingParams(
        temperature=0,
        max_tokens=TOKENS,
        stop_token_ids=list(load_tokenizer(model).stop_ids),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )

    async def stream(ids: list[int]) -> AsyncIterator[int]:
        async for output in engine.generate({"prompt_token_ids": ids}, sampling, uuid.uuid4().hex):
            yield len(output.outputs[0].token_ids)

    return stream, lambda: engine.shutdown(timeout=0)


async def _start_engine(model: Path, most: int) -> tuple[Streams, Callable[[], object]]:
    engine = load_engine("vllm", model, max_batch=most)

    async def stream(ids: list[int]) -> AsyncIterator[int]:
        async for delta in engine.generate(ids, Sampling(max_tokens=TOKENS)):
            yield len(delta.token_ids)

    return stream, engine.close


_STARTS = {"async": _start_async, "engine": _start_engine}


@contextmanager
def behind_serve(config: dict[str, Any], replicas: int) -> Iterator[str]:
    """Ray Serve's own proxy; yields where it answers."""
    with service(config, ray_environment(), replicas, ready_s=READY_S) as running:
        yield running.url


@contextmanager
def behind_haproxy(config: dict[str, Any], replicas: int) -> Iterator[str]:
    """HAProxy, as Ray Serve runs it."""
    with haproxy_environment() as env, service(config, env, replicas, ready_s=READY_S) as running:
        yield running.url


def over_http(place: str, model: Path, counts: Sequence[int], vocabulary: int) -> dict[int, Seen]:
    """The endpoint, at one of its places."""
    behind = behind_serve if place == "serve" else behind_haproxy
    separate = place == "engines"
    with behind(config_of(model, max(counts), separate), 3 if separate else 1) as url:

        def ask(prompts: Prompts, seen: Seen) -> None:
            asyncio.run(ask_all(url, prompts, len(prompts), seen))

        return measure(ask, counts, vocabulary)


def config_of(model: Path, most: int, separate: bool) -> dict[str, Any]:
    """A Serve config of one vLLM engine that answers `most` requests at a time."""
    config = example_config(1)
    [application] = config["applications"]
    [deployment] = application["deployments"]
    application["args"] |= {"model": str(model), "name": NAME, "engine": "vllm", "max_batch": most}
    application["args"] |= {"separate_engines": separate}
    deployment |= {"max_ongoing_requests": most, "max_queued_requests": -1}
    if separate:
        deployment["name"] = "EngineServer"
        application["deployments"].append({"name": "ChatServer", "num_replicas": 2, "max_queued_requests": -1})
    return config


async def ask_all(url: str, prompts: Prompts, users: int, seen: Seen) -> None:
    """So many users, each of whom asks again when he is answered."""
    waiting = iter(prompts)
    async with Endpoint(url) as endpoint:

        async def user() -> None:
            for ids in waiting:
                await _ask(endpoint, ids, seen)

        await asyncio.gather(*(user() for _ in range(users)))


async def _ask(endpoint: Endpoint, prompt: list[int], seen: Seen) -> None:
    body = {"model": NAME, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    sent, waited = time.perf_counter(), 0.0
    async with aclosing(endpoint.events("/v1/completions", body)) as events:
        async for event in events:
            waited = waited or time.perf_counter() - sent  # a stream begins with its first token
            if usage := event.get("usage"):
                seen.tokens.append(usage["completion_tokens"])
    seen.waits_s.append(waited)
    seen.answers_s.append(time.perf_counter() - sent)


def ask_at(place: str, model: Path, counts: Sequence[int], vocabulary: int) -> dict[int, Seen]:
    """Measure a model at one of the places."""
    if place == "alone":
        return alone(model, counts, vocabulary)
    return (inside if place in _STARTS else over_http)(place, model, counts, vocabulary)


def main() -> None:
    """Read the command line, measure each model at each place, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders that merge wrote")
    places = ("alone", "async", "engine", "serve", "haproxy", "engines")
    parser.add_argument("--places", nargs="+", choices=places, default=places, help="(default: all)")
    parser.add_argument("--at_once", nargs="+", type=int, default=[1, 8, 64, 256], help="(default: 1 8 64 256)")
    chosen = parser.parse_args()
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
    print("| model | place | at once | tokens/s | of the first place | of the first model | first token, ms |")
    print("|---|---|--:|--:|--:|--:|--:|", flush=True)
    found: dict[tuple[Path, str], dict[int, Seen]] = {}
    for model in chosen.models:
        vocabulary = vocabulary_of(model)
        for place in chosen.places:
            found[model, place] = ask_at(place, model.resolve(), chosen.at_once, vocabulary)
            for count, seen in found[model, place].items():
                of_place = seen.rate / found[model, chosen.places[0]][count].rate
                of_model = seen.rate / found[chosen.models[0], place][count].rate
                cells = [model.name, place, f"{count}", f"{seen.rate:,.0f}", f"{of_place:.1%}", f"{of_model:.2f}"]
                print(f"| {' | '.join([*cells, f'{1000 * median(seen.waits_s):.0f}'])} |", flush=True)


if __name__ == "__main__":
    main()
