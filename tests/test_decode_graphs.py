"""Graphs of the pass that moves each row one token on: here their padding, on a GPU themselves."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

from chatglm3 import load_model, load_tokenizer
from chatglm3.engines import AdapterFolders, Sampling, complete, load_engine
from chatglm3.engines.decode_graphs import Graph, kernel_by_kernel
from chatglm3.engines.transformers_engine import TransformersEngine
from tests.random_adapters import write_adapter

LENGTHS = (1, 7, 33, 250, 300, 600, 64)  # some grow the cache while others run, and one passes 256 while it answers


class Counted:
    """Stands for captures where there is no GPU."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, run: Callable[[], torch.Tensor]) -> Graph:
        graph = kernel_by_kernel(run)
        self.rows.append(len(graph[1]))
        return graph


def fails(run: Callable[[], torch.Tensor]) -> Graph:
    """A model that waits for the GPU."""
    raise RuntimeError("operation not permitted when stream is capturing")


def prompt(length: int) -> list[int]:
    return Random(length).choices(range(3, 1500), k=length)


def answers(engine: TransformersEngine, adapter: str = "") -> list[tuple[int, ...]]:
    """Of prompts that come one after the other; every second one is for the adapter."""

    async def later(place: int, length: int) -> tuple[int, ...]:
        await asyncio.sleep(0.02 * place)
        sampling = Sampling(max_tokens=24, adapter=adapter if place % 2 else "")
        return (await complete(engine, prompt(length), sampling)).token_ids

    async def run() -> list[tuple[int, ...]]:
        return await asyncio.gather(*(later(place, length) for place, length in enumerate(LENGTHS)))

    return asyncio.run(run())


def test_filled_up_rows_draw_the_tokens_that_they_draw_alone(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    counted, tokenizer = Counted(), load_tokenizer(tiny)
    plain = TransformersEngine(load_model(tiny, dtype=torch.float32), tokenizer, max_batch=5)
    graphs = TransformersEngine(load_model(tiny, dtype=torch.float32), tokenizer, max_batch=5, captures=lambda: counted)
    broken = TransformersEngine(load_model(tiny, dtype=torch.float32), tokenizer, max_batch=5, captures=lambda: fails)
    try:
        expected = answers(plain)
        assert answers(graphs) == expected
        assert set(counted.rows) <= {1, 2, 4, 5}, "rows come in powers of two, or are all"
        known, number = set(graphs._graphs._graphs), len(counted.rows)
        assert answers(graphs) == expected
        new = set(graphs._graphs._graphs) - known
        assert len(counted.rows) == number + len(new), "only what the first time did not meet is captured"
        with caplog.at_level(logging.WARNING):
            assert answers(broken) == expected
        assert len(caplog.messages) == 1
        assert "stream is capturing" in caplog.text
    finally:
        for engine in (plain, graphs, broken):
            engine.close()


def test_rows_with_adapters_go_on_without_graphs_and_leave_none_behind(tiny: Path, tmp_path: Path) -> None:
    write_adapter(tiny, tmp_path / "other", 0, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    adapters, tokenizer = AdapterFolders(shelf=tmp_path), load_tokenizer(tiny)
    model = load_model(tiny, dtype=torch.float32)
    plain = TransformersEngine(model, tokenizer, max_batch=4, adapters=adapters)
    expected, expected_without = answers(plain, "other"), answers(plain)
    plain.close()
    model = load_model(tiny, dtype=torch.float32)
    graphs = TransformersEngine(model, tokenizer, max_batch=4, adapters=adapters, captures=Counted)
    try:
        assert answers(graphs, "other") == expected
        assert answers(graphs) == expected_without
    finally:
        graphs.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graphs_draw_the_tokens_that_kernels_draw_one_by_one(tiny: Path) -> None:
    plain = TransformersEngine(load_model(tiny, dtype=torch.float32, device_map="cuda:0"), load_tokenizer(tiny))
    graphs = load_engine("transformers", tiny, dtype="float32")
    try:
        assert answers(graphs) == answers(plain)
    finally:
        plain.close()
        graphs.close()
