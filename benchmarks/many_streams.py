"""A thousand streams held at once: the memory of those that serve them, and how evenly the tokens come.

    python -m benchmarks.many_streams                         # ten minutes, Ray Serve's own proxy
    python -m benchmarks.many_streams --haproxy               # the same behind HAProxy
    python -m benchmarks.many_streams --stream_minutes 1      # clients ask again when a stream has ended

Each client holds one stream at a time, of an engine without a model that says a token every half second
(benchmarks/stand_in.py). Memory is resident memory; the slope is a line's through the samples
after the first minute, or after half of a run that is shorter than two.
"""

import argparse
import asyncio
import time
from array import array
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import linear_regression, quantiles

import aiohttp

from benchmarks.fault_places import ray_environment
from benchmarks.services import HAPROXY_PROCESS, PROXY, REPLICA, Service, haproxy_environment, megabytes, service
from benchmarks.stand_in import NAME, config

TOKENS_PER_S, SAMPLE_S, RAMP_S = 2.0, 10, 20
WATCHED = {"replica": REPLICA, "proxy": PROXY, "haproxy": HAPROXY_PROCESS}


@dataclass
class Seen:
    """What the clients saw, and what the processes took."""

    gaps: "array[float]" = field(default_factory=lambda: array("f"))
    """Seconds between one event and the next, of all streams."""
    endings: Counter[str] = field(default_factory=Counter)
    open: int = 0
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Minutes since the start, and MB, of each kind of process."""


async def hold(session: aiohttp.ClientSession, url: str, tokens: int, seen: Seen) -> None:
    """One stream, to its end."""
    messages = [{"role": "user", "content": "介绍一下你自己。"}]
    body = {"model": NAME, "messages": messages, "max_tokens": tokens, "stream": True}
    ending, last = "broke off", 0.0
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            seen.open += 1
            try:
                async for line in response.content:
                    if line.startswith(b"data: [DONE]"):
                        ending = "complete"
                    elif line.startswith(b"data: "):
                        now = time.monotonic()
                        if last:
                            seen.gaps.append(now - last)
                        last = now
            finally:
                seen.open -= 1
    except aiohttp.ClientError as error:
        ending = type(error).__name__
    seen.endings[ending] += 1


async def watch(running: Service, seen: Seen) -> None:
    """Sample memory and print it, until cancelled."""
    began = time.monotonic()
    while True:
        await asyncio.sleep(SAMPLE_S)
        minutes = (time.monotonic() - began) / 60
        found = {kind: megabytes(running.processes(name)) for kind, name in WATCHED.items()}
        for kind, sizes in found.items():
            if sizes:
                seen.memory.setdefault(kind, []).append((minutes, sum(sizes)))
        sizes = ", ".join(f"{kind} {sum(sizes):.1f} MB" for kind, sizes in found.items() if sizes)
        print(f"{minutes:5.2f} min: {seen.open} streams, {len(seen.gaps)} gaps, {sizes}", flush=True)


async def client(session: aiohttp.ClientSession, url: str, tokens: int, seen: Seen, times: int) -> None:
    """One stream after the other."""
    for _ in range(times):
        await hold(session, url, tokens, seen)


async def hold_all(running: Service, streams: int, minutes: float, stream_minutes: float) -> Seen:
    """Open so many streams one after the other, and hold them until they end by themselves."""
    seen, tokens = Seen(), int(stream_minutes * 60 * TOKENS_PER_S)
    watching = asyncio.create_task(watch(running, seen))
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as clients:
        for _ in range(streams):
            clients.create_task(client(session, running.url, tokens, seen, round(minutes / stream_minutes)))
            await asyncio.sleep(RAMP_S / streams)
    watching.cancel()
    return seen


def report(seen: Seen, minutes: float) -> str:
    """What came of it."""
    cuts = quantiles(seen.gaps, n=100)
    lines = [f"streams: {', '.join(f'{count} {kind}' for kind, count in seen.endings.items())}"]
    lines.append(f"between tokens, s: p50 {cuts[49]:.3f}, p99 {cuts[98]:.3f}, longest {max(seen.gaps):.3f}")
    for kind, samples in seen.memory.items():
        held = [(at, size) for at, size in samples if min(1, minutes / 2) <= at <= minutes]  # all are open by then
        slope, _ = linear_regression(*zip(*held, strict=True))
        lines.append(f"{kind}: {held[0][1]:.1f} MB at first, {held[-1][1]:.1f} at last, {slope:+.2f} MB a minute")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, hold the streams, print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--stream_minutes", type=float, help="length of a stream; the whole time unless given")
    parser.add_argument("--haproxy", action="store_true", help="HAProxy instead of Ray Serve's own proxy")
    options = parser.parse_args()
    with ExitStack() as stack:
        env = stack.enter_context(haproxy_environment()) if options.haproxy else ray_environment()
        running = stack.enter_context(service(config(TOKENS_PER_S), env))
        length = options.stream_minutes or options.minutes
        seen = asyncio.run(hold_all(running, options.streams, options.minutes, length))
    print(report(seen, options.minutes))


if __name__ == "__main__":
    main()
