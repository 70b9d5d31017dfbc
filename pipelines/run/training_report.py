"""The train stage's report.html: curves, throughput, waiting, memory and GPU hours, all from metrics.jsonl."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.report_page import as_svg, drawing, pairs, write_page
from pipelines.run.progress import BESIDE_STEPS, held_seconds, mean_utilisation, read_metrics

Row = dict[str, Any]


def write_training_report(folder: Path, settings: Mapping[str, Any], gpus: int) -> dict[str, float]:
    """Write report.html and loss.png from the folder's metrics.jsonl; returns the numbers for the receipt."""
    rows = read_metrics(folder / "metrics.jsonl")
    numbers = summary(rows, gpus)
    with drawing() as plt:
        losses, rates = _draw_losses(plt, rows), _draw_rates(plt, rows)
        losses.savefig(folder / "loss.png", dpi=120)
        sections = {
            "Numbers": pairs((name.replace("_", " "), f"{value:,.6g}") for name, value in numbers.items()),
            "Loss": as_svg(losses),
            "Speed": as_svg(rates),
            "Settings": pairs(settings.items()),
        }
        plt.close("all")
    write_page(folder / "report.html", "Fine-tuning", sections)
    return numbers


def summary(rows: list[Row], gpus: int) -> dict[str, float]:
    """What a run came to. Speed is that of the steps that count; the hours are all that held the workers, from when
    each could load the model: evaluating, saving, and what a fault had done again too.
    """
    seconds = sum(row["seconds"] for row in rows)
    dev = [(row["dev_loss"], row["step"]) for row in rows if "dev_loss" in row]
    numbers = {
        "steps": rows[-1]["step"],
        "loss": rows[-1]["loss"],
        "tokens": sum(row["tokens"] for row in rows),
        "tokens_per_second": sum(row["tokens"] for row in rows) / seconds,
        "waiting_share": sum(row["waiting_seconds"] for row in rows) / seconds,
        "gpu_hours" if gpus else "worker_hours": sum(held_seconds(row) * row["workers"] for row in rows) / 3600,
    }
    numbers |= {name: total for name in BESIDE_STEPS if (total := sum(row.get(name, 0) for row in rows))}
    if (used := mean_utilisation(rows)) is not None:
        numbers["utilisation"] = used
    if dev:
        numbers |= {"dev_loss": dev[-1][0], "lowest_dev_loss": min(dev)[0], "lowest_dev_loss_at_step": min(dev)[1]}
    if scored := [row for row in rows if "dev_f1" in row]:
        numbers |= {name: scored[-1][name] for name in ("dev_exact_match", "dev_f1")}
    if memory := [row["memory_gb"] for row in rows if "memory_gb" in row]:
        numbers["memory_gb"] = max(memory)
    return numbers


def _draw_losses(plt: Any, rows: list[Row]) -> Any:
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    dev = [row for row in rows if "dev_loss" in row]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, alpha=0.4, label="training, each step")
    axes.plot(steps, _smooth(losses), label="training, smoothed")
    if dev:
        axes.plot([row["step"] for row in dev], [row["dev_loss"] for row in dev], "o-", label="dev")
    axes.set(xlabel="step", ylabel="loss per answer token", title="Fine-tuning", ylim=(0, None))
    axes.grid(alpha=0.3)
    if scored := [row for row in rows if "dev_f1" in row]:
        _draw_scores(axes.twinx(), scored)
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def _draw_scores(axes: Any, scored: list[Row]) -> None:
    for name, label, style in (("dev_exact_match", "dev exact match", "s--"), ("dev_f1", "dev F1", "^--")):
        points = [(row["step"], 100 * row[name]) for row in scored]
        axes.plot(*zip(*points, strict=True), style, label=label, color="tab:red", alpha=0.7, markersize=4)
    axes.set(ylabel="score, %", ylim=(0, 105))


def _draw_rates(plt: Any, rows: list[Row]) -> Any:
    panels: dict[str, Callable[[Row], float]] = {
        "tokens a second": lambda row: row["tokens"] / row["seconds"],
        "% waiting for data": lambda row: 100 * row["waiting_seconds"] / row["seconds"],
        "% of the bf16 matrix roof": lambda row: 100 * row.get("utilisation", math.nan),
        "GPU memory so far, GB": lambda row: row.get("memory_gb", math.nan),
    }
    values = {label: [of_row(row) for row in rows] for label, of_row in panels.items()}
    shown = {label: some for label, some in values.items() if not all(map(math.isnan, some))}
    size = (8, 2.25 * len(shown))
    figure, places = plt.subplots(len(shown), 1, figsize=size, layout="constrained", sharex=True)
    for axes, (label, some) in zip(places, shown.items(), strict=True):
        axes.plot([row["step"] for row in rows], some)
        axes.set(ylabel=label, ylim=(0, 100 if label == "% waiting for data" else None))
        axes.grid(alpha=0.3)
    figure.supxlabel("step")
    return figure


def _smooth(values: list[float]) -> list[float]:
    """Their exponential mean, which begins at the first value."""
    smoothed: list[float] = []
    weight, total, norm = 0.9, 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed
