"""A model, and another beside it, asked every question of a split: predictions, scores with intervals, a picture."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any, Literal

import ray.data
from pydantic import Field
from ray.exceptions import RayError

from chatglm3 import load_tokenizer, parse_reply
from chatglm3.chat import PromptFormat, question_ids
from chatglm3.engines import RequestError, Sampling, complete, load_engine
from cluster import session, storage
from cluster.config import Config
from cluster.errors import StageError
from cluster.progress import track
from pipelines import metrics
from pipelines.model_folders import ModelFolder, folder_digest, open_model, warn_of_other_wording
from pipelines.score_report import Result, Row, draw_scores, gold_answer, print_scores, write_rows, write_scores

# To Ray, no GPU asked for means no GPU counted: the process would still see those of its node, and use the first.
WITHOUT_GPU = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}


class EvaluateConfig(Config):
    """Answer a split's questions with a model, score the answers, and compare with another model on the same rows.

    Writes OUT/rows.jsonl (each question with every answer and its scores), scores.json and scores.png.
    """

    model: str = "out/model"
    """Model to score: `tiny`, an official folder, or one that merge wrote."""
    against: str = ""
    """Model to compare with; `base` is the one that --model was tuned from."""
    data: str = "out/data"
    """Folder written by prepare."""
    split: Literal["dev", "train"] = "dev"
    """Which of its rows; scores on train show what was memorised."""
    out: str = "out/evaluation"
    """Folder to write."""
    limit: int = Field(0, ge=0)
    """Score only this many rows, drawn at random (always the same ones); 0 is all."""
    max_tokens: int = Field(256, ge=1)
    """Longest answer in tokens."""
    workers: int = Field(1, ge=1)
    """Copies of the model that answer at the same time."""
    use_gpu: bool | None = None
    """Give each copy a GPU; unless given, whether the cluster has GPUs now (nodes scaled to zero do not count)."""
    batch_size: int = Field(32, ge=1)
    """Questions that one copy answers at a time."""


def evaluate(config: EvaluateConfig) -> str:
    """Score a model, and the one it is compared with, and return the folder of results."""
    storage.check_output(config.out, "evaluate")
    models = open_models(config)
    data = storage.open_folder(config.data, "prepare")
    for model in models.values():
        warn_of_other_wording(model, data.receipt.facts.get("prompt_digest", ""), f"that of --data {config.data}")
    rows = read_rows(config)
    inputs = {str(data.path): data.digest} | {str(model.path): folder_digest(model.path) for model in models.values()}
    receipt = storage.receipt_of("evaluate", config, inputs=inputs, counts={"rows": len(rows)})
    with storage.publish(config.out, receipt) as folder:
        session.connect()
        results = {name: _result(name, model, rows, config) for name, model in models.items()}
        write_rows(folder / "rows.jsonl", rows, results)
        write_scores(folder / "scores.json", results)
        draw_scores(folder / "scores.png", results)
    print_scores(results, len(rows))
    print(f"evaluate: the answers are in {config.out}/rows.jsonl, the picture is {config.out}/scores.png")
    return config.out


def open_models(config: EvaluateConfig) -> dict[str, ModelFolder]:
    """The models to ask: "against", if there is one, and "model"."""
    model = open_model(config.model, "--model")
    against = model.facts.get("base") if config.against == "base" else config.against
    if against is None:
        raise StageError(
            f"--against base: no receipt says what {config.model} was tuned from; name that model's folder"
        )
    models = {"against": open_model(against, "--against")} if against else {}
    models["model"] = model
    return models


def read_rows(config: EvaluateConfig) -> list[Row]:
    """The rows of the split in file order, or `limit` of them drawn at random."""
    folder = Path(config.data) / config.split
    rows: list[Row] = []
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            # A conversation has no one question with a right answer; its loss is measured in training.
            rows += (row for row in map(json.loads, file) if "instruction" in row)
    if not rows:
        raise StageError(f"--data {config.data} has no {config.split} rows; prepare again with a larger --dev_share")
    if 0 < config.limit < len(rows):
        rows = [rows[index] for index in sorted(random.Random(0).sample(range(len(rows)), config.limit))]
    return rows


def ask(model: ModelFolder, rows: list[Row], config: EvaluateConfig) -> list[str]:
    """The model's reply to each row's instruction, in order, from an actor pool of `config.workers` engines."""
    gpus = session.gpus_per_worker(config.use_gpu)
    session.require(config.workers, 1, gpus)
    questions = [{"row": index, "instruction": row["instruction"]} for index, row in enumerate(rows)]
    answers = ray.data.from_items(questions).map_batches(
        Answerer,
        fn_constructor_kwargs={
            "folder": model.location,
            "prompt_format": model.prompt_format,
            "sampling": Sampling(max_tokens=config.max_tokens),
            "batch_size": config.batch_size,
        },
        batch_size=config.batch_size,
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        # Restarting for ever, Ray Data's default, would hide a model that kills its process.
        max_restarts=0,
        num_gpus=gpus,
        **({} if gpus else WITHOUT_GPU),
    )
    try:
        arriving = track(answers.iter_rows(), f"asking {model.name}", len(rows))
        replies = {answer["row"]: answer["reply"] for answer in arriving}
    except RayError as error:  # its last line is the error that the engine or the loading of the model raised
        raise StageError(f"asking {model.name} failed: {str(error).strip().splitlines()[-1]}") from error
    return [replies[index] for index in range(len(rows))]


class Answerer:
    """An engine in an actor of Ray Data: a batch of instructions in, the replies out."""

    def __init__(self, folder: str, prompt_format: PromptFormat, sampling: Sampling, batch_size: int) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.prompt_format = prompt_format
        self.sampling = sampling
        self.engine = load_engine("auto", folder, max_batch=batch_size)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"row": batch["row"], "reply": asyncio.run(self._replies(batch["instruction"]))}

    async def _replies(self, instructions: list[str]) -> list[str]:
        return await asyncio.gather(*map(self._reply, instructions))

    async def _reply(self, instruction: str) -> str:
        """The answer's text; empty for a question that does not fit into the model's context."""
        prompt = question_ids(self.tokenizer, [{"role": "user", "content": instruction}], self.prompt_format)
        try:
            text = (await complete(self.engine, prompt, self.sampling)).text
        except RequestError:
            return ""
        return parse_reply(text).content if self.prompt_format == "chat" else text


def _result(name: str, model: ModelFolder, rows: list[Row], config: EvaluateConfig) -> Result:
    replies = ask(model, rows, config)
    if empty := replies.count(""):
        print(
            f"evaluate: {model.name} gave no answer to {empty} of {len(rows)} rows; do prompt and --max_tokens fit it?"
        )
    points = [_points(row, reply) for row, reply in zip(rows, replies, strict=True)]
    role = {"against": "base", "model": "tuned"}[name] if config.against == "base" else ""
    return Result(model, f"{role} {model.name}".strip(), replies, points, metrics.summarize(points))


def _points(row: Row, reply: str) -> metrics.Points:
    # A row of the multidoc preset without a golden document cannot be answered; other presets' rows have no such field.
    return metrics.score(reply, gold_answer(row), row.get("golden"), answerable=row.get("golden", 0) is not None)
