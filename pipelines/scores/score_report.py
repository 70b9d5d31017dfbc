"""What the evaluate stage found: each row's answers, the scores as numbers, as a picture and as a table."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.model_folders import ModelFolder
from pipelines.report_page import drawing
from pipelines.scores import metrics
from pipelines.scores.comparison import Difference
from pipelines.scores.gate import Verdict
from pipelines.scores.questions import Answer, Row, digest, gold_answer, groups_of, is_answerable, score_answer


@dataclass(frozen=True)
class Result:
    """What one model made of the rows."""

    model: ModelFolder
    heading: str
    answers: list[Answer]
    points: list[metrics.Points]
    scores: dict[str, metrics.Score]
    f1_by: dict[str, dict[int, metrics.Score]]
    """F1 of the rows with an answer, by their number of `documents` and by the `golden` document's place."""

    @classmethod
    def of(cls, model: ModelFolder, heading: str, rows: Sequence[Row], answers: list[Answer]) -> "Result":
        """The answers to all rows, scored."""
        points = [score_answer(row, answer.text) for row, answer in zip(rows, answers, strict=True)]
        f1_by = {field: _f1_by(field, rows, points) for field in ("documents", "golden")}
        return cls(model, heading, answers, points, metrics.summarize(points, groups_of(rows)), f1_by)

    @property
    def engine(self) -> str:
        """Name of the engine that answered."""
        return ", ".join(sorted({answer.engine for answer in self.answers if answer.engine}))

    @property
    def costs(self) -> dict[str, dict[str, float]]:
        """Length of an answer in tokens, and how long it took: mean and quantiles of those that were given."""
        given = [answer for answer in self.answers if answer.tokens]
        if not given:
            return {}
        return {
            "answer_tokens": _spread([answer.tokens for answer in given]),
            "answer_seconds": _spread([answer.seconds for answer in given]),
        }


@dataclass(frozen=True)
class Evaluation:
    """Everything that is reported."""

    rows: list[Row]
    results: dict[str, Result]
    """Of "against", if there is one, and of "model"."""
    comparison: dict[str, Difference]
    """Of the model with the one it is compared with, if there is one."""
    verdict: Verdict | None = None
    """Of the gate, if there is one."""

    @property
    def metric_names(self) -> list[str]:
        """Those that some row says something about."""
        return [name for name in metrics.METRICS if any(name in result.scores for result in self.results.values())]


def write_rows(path: Path, found: Evaluation) -> None:
    """One line a row: the question, the gold answer, and each model's prediction with its cost and its points."""
    with path.open("w", encoding="utf-8") as file:
        for index, row in enumerate(found.rows):
            line: Row = {key: row[key] for key in ("id", "group", "instruction", "golden", "documents") if key in row}
            line["gold"] = gold_answer(row)
            for name, result in found.results.items():
                answer = result.answers[index]
                cost = {"tokens": answer.tokens, "seconds": round(answer.seconds, 4)}
                line[name] = {"prediction": answer.text, **cost, **shares(result.points[index])}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def shares(points: metrics.Points) -> dict[str, float]:
    """One row's part of each metric, 0 to 1, where it says something about it; BLEU is of many rows only."""
    return {name: value[0] / value[1] for name, value in points.items() if value[-1] and name != "bleu_4"}


