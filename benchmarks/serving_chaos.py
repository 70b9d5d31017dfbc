"""What users of the endpoint see of faults: a Markdown table of requests lost, errors, and seconds to recover.

    python -m benchmarks.serving_chaos                 # all faults, two replicas on CPU, five minutes
    python -m benchmarks.serving_chaos replica proxy   # some of them

Eight users ask the tiny model without a pause, each reading a stream; after ten seconds the fault strikes. A request
is lost when it ends in an error. Recovered is when a process has taken the place of the killed one and answers.
"""

import argparse
import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
import yaml

from benchmarks.fault_places import BIN, end_tree, free_port, ray_environment
from chatglm3.endpoint import Endpoint
from serve_app.load import Prompt, at_once

USERS, STRIKE_S, LOAD_S, READY_S = 8, 10, 40, 120
CONFIG = Path("serve_app/serve.yaml")
PROMPT = Prompt([{"role": "user", "content": "介绍一下你自己。"}], max_tokens=64)

End = tuple[float, str]
"""When a request ended, and its error if it had one."""


@dataclass
class Service:
    """A running application: the process that was started, and where it answers."""

    process: subprocess.Popen[bytes]
    url: str

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray processes of that name, newest last."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        found = [process for process in below if _title(process).startswith(f"ray::{name}")]
        return sorted(found, key=lambda process: process.create_time())


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@contextmanager
def service(folder: Path) -> Iterator[Service]:
    """Two replicas of the tiny model, by the config file of the tree."""
    config, port = yaml.safe_load(CONFIG.read_text()), free_port()
    config["http_options"]["port"] = port
    [application] = config["applications"]
    [deployment] = application["deployments"]
    del deployment["autoscaling_config"]
    deployment |= {"num_replicas": 2, "health_check_period_s": 2}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("wb") as log:
        command = [str(BIN / "serve"), "run", str(folder / "serve.yaml")]
        running = Service(
            subprocess.Popen(command, stdout=log, stderr=log, env=ray_environment()), f"http://127.0.0.1:{port}"
        )
    try:
        deadline = time.monotonic() + READY_S
        while not answers(running.url) or len(running.processes("ServeReplica:chat:ChatServer")) < 2:
            assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.5)
        yield running
    finally:
        end_tree(running.process.pid)
        running.process.wait()


def answers(url: str) -> bool:
    """Whether the endpoint is healthy."""
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/healthz", timeout=2, trust_env=False).status_code == 200
    return False


def kill(name: str, expected: int) -> Callable[[Service], float]:
    """A fault: SIGKILL to the oldest process of that name. Seconds until as many answer as before."""

    def strike(running: Service) -> float:
        victim = running.processes(name)[0]
        began = time.monotonic()
        victim.kill()
        while True:
            alive = [process for process in running.processes(name) if process.pid != victim.pid]
            if len(alive) >= expected and answers(running.url):
                return time.monotonic() - began
            assert time.monotonic() < began + READY_S, f"no new {name}"
            time.sleep(0.1)

    return strike


def leave(running: Service) -> float:
    """A fault: fifty users who go away after the first piece of their answer."""
    body = {"model": "tiny", "messages": PROMPT.messages, "max_tokens": 1000, "stream": True}
    began = time.monotonic()
    for _ in range(50):
        with httpx.stream(
            "POST", f"{running.url}/v1/chat/completions", json=body, timeout=30, trust_env=False
        ) as stream:
            next(stream.iter_bytes(), b"")
    return time.monotonic() - began


FAULTS: dict[str, tuple[str, Callable[[Service], float]]] = {
    "replica": ("`kill -9` of 1 of 2 replicas", kill("ServeReplica:chat:ChatServer", 2)),
    "proxy": ("`kill -9` of the HTTP proxy", kill("ProxyActor", 1)),
    "controller": ("`kill -9` of Serve's controller", kill("ServeController", 1)),
    "clients": ("50 clients leave in the middle of their streams", leave),
}


async def meet(running: Service, strike: Callable[[Service], float]) -> tuple[list[End], float]:
    """How the users' requests ended over LOAD_S seconds, and how long the recovery took."""
    stop = time.monotonic() + LOAD_S
    ends: list[End] = []

    async def user(endpoint: Endpoint) -> None:
        while time.monotonic() < stop:
            [outcome] = await at_once(endpoint, "tiny", [PROMPT], 1)
            ends.append((time.monotonic(), outcome.error))
            await asyncio.sleep(1.0 if outcome.error else 0.0)  # as a client that tries again

    async def later() -> float:
        await asyncio.sleep(STRIKE_S)
        return await asyncio.to_thread(strike, running)

    async with Endpoint(running.url, timeout_s=60) as endpoint:
        *_, seconds = await asyncio.gather(*(user(endpoint) for _ in range(USERS)), later())
    assert seconds is not None
    return ends, seconds


def row(name: str, what: str, ends: list[End], seconds: float) -> str:
    """A line of the table."""
    errors = Counter(error for _, error in ends if error)
    answered = [moment for moment, error in ends if not error]
    pause = max(later - earlier for earlier, later in pairwise(answered))
    seen = ", ".join(f"{count} {kind}" for kind, count in errors.most_common()) or "none"
    return f"| {name} | {what} | {len(ends)} | {errors.total()} | {seen} | {pause:.1f} | {seconds:.1f} |"


def main() -> None:
    """Read the command line, run the faults, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", default=[*FAULTS], metavar="FAULT", help=", ".join(FAULTS))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print("| fault | what was done | requests | lost | errors seen | longest pause, s | recovered after, s |")
    print("|---|---|--:|--:|---|--:|--:|")
    for name in options.faults:
        what, strike = FAULTS[name]
        with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as running:
            print(row(name, what, *asyncio.run(meet(running, strike))), flush=True)


if __name__ == "__main__":
    main()
