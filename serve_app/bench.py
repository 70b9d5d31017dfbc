"""A load on an endpoint, and how it held."""

import asyncio
import json
from dataclasses import asdict

from pydantic import Field, model_validator

from chatglm3.endpoint import Endpoint, read_api_key
from cluster.config import Config
from cluster.errors import StageError
from cluster.storage import publish, receipt_of
from serve_app.load import Outcome, Prompt, at_once, at_times, poisson
from serve_app.load_report import draw, print_summary, summarize
from serve_app.prompts import read_prompts


class BenchConfig(Config):
    """Ask a served model many questions at a time and say how long users waited.

    With --rate they come as users do, at random times, and do not wait for each other (open loop): what a service
    must be measured with. With --concurrency so many ask without a pause (closed loop), which shows the most it can do.
    Latencies count from when a request was due. A server may send several tokens as one piece of text: the time a token
    is over all that follow the first, the time between pieces is what users see.
    """

    url: str = "http://127.0.0.1:8000"
    """Server to ask."""
    api_key_file: str = ""
    """File with a key to it."""
    model: str = ""
    """Model or adapter to ask; the main one unless given."""
    rate: float | None = Field(None, gt=0)
    """Requests a second, on average."""
    concurrency: int | None = Field(None, ge=1)
    """Requests at a time."""
    requests: int = Field(100, ge=1)
    """How many in all."""
    prompts: str = ""
    """JSON Lines with `instruction`, `prompt`, `messages` or `prompt_tokens` (random text), and `max_tokens` if you
    like; or a folder that prepare wrote, whose dev rows are asked."""
    prompt_tokens: int = Field(256, ge=1)
    """About so long are the random texts that are sent without --prompts."""
    max_tokens: int = Field(128, ge=1)
    """Longest answer of rows that say nothing else."""
    warmup: int = Field(2, ge=0)
    """Requests before the first one that counts."""
    timeout_s: float = Field(300, gt=0)
    """Longest wait for a whole answer."""
    seed: int = 0
    """Of arrival times, of the order of the rows, and of random texts."""
    out: str = "out/bench"
    """Folder to write: summary.json, requests.jsonl and load.svg."""

    @model_validator(mode="after")
    def _has_one_loop(self) -> "BenchConfig":
        if (self.rate is None) == (self.concurrency is None):
            raise ValueError("give either --rate (requests a second) or --concurrency (requests at a time)")
        return self


def bench(config: BenchConfig) -> str:
    """Run the load, print the table, and return the folder that holds it."""
    prompts = read_prompts(
        config.prompts, config.warmup + config.requests, config.max_tokens, config.prompt_tokens, config.seed
    )
    outcomes = asyncio.run(_run(config, prompts))
    summary = summarize(outcomes)
    if not summary["answered"]:
        raise StageError(f"none of {len(outcomes)} requests to {config.url} was answered: {summary['errors']}")
    load = f"{config.rate:g} requests/s" if config.rate else f"{config.concurrency} at a time"
    title = f"{config.url}, {load}, {config.requests} requests"
    with publish(config.out, receipt_of("bench", config)) as folder:
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        lines = [json.dumps(asdict(outcome)) for outcome in outcomes]
        (folder / "requests.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        draw(outcomes, title, folder / "load.svg")
    print_summary(summary, title)
    print(f"picture: {config.out}/load.svg")
    return config.out


async def _run(config: BenchConfig, prompts: list[Prompt]) -> list[Outcome]:
    async with Endpoint(config.url, read_api_key(config.api_key_file), config.timeout_s) as endpoint:
        model = config.model or (await endpoint.models())[0]
        warmup, counted = prompts[: config.warmup], prompts[config.warmup :]
        await at_once(endpoint, model, warmup, 1)
        if config.rate:
            times = poisson(config.rate, len(counted), config.seed)
            return await at_times(endpoint, model, counted, times)
        assert config.concurrency
        return await at_once(endpoint, model, counted, config.concurrency)
