"""What the evaluate stage found: each row's answers, the scores as numbers, as a picture and as a table."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines import metrics
from pipelines.model_folders import ModelFolder

Row = dict[str, Any]
"""A row that prepare wrote."""


@dataclass
class Result:
    """What one model made of the rows."""

    model: ModelFolder
    heading: str
    replies: list[str]
    """Its reply to each row, citations included."""
    points: list[metrics.Points]
    scores: dict[str, metrics.Score]


def gold_answer(row: Row) -> str:
    """The row's right answer, without citation."""
    gold: str = row["answer"] if "answer" in row else row["output"]
    return gold


def write_rows(path: Path, rows: list[Row], results: dict[str, Result]) -> None:
    """One line a row: the question, the gold answer, and each model's prediction with its points."""
    with path.open("w", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            line: Row = {key: row[key] for key in ("id", "instruction", "golden", "documents") if key in row}
            line["gold"] = gold_answer(row)
            for name, result in results.items():
                points = {metric: value for metric, (value, possible) in result.points[index].items() if possible}
                line[name] = {"prediction": result.replies[index], **points}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_scores(path: Path, results: dict[str, Result]) -> None:
    """Each model's folder, and each of its metrics as value, low, high and n."""
    report = {
        name: {"folder": result.model.name, **{metric: asdict(score) for metric, score in result.scores.items()}}
        for name, result in results.items()
    }
    path.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def draw_scores(path: Path, results: dict[str, Result]) -> None:
    """A group of bars a metric, a bar a model, with the interval on it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = _metrics_of(results)
    figure, axes = plt.subplots(figsize=(1.6 * len(names) + 2, 4), layout="constrained")
    width = 0.8 / len(results)
    for index, result in enumerate(results.values()):
        for place, name in enumerate(names):
            if score := result.scores.get(name):
                error = [[max(0, score.value - score.low)], [max(0, score.high - score.value)]]
                label = result.heading if place == 0 else None
                middle = place + (index - (len(results) - 1) / 2) * width
                axes.bar(middle, score.value, width, yerr=error, capsize=3, color=f"C{index}", label=label)
                axes.text(middle, 0.01, f"{100 * score.value:.0f}", ha="center", va="bottom")
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylim(0, 1.05)
    axes.set_title("Scores with 95 % intervals")
    figure.legend(loc="outside lower center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def print_scores(results: dict[str, Result], num_rows: int) -> None:
    """Print a table of the metrics in percent: a row a metric, a column a model."""
    headings = [escape(result.heading) for result in results.values()]
    table = Table("metric", *headings, title=f"{num_rows} rows, 95 % intervals")
    for name in _metrics_of(results):
        table.add_row(name, *(_percent(result.scores.get(name)) for result in results.values()))
    Console().print(table)


def _percent(score: metrics.Score | None) -> str:
    return f"{100 * score.value:.1f}  ({100 * score.low:.1f} to {100 * score.high:.1f})" if score else "-"


def _metrics_of(results: dict[str, Result]) -> list[str]:
    return [name for name in metrics.METRICS if any(name in result.scores for result in results.values())]
