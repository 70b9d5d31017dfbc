"""What users of the endpoint see of faults: a Markdown table of requests lost, errors, and seconds to recover.

    python -m benchmarks.serving_chaos                 # all faults, two replicas on CPU, fifteen minutes
    python -m benchmarks.serving_chaos replica proxy   # some of them

Eight users ask the tiny model without a pause, each reading a stream; after ten seconds the fault strikes. A request
is lost when it ends in an error. Recovered is when a process has taken the place of the killed one and answers, and for
faults that kill nothing when they are over. Answers are those that ended before the strike, and from it to recovery.
"""

import argparse
import asyncio
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import orjson
import yaml

from benchmarks.fault_places import BIN, ray_environment, several_nodes
from benchmarks.processes import end_tree
from benchmarks.services import (
    CONTROLLER,
    HAPROXY_MANAGER,
    HAPROXY_PROCESS,
    PROXY,
    REPLICA,
    Service,
    example_config,
    haproxy_environment,
    megabytes,
    service,
)
from chatglm3.endpoint import Endpoint
from chatglm3.tiny import FOLDER
from chatglm3.tokenizer import load_tokenizer
from serve_app.load import Prompt, at_once

ENGINE, FRONT = f"{REPLICA}chat:EngineServer", f"{REPLICA}chat:ChatServer"
USERS, STRIKE_S, LOAD_S, READY_S, BOTHER_S = 8, 10, 40, 120, 20
PROMPT = Prompt([{"role": "user", "content": "介绍一下你自己。"}], max_tokens=64)
CHECK_OFTEN = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1"}

Strike = Callable[[Service], float]
"""Does the damage; seconds until it is mended."""


@contextmanager
def two_replicas(**settings: str) -> Iterator[Service]:
    """On one node, behind Ray Serve's proxy."""
    with service(example_config(2), ray_environment() | settings, 2) as running:
        yield running


@contextmanager
def two_separate_engines() -> Iterator[Service]:
    """Behind one replica that speaks HTTP."""
    config = example_config(2)
    [application] = config["applications"]
    application["args"]["separate_engines"] = True
    application["deployments"][0]["name"] = "EngineServer"
    with service(config, ray_environment(), 3) as running:
        yield running


class Updated:
    """One replica, whose model is changed under load, with as much room for replicas beside it as `surge` says."""

    def __init__(self, surge: int) -> None:
        self._surge = surge

    @contextmanager
    def place(self) -> Iterator[Service]:
        """On a cluster of its own, to which a second config can come."""
        with (
            tempfile.TemporaryDirectory() as folder,
            several_nodes(head_cpus=2, workers=0) as (self._env, nodes),
            service(self._config(FOLDER), self._env, 1, [node.pid for node in nodes]) as running,
        ):
            self._folder = Path(folder)
            yield running

    def strike(self, running: Service) -> float:
        """Deploy another model. Seconds until only its replica is there and answers."""
        [old] = running.processes(FRONT)
        model = shutil.copytree(FOLDER, self._folder / "v2")
        config = self._config(model) | {"http_options": {"host": "127.0.0.1", "port": httpx.URL(running.url).port}}
        (self._folder / "v2.yaml").write_text(yaml.safe_dump(config))
        command = [BIN / "serve", "run", "--non-blocking", self._folder / "v2.yaml"]
        subprocess.run(command, env=self._env, stdout=sys.stderr, check=True)
        return until_there_are(running, FRONT, 1, old.pid, is_alone=True)

    def _config(self, model: str | Path) -> dict[str, Any]:
        config = example_config(1)
        [application] = config["applications"]
        application["args"] |= {"model": str(model), "name": "tiny"}
        application["deployments"][0]["max_surge_percent"] = self._surge
        return config


@contextmanager
def two_replicas_behind_haproxy() -> Iterator[Service]:
    """On one node."""
    with haproxy_environment() as env, service(example_config(2), env, 2) as running:
        yield running


@contextmanager
def two_replicas_on_three_nodes() -> Iterator[Service]:
    """The head, which has the proxy and no replica, a node for each replica, and one to spare."""
    config = example_config(2) | {"proxy_location": "HeadOnly"}
    config["applications"][0]["deployments"][0] |= {"max_replicas_per_node": 1}
    with (
        several_nodes(head_cpus=0, workers=3) as (env, nodes),
        service(config, env, 2, [node.pid for node in nodes]) as running,
    ):
        yield running


def kill(name: str, expected: int) -> Strike:
    """SIGKILL to the oldest process of that name. Seconds until as many answer as before."""

    def strike(running: Service) -> float:
        victim = running.processes(name)[0]
        victim.kill()
        return until_there_are(running, name, expected, victim.pid)

    return strike


