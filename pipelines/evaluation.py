"""A model, and another beside it, asked every question of a split: answers, scores with intervals, a gate."""

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal

import ray.data
from pydantic import Field
from ray.exceptions import RayError

from chatglm3 import load_tokenizer
from chatglm3.chat import PromptFormat
from chatglm3.engines import Sampling, load_engine
from chatglm3.engines.choice import choose_engine
from cluster import session, storage
from cluster.config import Config
from cluster.errors import StageError, last_line
from cluster.progress import track
from pipelines.model_folders import ModelFolder, folder_digest, open_model, warn_of_other_wording
from pipelines.one_or_more import ONE_OR_MORE
from pipelines.scores.answering import ask_all
from pipelines.scores.comparison import compare
from pipelines.scores.evaluation_report import write_report
from pipelines.scores.gate import GATED, Earlier, judge, open_earlier
from pipelines.scores.metrics import MetricName
from pipelines.scores.questions import LONGEST_ANSWER, Answer, Row, groups_of, read_questions
from pipelines.scores.score_report import Evaluation, Result, draw_scores, print_scores, write_rows, write_scores

# To Ray, no GPU asked for means no GPU counted: the process would still see those of its node, and use the first.
WITHOUT_GPU = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
BATCHES_OF_A_CHUNK = 4
"""Of questions that an engine is handed together: more, and the progress bar moves seldom."""


class EvaluateConfig(Config):
    """Answer a split's questions with a model, score the answers, and compare with another model on the same rows.

    Writes OUT/rows.jsonl (each question with every answer and its scores), scores.json, scores.png and report.html.
    With --gate it ends with an error, after writing them, if the model is worse than an earlier one.
    """

    model: str = "out/model"
    """Model to score: `tiny`, an official folder, or one that merge wrote (an adapter must be merged first)."""
    against: str = ""
    """Another model to ask the same questions and compare with; `base` is the one that --model was tuned from."""
    gate: str = ""
    """Earlier evaluation on the same questions, its folder or its scores.json, whose model this one must not be worse
    than, beyond chance. With its rows.jsonl there, answers are compared row by row, which tells smaller differences."""
    gate_metrics: Annotated[tuple[MetricName, ...], ONE_OR_MORE] = GATED
    """Metrics that the gate looks at, with commas between: any that scores.json has."""
    data: str = "out/data"
    """Folder written by prepare."""
    split: Literal["dev", "train"] = "dev"
    """Which of its rows to ask; scores on train show what was memorised."""
    out: str = "out/evaluation"
    """Folder to write."""
    limit: int = Field(0, ge=0)
    """Score only this many rows, drawn at random (always the same ones); 0 is all."""
    max_tokens: int = Field(LONGEST_ANSWER, ge=1)
    """Longest answer in tokens."""
    workers: int = Field(1, ge=1)
    """Copies of the model that answer at the same time, each in a process of its own."""
    use_gpu: bool | None = None
    """Give each copy a GPU; unless given, whether the cluster has GPUs now (nodes scaled to zero do not count)."""
    batch_size: int = Field(32, ge=1)
    """Questions that one copy answers at a time."""


def evaluate(config: EvaluateConfig) -> str:
    """Score a model, and the one it is compared with, and return the folder of results.

    Raises StageError, with the folder written, if the model is worse than that of the evaluation at `config.gate`.
    """
    storage.check_output(config.out, "evaluate")
    models = open_models(config)
    data = storage.open_folder(config.data, "prepare")
    for model in models.values():
        warn_of_other_wording(model, data.receipt.facts.get("prompt_digest", ""), f"that of --data {config.data}")
    rows = read_rows(config)
    earlier = open_earlier(config.gate, rows, config.gate_metrics) if config.gate else None
    inputs = {str(data.path): data.digest} | {str(model.path): folder_digest(model.path) for model in models.values()}
    if earlier:
        inputs[str(earlier.path)] = earlier.digest
    receipt = storage.receipt_of("evaluate", config, inputs=inputs, counts={"rows": len(rows)})
    with storage.publish(config.out, receipt) as folder:
        session.connect()
        found = _found(models, rows, earlier, config)
        _write(folder, found, config)
        if found.verdict:
            receipt.facts["gate_passed"] = found.verdict.passed
    print_scores(found)
    print(f"evaluate: the answers are in {config.out}/rows.jsonl, the failures to look through in report.html there")
    print(f"evaluate: the picture is {config.out}/scores.png")
    if found.verdict and not found.verdict.passed:
        raise StageError(f"--gate {config.gate}: {config.model} is {found.verdict}; look at {config.out}/report.html")
    if found.verdict:
        print(f"evaluate: gate passed: {config.model} is {found.verdict}")
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
    rows = read_questions(Path(config.data, config.split), config.limit)
    if not rows:
        remedy = "with a larger --dev_share" if config.split == "dev" else "from shards with questions"
        raise StageError(f"--data {config.data} has no {config.split} rows with a question; prepare again {remedy}")
    return rows


