"""Clients take turns by tokens: in the arithmetic, in an engine that has one row, and through API keys."""

import asyncio
import heapq
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm3 import load_model, load_tokenizer
from chatglm3.engines import Sampling, complete
from chatglm3.engines.fair_turns import FairTurns
from chatglm3.engines.transformers_engine import TransformersEngine
from serve_app.keys import Limits, add_key
from tests.test_guard import run, served
from tests.test_places import post


def order(turns: FairTurns, requests: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Requests that came at once, in the order of their turns."""
    queue = [(turns.take(client, tokens), number) for number, (client, tokens) in enumerate(requests)]
    heapq.heapify(queue)
    served = []
    while queue:
        turn, number = heapq.heappop(queue)
        turns.begin(turn)
        served.append(requests[number])
    return served


def test_one_client_is_answered_in_the_order_of_its_requests():
    requests = [("a", 30), ("a", 1), ("a", 500), ("a", 2)]
    assert order(FairTurns(), requests) == requests


def test_who_comes_anew_waits_for_nobodys_backlog_and_is_owed_nothing():
    turns = FairTurns()
    order(turns, [("a", 100)] * 5)
    late = order(turns, [("a", 100)] * 3 + [("b", 100)] * 3)
    assert Counter(client for client, _ in late[:4]) == {"a": 2, "b": 2}


def test_what_a_client_gave_up_is_not_held_against_it():
    turns = FairTurns()
    first, *given_up = [turns.take("a", 8000) for _ in range(8)]
    turns.begin(first)
    turns.take("b", 100)
    for _ in given_up:
        turns.give_back("a", 8000)
    turns.give_back("a", 7990)  # of the one that was under way
    assert turns.take("a", 100) < 100
    turns.give_back("nobody", 100)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400)), max_size=60))
def test_while_two_clients_wait_neither_gets_more_than_two_requests_ahead(requests: list[tuple[str, int]]):
    got = dict.fromkeys("abc", 0)
    left = Counter(client for client, _ in requests)
    for client, tokens in order(FairTurns(), requests):
        got[client] += tokens
        left[client] -= 1
        waiting = [other for other in "abc" if left[other]]
        shares = [got[other] for other in waiting]
        assert not shares or max(shares) - min(shares) <= 2 * 400


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    """One that answers a prompt at a time."""
    engine = TransformersEngine(load_model("tiny", dtype=torch.float32), load_tokenizer("tiny"), max_batch=1)
    yield engine
    engine.close()


def test_who_asks_for_little_is_answered_between_the_requests_of_who_asks_for_much(engine: TransformersEngine):
    answered: list[str] = []

    async def ask(client: str, tokens: int) -> None:
        await complete(engine, [5] * 4, Sampling(max_tokens=tokens, client=client))
        answered.append(client)

    async def flood() -> None:
        first = asyncio.create_task(ask("much", 100))
        while not engine.load.running:
            await asyncio.sleep(0.001)
        await asyncio.gather(first, *(ask("much", 24) for _ in range(6)), *(ask("little", 8) for _ in range(3)))

    asyncio.run(flood())
    assert answered[0] == "much"
    assert answered.index("little") <= 2
    assert answered[-3:] == ["much"] * 3  # all that little asked for came before


def test_a_keys_requests_do_not_wait_behind_another_keys_queue(engine: TransformersEngine, tmp_path: Path):
    flooding, quiet = (add_key(tmp_path / "keys", name, Limits()) for name in ("flooding", "quiet"))
    api = served(engine, api_keys=str(tmp_path / "keys"))

    async def flood(client: httpx.AsyncClient) -> int:
        many = [asyncio.create_task(post(client, flooding, max_tokens=60)) for _ in range(8)]
        while engine.load.waiting < 7:
            await asyncio.sleep(0.001)
        assert (await post(client, quiet, max_tokens=3)).status_code == 200
        answered = sum(job.done() for job in many)
        assert {answer.status_code for answer in await asyncio.gather(*many)} == {200}
        return answered

    assert run(api, flood) <= 2  # the one that was being written, and no more than another