def kill_each_engine(running: Service) -> float:
    """SIGKILL to both engines, the second when it has taken over from the first."""
    first, second = running.processes(ENGINE)
    first.kill()
    time.sleep(1)
    second.kill()
    return 1 + until_there_are(running, ENGINE, 2, second.pid)


def until_there_are(running: Service, name: str, expected: int, gone: int, *, is_alone: bool = False) -> float:
    """Seconds until so many processes of that name are there beside the one that goes, and the endpoint answers.

    `is_alone`: and until that one is gone.
    """
    began = time.monotonic()
    while True:
        found = [process.pid for process in running.processes(name)]
        if len({*found} - {gone}) >= expected and not (is_alone and gone in found) and running.answers():
            return time.monotonic() - began
        assert time.monotonic() < began + READY_S, f"no new {name}"
        time.sleep(0.1)


def kill_a_node(running: Service) -> float:
    """SIGKILL to everything on a node that has a replica."""
    victim = running.processes(REPLICA)[0]
    [node] = [parent.pid for parent in victim.parents() if parent.pid in running.roots]
    end_tree(node)
    running.roots = [root for root in running.roots if root != node]
    return until_there_are(running, REPLICA, 2, victim.pid)


def endless(**fields: Any) -> dict[str, Any]:
    """A request for a stream that only max_tokens ends."""
    stop = {str(token): -100 for token in load_tokenizer(FOLDER).stop_ids}
    return {"model": "tiny", "messages": PROMPT.messages, "stream": True, "logit_bias": stop} | fields


def leave(running: Service) -> float:
    """Fifty users who go away after the first piece of their answer."""
    began = time.monotonic()
    for _ in range(50):
        url = f"{running.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=endless(max_tokens=1000), timeout=30, trust_env=False) as stream:
            next(stream.iter_bytes(), b"")
    return time.monotonic() - began


def large_streams(running: Service) -> list[socket.socket]:
    """Sixteen streams of 3 MB that were asked for, and of which nothing was read."""
    where = httpx.URL(running.url)
    body = orjson.dumps(endless(max_tokens=1000, logprobs=True, top_logprobs=20))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where.host}\r\nContent-Type: application/json\r\n"
    streams = []
    for _ in range(16):
        stream = socket.socket()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what the kernel holds is soon full
        stream.connect((where.host, where.port))
        stream.sendall(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        streams.append(stream)
    return streams


def read_slowly(running: Service) -> float:
    """Sixteen users who read a byte a second."""
    began, streams = time.monotonic(), large_streams(running)
    while time.monotonic() < began + BOTHER_S:
        for stream in streams:
            assert stream.recv(1), "the stream ended, and was to be held up"
        time.sleep(1)
    for stream in streams:
        stream.close()
    return time.monotonic() - began


def read_at_once(running: Service) -> float:
    """The same sixteen, as they should be: what slow ones cost beyond these is for being slow."""
    began = time.monotonic()

    def read(stream: socket.socket) -> None:
        while stream.recv(2**16):
            pass
        stream.close()

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(read, large_streams(running)))
    return time.monotonic() - began


def poison(running: Service) -> float:
    """Bodies that are huge, no JSON, or deep, one after the other; each must be refused."""
    began, number = time.monotonic(), 0
    bodies = [b" " * 2**26, b'{"model": "tiny", "messages": [', b"[" * 500_000, b'{"a":' * 100_000, b"\xff" * 1000]
    with httpx.Client(timeout=30, trust_env=False) as client:
        while time.monotonic() < began + BOTHER_S:
            body = bodies[number % len(bodies)]
            number += 1
            with suppress(httpx.WriteError, httpx.ReadError):  # refused before it was all sent
                answer = client.post(
                    f"{running.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
                )
                assert 400 <= answer.status_code < 500, answer.text
    return time.monotonic() - began


@dataclass(frozen=True)
class Fault:
    """What happens, and where."""

    what: str
    strike: Strike
    place: Callable[[], AbstractContextManager[Service]] = two_replicas