def ask(model: ModelFolder, rows: list[Row], config: EvaluateConfig) -> list[Answer]:
    """The model's answer to each row's instruction, in order, from an actor pool of `config.workers` engines."""
    gpus = session.gpus_per_worker(config.use_gpu)
    session.require(config.workers, 1, gpus)
    # An engine is given the next question as soon as one is answered: only a chunk's last ones leave it half idle.
    size = min(BATCHES_OF_A_CHUNK * config.batch_size, -(-len(rows) // config.workers))
    chunks = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
    questions = [{"row": chunk, "instruction": [rows[index]["instruction"] for index in chunk]} for chunk in chunks]
    answers = ray.data.from_items(questions, override_num_blocks=len(questions)).map_batches(
        Answerer,
        fn_constructor_kwargs={
            "folder": model.location,
            "prompt_format": model.prompt_format,
            "sampling": Sampling(max_tokens=config.max_tokens),
            "batch_size": config.batch_size,
        },
        batch_size=1,  # chunk
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        # Restarting for ever, Ray Data's default, would hide a model that kills its process.
        max_restarts=0,
        num_gpus=gpus,
        runtime_env=None if gpus else WITHOUT_GPU,
    )
    try:
        arriving = track(answers.iter_rows(), f"asking {model.name}", len(rows))
        found = {each["row"]: _answer(each) for each in arriving}
    except RayError as error:  # its last line is the error that the engine or the loading of the model raised
        raise StageError(f"asking {model.name} failed: {last_line(error)}") from error
    return [found[index] for index in range(len(rows))]


class Answerer:
    """An engine in an actor of Ray Data: a chunk of instructions in, a row for each answer out."""

    def __init__(self, folder: str, prompt_format: PromptFormat, sampling: Sampling, batch_size: int) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.prompt_format = prompt_format
        self.sampling = sampling
        self.batch_size = batch_size
        self.engine_name, _ = choose_engine(folder)
        self.engine = load_engine(self.engine_name, folder, max_batch=batch_size, needs_gpu=bool(ray.get_gpu_ids()))
        self.loop = asyncio.Runner()  # one for all batches: vLLM stays in the first that asks it

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        [rows], [instructions] = batch["row"], batch["instruction"]
        given = self.loop.run(
            ask_all(self.engine, self.tokenizer, instructions, self.prompt_format, self.sampling, self.batch_size)
        )
        columns = {name: [getattr(answer, name) for answer in given] for name in ("text", "tokens", "seconds")}
        return {"row": rows, "engine": [self.engine_name] * len(rows), **columns}


def _answer(found: dict[str, Any]) -> Answer:
    return Answer(found["text"], int(found["tokens"]), float(found["seconds"]), found["engine"])


def _found(
    models: dict[str, ModelFolder], rows: list[Row], earlier: Earlier | None, config: EvaluateConfig
) -> Evaluation:
    results = {name: _result(name, model, rows, config) for name, model in models.items()}
    model, against = results["model"], results.get("against")
    groups = groups_of(rows)
    comparison = compare(model.points, against.points, groups) if against else {}
    verdict = judge(earlier, model.points, model.scores, config.gate_metrics, groups) if earlier else None
    return Evaluation(rows, results, comparison, verdict)


def _result(name: str, model: ModelFolder, rows: list[Row], config: EvaluateConfig) -> Result:
    answers = ask(model, rows, config)
    if empty := sum(not answer.text for answer in answers):
        print(
            f"evaluate: {model.name} gave no answer to {empty} of {len(rows)} rows; do prompt and --max_tokens fit it?"
        )
    role = {"against": "base", "model": "tuned"}[name] if config.against == "base" else ""
    return Result.of(model, f"{role} {model.name}".strip(), rows, answers)


def _write(folder: Path, found: Evaluation, config: EvaluateConfig) -> None:
    write_rows(folder / "rows.jsonl", found)
    write_scores(folder / "scores.json", found, {"folder": config.data, "split": config.split, "limit": config.limit})
    draw_scores(folder / "scores.png", found)
    write_report(folder / "report.html", found, config.model_dump())
