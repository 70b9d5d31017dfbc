"""DoRA and rsLoRA from train to answers: the merged model is the one that was trained, and answers as it does."""

import asyncio
import json
from pathlib import Path

import pytest
import torch

from benchmarks.train_command import SETTINGS
from chatglm3 import load_model, load_tokenizer, parse_reply
from chatglm3.adapters import load_adapter
from chatglm3.chat import prompt_ids
from chatglm3.checkpoint import open_tensors, read_config
from chatglm3.engines import AdapterFolders, Sampling, complete
from chatglm3.engines.transformers_engine import TransformersEngine
from cluster import storage
from pipelines.evaluation import EvaluateConfig, evaluate
from pipelines.merging import MergeConfig, merge
from pipelines.run.training_config import LoraSettings
from pipelines.training import TrainConfig, train
from pipelines.weights.folding import folded, read_updates

IDS = torch.arange(5, 205)[None]
ROWS = 12


@pytest.fixture(scope="module", params=["dora", "rslora"])
def adapter(
    request: pytest.FixtureRequest, rows: str, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> str:
    lora = LoraSettings.model_validate({"rank": 4, request.param: True})
    out = str(tmp_path_factory.mktemp("trained") / "adapter")
    return train(TrainConfig(data=rows, out=out, **SETTINGS | {"lora": lora}))


def test_the_merged_weights_are_those_of_base_and_live_adapter(adapter: str, tiny: Path, tmp_path: Path) -> None:
    live = load_adapter(load_model("tiny", dtype=torch.float32), adapter)
    out = merge(MergeConfig(adapter=adapter, measure=False, out=str(tmp_path / "model")))
    config = read_config(tiny)
    updates = read_updates({adapter: 1.0}, config)
    exact = {name: folded(weight, updates.get(name, [])) for name, weight in open_tensors(tiny, config).items()}
    merged, unrounded = load_model(out, dtype=torch.float32), load_model("tiny", dtype=torch.float32)
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, exact[name].bfloat16().float()), name
    unrounded.load_state_dict(exact)
    with torch.inference_mode():
        wanted, found, rounded, base = (
            model(IDS).logits for model in (live, unrounded, merged, load_model("tiny", dtype=torch.float32))
        )
    assert (base - wanted).abs().max() > 1  # what was learned
    assert (found - wanted).abs().max() < 1e-3
    assert (rounded - wanted).abs().mean() < 0.02


def test_the_merged_model_is_measured_and_evaluated_as_the_live_adapter_answers(
    adapter: str, rows: str, tmp_path: Path
) -> None:
    out = merge(MergeConfig(adapter=adapter, data=rows, out=str(tmp_path / "model")))
    counts = storage.open_folder(out).receipt.counts
    assert counts["kl"] < 0.005
    assert counts["top1"] > 0.98
    scores = evaluate(
        EvaluateConfig(model=out, data=rows, limit=ROWS, max_tokens=24, use_gpu=False, out=str(tmp_path / "scores"))
    )
    lines = [json.loads(line) for line in Path(scores, "rows.jsonl").read_text().splitlines()]
    live = asyncio.run(live_answers(adapter, [line["instruction"] for line in lines]))
    same = sum(line["model"]["prediction"] == answer for line, answer in zip(lines, live, strict=True))
    assert same >= ROWS - 1, "rounding to 16 bits may change an answer that hangs in the balance"


async def live_answers(adapter: str, instructions: list[str]) -> list[str]:
    tokenizer = load_tokenizer("tiny")
    model = load_model("tiny", dtype=torch.float32)
    engine = TransformersEngine(model, tokenizer, adapters=AdapterFolders({"trained": adapter}))
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in instructions]
    sampling = Sampling(max_tokens=24, adapter="trained")
    try:
        answers = await asyncio.gather(*(complete(engine, prompt, sampling) for prompt in prompts))
    finally:
        engine.close()
    return [parse_reply(answer.text).content for answer in answers]