surging, in_place = Updated(100), Updated(0)
FAULTS = {
    "replica": Fault("`kill -9` of 1 of 2 replicas", kill(REPLICA, 2)),
    "engine": Fault("`kill -9` of 1 of 2 engines in replicas of their own", kill(ENGINE, 2), two_separate_engines),
    "engines": Fault("`kill -9` of both, one after the other", kill_each_engine, two_separate_engines),
    "front": Fault("`kill -9` of the one ChatServer before two engines", kill(FRONT, 1), two_separate_engines),
    "update": Fault("another model for the one replica, `max_surge_percent` 100", surging.strike, surging.place),
    "update-in-place": Fault("the same, `max_surge_percent` 0", in_place.strike, in_place.place),
    "proxy": Fault("`kill -9` of the only HTTP proxy", kill(PROXY, 1)),
    "proxy-checked": Fault(
        "the same, proxies checked each second", kill(PROXY, 1), lambda: two_replicas(**CHECK_OFTEN)
    ),
    "haproxy": Fault("`kill -9` of the only HAProxy", kill(HAPROXY_PROCESS, 1), two_replicas_behind_haproxy),
    "haproxy-actor": Fault("`kill -9` of its actor", kill(HAPROXY_MANAGER, 1), two_replicas_behind_haproxy),
    "haproxy-replica": Fault("`kill -9` of 1 of 2 replicas", kill(REPLICA, 2), two_replicas_behind_haproxy),
    "controller": Fault("`kill -9` of Serve's controller", kill(CONTROLLER, 1)),
    "node": Fault("`kill -9` of all on a node with 1 of 2 replicas", kill_a_node, two_replicas_on_three_nodes),
    "clients": Fault("50 more clients leave in the middle of their streams", leave),
    "slow-readers": Fault("16 more clients read a byte a second of streams of 3 MB", read_slowly),
    "quick-readers": Fault("no fault: the same 16 read all at once", read_at_once),
    "poison": Fault("bodies of 64 MB, of broken and of 500,000 levels deep JSON, without a pause", poison),
}


@dataclass
class Seen:
    """What the users saw, and what it took."""

    ends: list[tuple[float, float, str]] = field(default_factory=list)
    """When a request ended, how long it took, and its error if it had one."""
    memory: list[float] = field(default_factory=list)
    """MB of the largest replica, sampled."""
    struck: float = 0.0
    recovered_s: float = 0.0

    def median_ms(self, since: float, until: float) -> str:
        """Of the answers that ended between two moments."""
        times = [took for moment, took, error in self.ends if not error and since <= moment <= until]
        return f"{1000 * median(times):.0f}" if times else "none"


async def meet(running: Service, strike: Strike) -> Seen:
    """What happens over LOAD_S seconds and until the recovery."""
    seen, stop = Seen(), time.monotonic() + LOAD_S

    async def user(endpoint: Endpoint) -> None:
        while time.monotonic() < stop:
            began = time.monotonic()
            [outcome] = await at_once(endpoint, "tiny", [PROMPT], 1)
            seen.ends.append((time.monotonic(), time.monotonic() - began, outcome.error))
            await asyncio.sleep(1.0 if outcome.error else 0.0)  # as a client that tries again

    async def sample() -> None:
        while time.monotonic() < stop:
            seen.memory.append(max(megabytes(running.processes(REPLICA)), default=0.0))
            await asyncio.sleep(0.5)

    async def later() -> None:
        await asyncio.sleep(STRIKE_S)
        seen.struck = time.monotonic()
        seen.recovered_s = await asyncio.to_thread(strike, running)

    async with Endpoint(running.url, timeout_s=60) as endpoint:
        await asyncio.gather(*(user(endpoint) for _ in range(USERS)), sample(), later())
    return seen


def row(name: str, what: str, seen: Seen) -> str:
    """A line of the table."""
    errors = Counter(error for *_, error in seen.ends if error)
    kinds = ", ".join(f"{count} {kind}" for kind, count in errors.most_common()) or "none"
    answered = [moment for moment, _, error in seen.ends if not error]
    pause = max(later - earlier for earlier, later in pairwise(answered))
    before, during = seen.median_ms(0, seen.struck), seen.median_ms(seen.struck, seen.struck + seen.recovered_s)
    at_strike = seen.memory[2 * (STRIKE_S - 1)]
    cells = [name, what, f"{len(seen.ends):,}", str(errors.total()), kinds, f"{pause:.1f}", f"{seen.recovered_s:.1f}"]
    cells += [f"{before} → {during}", f"{at_strike:.0f} → {max(seen.memory):.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Read the command line, run the faults, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", default=[*FAULTS], metavar="FAULT", help=", ".join(FAULTS))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print("| fault | what was done | requests | lost | errors seen | longest pause, s | recovered after, s ", end="")
    print("| median answer, ms | largest replica, MB |\n|---|---|--:|--:|---|--:|--:|--:|--:|")
    for name in options.faults:
        fault = FAULTS[name]
        with fault.place() as running:
            print(row(name, fault.what, asyncio.run(meet(running, fault.strike))), flush=True)


if __name__ == "__main__":
    main()
