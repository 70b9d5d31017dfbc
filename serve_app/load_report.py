"""How an endpoint held under a load: percentiles as a table, and a picture."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from serve_app.load import Outcome

PERCENTILES = (50, 90, 95, 99)
LATE_S = 0.05


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Numbers over all requests: latencies in milliseconds of those that were answered, throughput, errors by kind."""
    answered = [outcome for outcome in outcomes if not outcome.error]
    seconds = max((outcome.ended for outcome in outcomes), default=0.0) or 1.0
    written = sum(outcome.completion_tokens for outcome in answered)
    return {
        "requests": len(outcomes),
        "answered": len(answered),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common()),
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(answered) / seconds, 3),
        "prompt_tokens_per_s": round(sum(outcome.prompt_tokens for outcome in answered) / seconds, 1),
        "output_tokens_per_s": round(written / seconds, 1),
        "most_in_flight": int(in_flight(outcomes)[1].max(initial=0)),
        "sent_late_ms": _spread([outcome.sent - outcome.due for outcome in outcomes]),
        "first_token_ms": _spread([outcome.texts[0] - outcome.due for outcome in answered if outcome.texts]),
        "a_token_ms": _spread([token_s for outcome in answered if (token_s := outcome.token_s) is not None]),
        "between_pieces_ms": _spread([gap for outcome in answered for gap in outcome.gaps]),
        "whole_answer_ms": _spread([outcome.ended - outcome.due for outcome in answered]),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = np.asarray(seconds) * 1000
    named = {"mean": values.mean(), **{f"p{p}": np.percentile(values, p) for p in PERCENTILES}, "max": values.max()}
    return {name: round(float(value), 2) for name, value in named.items()}


def in_flight(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """Times at which the number of requests under way changed, and what it became."""
    times = np.array([outcome.sent for outcome in outcomes] + [outcome.ended for outcome in outcomes])
    steps = np.repeat([1, -1], len(outcomes))
    order = np.lexsort((steps, times))  # of two at one time the one that ends comes first
    return times[order], np.cumsum(steps[order])


def print_summary(summary: dict[str, Any], title: str) -> None:
    """The table, to stdout."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("milliseconds")
    names = ["mean", *(f"p{p}" for p in PERCENTILES), "max"]
    for name in names:
        table.add_column(name, justify="right")
    for label, key in (
        ("first token", "first_token_ms"),
        ("a token, after the first", "a_token_ms"),
        ("between pieces of text", "between_pieces_ms"),
        ("whole answer", "whole_answer_ms"),
    ):
        table.add_row(label, *(f"{summary[key][name]:,.1f}" if summary[key] else "-" for name in names))
    console = Console(width=100)
    console.print(table)
    console.print(
        f"{summary['answered']} of {summary['requests']} answered in {summary['seconds']:.1f} s, at most "
        f"{summary['most_in_flight']} at a time: {summary['requests_per_s']:.2f} requests/s, "
        f"{summary['output_tokens_per_s']:,.0f} tokens/s written, {summary['prompt_tokens_per_s']:,.0f} read"
    )
    for kind, count in summary["errors"].items():
        console.print(f"{count} failed: {kind}", style="red", highlight=False)
    if summary["sent_late_ms"] and summary["sent_late_ms"]["p99"] > LATE_S * 1000:
        late = summary["sent_late_ms"]["p99"]
        console.print(
            f"this program was up to {late:.0f} ms late in sending: give it a core of its own", style="yellow"
        )


def draw(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Shares of requests by latency, requests under way, and tokens a second, as one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    shares, flight, rate = figure.subplots(1, 3)
    answered = [outcome for outcome in outcomes if not outcome.error and outcome.texts]
    for label, values in (
        ("first token", [outcome.texts[0] - outcome.due for outcome in answered]),
        ("whole answer", [outcome.ended - outcome.due for outcome in answered]),
    ):
        shares.plot(np.sort(values), np.arange(1, len(values) + 1) / max(len(values), 1), label=label)
    shares.set(xlabel="seconds", ylabel="share of requests", ylim=(0, 1.02))
    shares.set_xlim(left=0)
    shares.legend(loc="lower right")
    flight.step(*in_flight(outcomes), where="post")
    flight.set(xlabel="seconds", ylabel="requests under way")
    flight.set_ylim(bottom=0)
    texts = np.array([time for outcome in outcomes for time in outcome.texts])
    width = max(0.25, float(texts.max(initial=1)) / 60)
    counts, edges = np.histogram(texts, bins=np.arange(0, texts.max(initial=1) + width, width))
    rate.stairs(counts / width, edges, fill=True, alpha=0.7)
    rate.set(xlabel="seconds", ylabel="pieces of text a second")
    for axes in (shares, flight, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path)
