"""What merge writes of a tuned model, in vLLM on CPU: the embedded engine's answers, in each format."""

import asyncio
import os
from pathlib import Path
from typing import Any, get_args

import pytest

from chatglm3.engines import EngineName, Sampling, load_engine
from chatglm3.tokenizer import load_tokenizer
from cluster import storage
from pipelines.merging import MergeConfig, merge
from pipelines.scores.answering import ask_all
from pipelines.scores.metrics import summarize
from pipelines.scores.questions import read_questions, score_answer
from pipelines.weights.weight_formats import WeightFormat
from tests.merge_inputs import demo_rows, trained_tiny

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROWS = 24
LONGEST = 48  # answer in tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return demo_rows(tmp_path_factory.mktemp("data") / "data", ROWS)


@pytest.fixture(scope="module")
def tuned(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained_tiny(tmp_path_factory.mktemp("tuned") / "adapter", data)


def answers(name: EngineName, folder: str, data: str) -> list[str]:
    instructions = [row["instruction"] for row in read_questions(Path(data, "dev"))]

    async def asked() -> list[str]:
        engine = load_engine(name, folder, dtype="bfloat16", max_batch=16)
        try:
            sampling, tokenizer = Sampling(max_tokens=LONGEST), load_tokenizer(folder)
            return [answer.text for answer in await ask_all(engine, tokenizer, instructions, "chat", sampling, 16)]
        finally:
            engine.close()

    return asyncio.run(asked())


@pytest.mark.parametrize("weight_format", get_args(WeightFormat))
def test_vllm_answers_from_a_format_as_the_embedded_engine_does_and_as_merge_measured(
    weight_format: Any, tuned: str, data: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"measure": True, "score_rows": ROWS, "score_tokens": LONGEST}
    out = merge(MergeConfig(adapter=tuned, data=data, format=weight_format, out=str(tmp_path / "model"), **settings))
    found, wanted = answers("vllm", out, data), answers("transformers", out, data)
    # The engines add up in another order, so that near ties may fall the other way.
    assert sum(map(str.__eq__, found, wanted)) >= ROWS - 2
    points = [score_answer(row, answer) for row, answer in zip(read_questions(Path(data, "dev")), found, strict=True)]
    measured = storage.open_folder(out).receipt.counts
    assert measured["questions"] == ROWS
    assert abs(summarize(points)["exact_match"].value - measured["exact_match"]) <= 2.001 / ROWS
