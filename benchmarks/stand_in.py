"""The API over an engine without a model, which says a token at a given pace: what is left is HTTP's and Serve's cost.

`build` is the application for Ray Serve; `uvicorn --factory benchmarks.stand_in:bare` is the same without Ray, its pace
in $TOKENS_PER_S, and with $JOINS as pieces like the vLLM engine's.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve import Application

from chatglm3.engines import AdapterFolders, Delta, Load, Sampling
from chatglm3.engines.pacing import Pacing
from chatglm3.stream import TextStream
from chatglm3.tiny import FOLDER
from chatglm3.tokenizer import load_tokenizer
from serve_app import front
from serve_app.metering import MeteredEngine
from serve_app.metrics import Metrics, Sink
from serve_app.ray_metrics import RaySink
from serve_app.routes import make_api

NAME = "stand-in"


class StandIn:
    """Answers every prompt with as many tokens as it may: a first word at once, and each other at its time."""

    healthy = True
    context_length = 8192
    max_batch = 1000
    adapters = AdapterFolders()

    def __init__(self, tokens_per_s: float, joins: bool = False) -> None:
        """`joins`: what is due is one piece, and pieces come at the pace of the vLLM engine's."""
        self._tokens_per_s, self._joins = tokens_per_s, joins
        self._pacing, self._tokenizer = Pacing(), load_tokenizer(FOLDER)
        self._word = max(self._tokenizer.encode("word"))

    @property
    def load(self) -> Load:
        """See `Engine.load`."""
        return Load(self._pacing.streams, waiting=0, waiting_tokens=0, cache_use=0.0)

    async def prepare(self, sampling: Sampling) -> None:
        """See `Engine.prepare`."""

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """See `Engine.generate`."""
        began, said, key = time.monotonic(), 1, object()
        text = TextStream(self._tokenizer, sampling.stop)
        with self._pacing.stream(key):
            last_s = (sampling.max_tokens - 2) / self._tokens_per_s
            asyncio.get_running_loop().call_later(last_s, self._pacing.end, key)
            yield Delta("\n", (self._word,))  # ends ChatGLM3's metadata line
            while (left := sampling.max_tokens - said) > 0:
                if self._joins:
                    await self._pacing.pause(key)
                await asyncio.sleep(began + (said - 1) / self._tokens_per_s - time.monotonic())
                due = 2 + int((time.monotonic() - began) * self._tokens_per_s) - said
                count = min(left, due) if self._joins else 1
                said += count
                words = (self._word,) * count
                yield Delta(text.push(words), words, "length" if count == left else None)

    def close(self) -> None:
        """See `Engine.close`."""


def api(tokens_per_s: float, sinks: list[Sink], behind_serve: bool, joins: bool = False) -> FastAPI:
    """The API with all that stands before it."""
    args = front.FrontArgs(request_timeout_s=0)
    metrics = Metrics(NAME, sinks)
    engine = MeteredEngine(StandIn(tokens_per_s, joins), metrics)
    made = make_api(engine, load_tokenizer(FOLDER), NAME, "chat", on_answer=metrics.answered)
    front.install(made, args, engine, metrics, behind_serve=behind_serve)
    return made


def bare() -> FastAPI:
    """Without Ray."""
    return api(float(os.environ["TOKENS_PER_S"]), [], behind_serve=False, joins="JOINS" in os.environ)


class StandInArgs(BaseModel):
    """Arguments of the application."""

    tokens_per_s: float
    """Of each answer."""
    joins: bool = False
    """Whether what is due is one piece."""


def build(args: StandInArgs) -> Application:
    """With Ray Serve."""
    return StandInServer.bind(args)  # type: ignore[attr-defined]  # Serve's decorator adds it


def config(tokens_per_s: float, joins: bool = False) -> dict[str, Any]:
    """A Serve config file of the application."""
    application = {"name": NAME, "route_prefix": "/", "import_path": "benchmarks.stand_in:build"}
    application |= {"args": {"tokens_per_s": tokens_per_s, "joins": joins}}
    # Serve's access log would be a line a request, in both.
    return {"logging_config": {"enable_access_log": False}, "applications": [application]}


@serve.deployment(max_ongoing_requests=2000)
@serve.ingress()
class StandInServer:
    """Serves as `serve_app.app.ChatServer` does."""

    def __init__(self, args: StandInArgs) -> None:
        self._args = args

    def __serve_build_asgi_app__(self) -> FastAPI:
        sinks: list[Sink] = [RaySink(serve.get_replica_context().replica_tag)]
        return api(self._args.tokens_per_s, sinks, behind_serve=True, joins=self._args.joins)
