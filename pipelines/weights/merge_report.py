"""The merge stage's report.html: how far each form of the model is from the one that was trained."""

import html
from collections.abc import Mapping
from pathlib import Path

from pipelines.report_page import as_svg, drawing, grid, pairs, write_page
from pipelines.scores.metrics import METRICS
from pipelines.weights.calibration import errors_text
from pipelines.weights.merge_config import MergeConfig
from pipelines.weights.merge_verdict import Verdict
from pipelines.weights.yardstick import Measured, Yardstick

REPORT = "report.html"


def write_merge_report(
    file: Path, yardstick: Yardstick, verdict: Verdict, errors: Mapping[str, float], config: MergeConfig
) -> None:
    """Write the page. `errors` are those of `calibration`."""
    limits = limits_text(config.max_kl, config.min_top1)
    told = f"{measured_text(yardstick)} The limits: {limits}. The model is {verdict}."
    tables = grid(*measured_table(yardstick.results)) + _picture(yardstick.results, config.max_kl, config.min_top1)
    sections = {
        "Agreement": f"<p>{html.escape(told)}</p><p>{errors_text(errors)}</p>{tables}",
        "Scores": grid(*scores_table(yardstick.results)) if yardstick.questions else "",
        "Settings": pairs(config.model_dump().items()),
    }
    write_page(file, "Merged model", sections)


def measured_text(yardstick: Yardstick) -> str:
    """What the table of a report or card is about."""
    text = (
        f"At {yardstick.tokens:,} answer tokens of the dev rows; the first line is the model as it was trained, which "
        f"the others are compared with."
    )
    if yardstick.questions:
        text += (
            f" {len(yardstick.questions)} dev questions are answered too, the likeliest token each time, and scored as "
            f"evaluate does, in percent, with 95 % intervals."
        )
    return text


def limits_text(max_kl: float, min_top1: float) -> str:
    """The limits in words."""
    return f"a KL divergence of {max_kl:g} nats, and the same likeliest token at {min_top1:.0%} of the places"


def measured_table(results: Mapping[str, Measured]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of what was measured."""
    heads = ["", "KL divergence, nats", "same likeliest token", "loss on the right answers"]
    lines = [
        [name, f"{found.agreement.kl:.5f}", f"{found.agreement.top1:.2%}", f"{found.agreement.loss:.4f}"]
        for name, found in results.items()
    ]
    if any(found.questions for found in results.values()):
        heads.append("same answers")
        for line, found in zip(lines, results.values(), strict=True):
            line.append(f"{found.same_answers} of {found.questions}")
    return heads, lines


def scores_table(results: Mapping[str, Measured]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of all scores: a line a metric that some answer says something about."""
    names = [name for name in METRICS if any(name in found.scores for found in results.values())]
    lines = [[name, *(str(found.scores.get(name, "-")) for found in results.values())] for name in names]
    return ["", *results], lines


def _picture(results: Mapping[str, Measured], max_kl: float, min_top1: float) -> str:
    reference, *others = results
    panels = [
        ("KL divergence, nats (less is nearer)", {name: results[name].agreement.kl for name in others}, max_kl),
        ("same likeliest token, %", {name: 100 * results[name].agreement.top1 for name in others}, 100 * min_top1),
    ]
    if results[reference].questions:
        f1 = {name: 100 * found.scores["f1"].value for name, found in results.items()}
        panels.append((f"F1, % (line: {reference})", {name: f1[name] for name in others}, f1[reference]))
    with drawing() as plt:
        size = (5.5 * len(panels), 0.6 * len(others) + 1.4)
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True)
        for panel, (title, values, line) in zip(axes, panels, strict=True):
            panel.barh(list(values), list(values.values()))
            panel.axvline(line, color="C3", linestyle="--")
            panel.set_title(title)
        axes[0].invert_yaxis()
        picture = as_svg(figure)
        plt.close(figure)
    return picture
