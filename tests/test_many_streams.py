"""A stream that is held for long: what the API keeps of it, counted byte by byte."""

import asyncio
import gc
import tracemalloc
from typing import Any

import orjson

from benchmarks import stand_in


def test_an_open_stream_keeps_nothing_of_a_token_but_its_text():
    api = stand_in.api(tokens_per_s=1e9, sinks=[], behind_serve=True)
    held = asyncio.run(bytes_held_at_events(api, {1000, 5000}))
    assert (held[5000] - held[1000]) / 4000 < len("word ") + 1


async def bytes_held_at_events(api: Any, events: set[int]) -> dict[int, int]:
    """Python's own memory when so many events of one stream have been sent."""
    fields = {"model": stand_in.NAME, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    body = orjson.dumps(fields | {"max_tokens": max(events)})
    requests = [{"type": "http.request", "body": body, "more_body": False}]
    held: dict[int, int] = {}
    sent = 0

    async def receive() -> Any:
        return requests.pop() if requests else await asyncio.Future()  # the client stays

    async def send(message: Any) -> None:
        nonlocal sent
        sent += message["type"] == "http.response.body"
        if sent in events and sent not in held:
            gc.collect()
            held[sent] = tracemalloc.get_traced_memory()[0]

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    path = "/v1/chat/completions"
    scope |= {"path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "client": ("127.0.0.1", 1)}
    tracemalloc.start()
    try:
        await api(scope | {"headers": [(b"content-type", b"application/json")]}, receive, send)
    finally:
        tracemalloc.stop()
    return held
