"""The prepare stage's report: numbers as report.json, pictures and samples as one self-contained report.html."""

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.report_page import as_svg, drawing, grid, pairs, write_page
from pipelines.rows.data_statistics import SAMPLES_SHOWN, Statistics, quantiles
from pipelines.rows.recipe import Built
from pipelines.rows.shards import BadRow

BAD_ROWS_SHOWN = 50


@dataclass
class Account:
    """What became of every raw line, and what the rows written are like."""

    lines: dict[str, int]
    """How many were read, and how many of them were blank, good and bad."""
    files_refused: int
    bad: dict[str, int]
    """How many lines were bad, by kind of fault."""
    dropped: dict[str, int]
    """How many good ones were left out, by reason."""
    leaks: dict[str, int]
    statistics: Statistics
    quarantine: list[BadRow]


def write_report(folder: Path, account: Account, dataset: str, settings: Mapping[str, Any]) -> None:
    """Write report.json and report.html into `folder`; `dataset` is the digest of its rows."""
    statistics = account.statistics
    numbers = {
        "dataset": dataset,
        **{name: getattr(account, name) for name in ("lines", "files_refused", "bad", "dropped")},
        **statistics.summary(),
        "leaks": account.leaks,
    }
    (folder / "report.json").write_text(json.dumps(numbers, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    samples = statistics.samples[:SAMPLES_SHOWN]
    sections = {
        "Where every line went": _flow(numbers),
        "Numbers": _numbers(numbers, statistics),
        "Pictures": _pictures(numbers, statistics),
        "Leak check": _leaks(numbers["leaks"]),
        f"{len(samples)} rows": _SAMPLES_HINT + "".join(map(_sample, samples)),
        "Bad rows": _bad_rows(account.quarantine),
        "Settings": pairs(settings.items()),
    }
    write_page(folder / "report.html", "Prepared data", sections)


def _flow(numbers: Mapping[str, Any]) -> str:
    lines, rows = numbers["lines"], numbers["rows"]
    items = [
        *([("files refused", numbers["files_refused"])] if numbers["files_refused"] else []),
        ("lines read", lines["read"]),
        *([("blank", -lines["blank"])] if lines["blank"] else []),
        *((f"bad: {reason}", -count) for reason, count in numbers["bad"].items()),
        *((name, -count) for name, count in numbers["dropped"].items()),
        *([("second row of a pair of twins", numbers["twins"])] if numbers["twins"] else []),
        ("rows for training", rows.get("train", 0)),
        ("rows for evaluation (dev)", rows.get("dev", 0)),
    ]
    return pairs((name, f"{count:,}") for name, count in items)


def _numbers(numbers: Mapping[str, Any], statistics: Statistics) -> str:
    facts = [
        ("dataset hash", numbers["dataset"]),
        ("tokens", f"{numbers['tokens']:,}"),
        ("label share (tokens that are trained on)", f"{numbers['label_share']:.1%}"),
        *((f"rows: {kind}", f"{count:,}") for kind, count in numbers["kinds"].items()),
        *((name, f"{count:,}") for name, count in numbers["changes"].items()),
    ]
    if (quoted := numbers["answers_that_quote"]) is not None:
        facts.append(("answers that quote their document", f"{quoted:.1%}"))
    prompt, answer = statistics.lengths()
    lengths = {"prompt": prompt, "answer": answer, "whole example": prompt + answer}
    heads = ["tokens of a", *quantiles(prompt)]
    rows = ([name, *(f"{value:,}" for value in quantiles(values).values())] for name, values in lengths.items())
    return pairs(facts) + grid(heads, rows)


def _pictures(numbers: Mapping[str, Any], statistics: Statistics) -> str:
    prompt, answer = statistics.lengths()
    with drawing() as plt:
        figure, axes = plt.subplots(2, 3, figsize=(14, 6.4), layout="constrained")
        (lengths, answers, kinds), (documents, places, changes) = axes
        lengths.hist(prompt + answer, bins=40)
        lengths.set_title("tokens of an example")
        answers.hist(answer, bins=np.geomspace(1, max(answer.max(initial=2), 2), 30))
        answers.set_xscale("log")
        answers.xaxis.set_major_formatter("{x:g}")  # the powers of ten that it would write are formulas
        answers.set_title("tokens of an answer")
        _bars(kinds, "kinds of rows", numbers["kinds"])
        _columns(documents, "documents in a prompt", numbers["documents_in_a_prompt"])
        _columns(places, "number of the golden document", numbers["place_of_the_golden_document"])
        _bars(changes, "dropped and changed", {**numbers["bad"], **numbers["dropped"], **numbers["changes"]})
        picture = as_svg(figure)
        plt.close(figure)
    return picture


def _bars(axes: Any, title: str, counts: Mapping[str, int]) -> None:
    shown = {name: count for name, count in counts.items() if count}
    axes.barh([name if len(name) < 50 else f"{name[:47]}..." for name in shown], list(shown.values()))
    axes.invert_yaxis()
    axes.set_title(title)


def _columns(axes: Any, title: str, counts: Mapping[str, int]) -> None:
    axes.bar(list(counts), list(counts.values()))
    axes.set_title(title)


def _leaks(leaks: Mapping[str, int]) -> str:
    wrong = [name for name, count in leaks.items() if count and name not in ("groups", "documents")]
    verdict = f"&#10007; leaks: {', '.join(wrong)}" if wrong else "&#10003; nothing of the dev side is seen in training"
    return f"<p><b>{verdict}</b></p>" + pairs((name.replace("_", " "), f"{count:,}") for name, count in leaks.items())


_SAMPLES_HINT = "<p>What the model is trained on is <mark>marked</mark>.</p>"


def _sample(built: Built) -> str:
    row = built.row
    if "messages" in row:
        turns = [(m["role"], _said(m), m["role"] == "assistant" and m.get("loss", True)) for m in row["messages"]]
    else:
        turns = [("user", row["instruction"], False), ("assistant", row["output"], True)]
    text = "".join(f"<i>{role}</i>\n{_marked(content, learned)}\n" for role, content, learned in turns)
    last = html.escape(turns[-1][1])
    title = f"{built.kind}, {built.prompt_tokens} + {built.answer_tokens} tokens"
    return f"<details><summary>{title} <mark>{last}</mark></summary><pre>{text}</pre></details>"


def _said(message: Mapping[str, Any]) -> str:
    """A message's content, below the name of the tool that it calls, which is learned too."""
    return "\n".join(filter(None, (message.get("metadata"), message["content"])))


def _marked(text: str, learned: bool) -> str:
    return f"<mark>{html.escape(text)}</mark>" if learned else html.escape(text)


def _bad_rows(bad: list[BadRow]) -> str:
    if not bad:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(row.place)}</td><td>{html.escape(row.reason)}</td>"
        f"<td><code>{html.escape(row.raw[:80])}</code></td></tr>"
        for row in bad[:BAD_ROWS_SHOWN]
    )
    return f"<p>{len(bad):,}, all in quarantine.jsonl</p><table>{rows}</table>"