def write_scores(path: Path, found: Evaluation, data: Mapping[str, Any]) -> None:
    """Each model's folder and metrics as value, low, high and n; how far apart they are; what `data` they are of."""
    report: dict[str, Any] = {name: _numbers(result) for name, result in found.results.items()}
    if found.comparison:
        report["comparison"] = {name: asdict(difference) for name, difference in found.comparison.items()}
    if found.verdict:
        report["gate"] = {"passed": found.verdict.passed, **asdict(found.verdict)}
    report["data"] = {**data, "rows": len(found.rows), "digest": digest(found.rows)}
    path.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def draw_scores(path: Path, found: Evaluation) -> None:
    """The picture of `draw_bars` as a file."""
    with drawing() as plt:
        figure, axes = plt.subplots(figsize=(1.5 * len(found.metric_names) + 2, 4), layout="constrained")
        draw_bars(axes, found)
        figure.legend(loc="outside lower center")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def draw_bars(axes: Any, found: Evaluation) -> None:
    """A group of bars a metric, a bar a model, with the interval on it."""
    width = 0.8 / len(found.results)
    for index, result in enumerate(found.results.values()):
        for place, name in enumerate(found.metric_names):
            if score := result.scores.get(name):
                error = [[max(0, score.value - score.low)], [max(0, score.high - score.value)]]
                label = result.heading if place == 0 else None
                middle = place + (index - (len(found.results) - 1) / 2) * width
                axes.bar(middle, score.value, width, yerr=error, capsize=3, color=f"C{index}", label=label)
                axes.text(middle, 0.01, f"{100 * score.value:.0f}", ha="center", va="bottom")
    axes.set_xticks(range(len(found.metric_names)), [name.replace("_", " ") for name in found.metric_names])
    axes.set_ylim(0, 1.05)
    axes.set_title("Scores with 95 % intervals")


def print_scores(found: Evaluation) -> None:
    """Print a table of the metrics in percent: a row a metric, a column a model, then their difference."""
    heads, lines = score_table(found)
    table = Table(*map(escape, heads), title=f"{len(found.rows)} rows, 95 % intervals")
    for line in lines:
        table.add_row(*map(escape, line))
    Console().print(table)


def score_table(found: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the table of scores, in percent, and of what an answer costs."""
    results = found.results.values()
    heads = ["metric", *(result.heading for result in results)]
    lines = [[name, *(str(result.scores.get(name, "-")) for result in results)] for name in found.metric_names]
    costs = [[name, *(_mean(result.costs.get(name)) for result in results)] for name in _COSTS]
    costs.append(["engine", *(result.engine for result in results)])
    if found.comparison:
        heads += ["difference", "p"]
        lines = [[*line, *_difference(found.comparison.get(line[0]))] for line in lines]
        costs = [[*line, "", ""] for line in costs]
    return heads, lines + costs


_COSTS = ("answer_tokens", "answer_seconds")


def _difference(found: Difference | None) -> tuple[str, str]:
    """In points, with its interval; and how likely chance is to make it."""
    if not found:
        return "-", ""
    interval = f"({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    return f"{100 * found.difference:+.1f} {interval}", f"{found.p:.2g}"


def _mean(spread: dict[str, float] | None) -> str:
    return f"{spread['mean']:.3g} (p95 {spread['p95']:.3g})" if spread else "-"


def _spread(values: Sequence[float]) -> dict[str, float]:
    p50, p95, most = np.quantile(values, (0.5, 0.95, 1))
    numbers = {"mean": float(np.mean(values)), "p50": float(p50), "p95": float(p95), "max": float(most)}
    return {name: round(number, 4) for name, number in numbers.items()}


def _f1_by(field: str, rows: Sequence[Row], points: Sequence[metrics.Points]) -> dict[int, metrics.Score]:
    places: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if is_answerable(row) and field in row:
            places[row[field]].append(index)
    groups = groups_of(rows)
    return {
        place: metrics.summarize([{"f1": points[index]["f1"]} for index in there], [groups[index] for index in there])[
            "f1"
        ]
        for place, there in sorted(places.items())
    }


def _numbers(result: Result) -> dict[str, Any]:
    scores = {name: asdict(score) for name, score in result.scores.items()}
    by = {name: {str(place): asdict(score) for place, score in places.items()} for name, places in result.f1_by.items()}
    curves = {"f1_by_documents": by["documents"], "f1_by_golden_position": by["golden"]}
    return {"folder": result.model.name, "engine": result.engine, **scores, **result.costs, **curves}
