"""The merge stage's report.html: how far each form of the model is from the one that was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.agreement import Agreement
from pipelines.report_page import as_svg, drawing, grid, pairs, write_page

REPORT = "report.html"


def write_merge_report(
    file: Path, results: Mapping[str, Agreement], tokens: int, limits: Mapping[str, float], settings: Mapping[str, Any]
) -> None:
    """Write the page. The first of `results` is the reference; `limits` are those of KL and top-1 agreement."""
    heads = ("", "KL divergence, nats", "same likeliest token", "loss on the right answers")
    rows = [(name, f"{found.kl:.5f}", f"{found.top1:.2%}", f"{found.loss:.4f}") for name, found in results.items()]
    told = (
        f"<p>At {tokens:,} answer tokens of the dev rows; the first line is what the others are compared with. Past a "
        f"KL of {limits['kl']:g}, or with fewer than {limits['top1']:.0%} of the tokens the same, merge refuses a "
        f"model whose loss is higher too.</p>"
    )
    sections = {"Agreement": told + grid(heads, rows) + _picture(results, limits), "Settings": pairs(settings.items())}
    write_page(file, "Merged model", sections)


def _picture(results: Mapping[str, Agreement], limits: Mapping[str, float]) -> str:
    others = dict(list(results.items())[1:])
    with drawing() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.6 * len(others) + 1.4), layout="constrained")
        left.barh(list(others), [found.kl for found in others.values()])
        left.set_title("KL divergence, nats (less is nearer)")
        left.axvline(limits["kl"], color="C3", linestyle="--")
        right.barh(list(others), [100 * found.top1 for found in others.values()])
        right.set_title("same likeliest token, %")
        right.axvline(100 * limits["top1"], color="C3", linestyle="--")
        right.set_yticks([])
        left.invert_yaxis()
        right.invert_yaxis()
        picture = as_svg(figure)
        plt.close(figure)
    return picture
