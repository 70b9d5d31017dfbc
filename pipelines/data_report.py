"""The prepare stage's report: numbers as report.json, pictures and samples as one self-contained report.html."""

import base64
import html
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from pipelines.recipe import Row
from pipelines.shards import BadRow, Sample

SAMPLES_SHOWN = 12
_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class RowStatistics:
    """What the report shows, gathered row by row: numbers and a few samples, never the rows themselves."""

    def __init__(self) -> None:
        self.seen = self.duplicates = self.refusals = self.without_evidence = 0
        self.rows = {"train": 0, "dev": 0}
        self.lengths: dict[str, list[int]] = {"prompt": [], "answer": []}
        self.documents: Counter[int] = Counter()
        self.positions: Counter[int] = Counter()
        self.samples: list[Row] = []

    def add(self, side: str, row: Row, sample: Sample) -> None:
        """Count one written row. Lengths are in characters."""
        self.rows[side] += 1
        self.lengths["prompt"].append(len(row["instruction"]))
        self.lengths["answer"].append(len(row["output"]))
        self.without_evidence += sample.answer not in sample.positive
        self.documents[row.get("documents", 1)] += 1
        if "golden" in row:
            self.refusals += row["golden"] is None
            self.positions[row["golden"] or 0] += 1
        if len(self.samples) < SAMPLES_SHOWN:
            self.samples.append(row)

    def summary(self, bad: list[BadRow]) -> dict[str, Any]:
        """The numbers of the report."""
        return {
            "rows_seen": self.seen,
            "rows": self.rows,
            "bad": dict(Counter(row.reason for row in bad).most_common()),
            "duplicates": self.duplicates,
            "refusals": self.refusals,
            "answers_not_in_their_document": self.without_evidence,
            "characters": {name: _quantiles(lengths) for name, lengths in self.lengths.items()},
            "documents_in_prompt": {str(k): self.documents[k] for k in sorted(self.documents)},
            "golden_position": {str(k): self.positions[k] for k in sorted(self.positions) if k},
        }


def write_report(folder: Path, config: dict[str, Any], statistics: RowStatistics, bad: list[BadRow]) -> None:
    """Write report.json and report.html into `folder`."""
    summary = statistics.summary(bad)
    (folder / "report.json").write_text(json.dumps(summary, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    sections = [
        "<h2>Numbers</h2>" + _table(summary),
        "<h2>Pictures</h2>" + _pictures(statistics),
        f"<h2>The first {len(statistics.samples)} rows</h2>" + "".join(map(_sample, statistics.samples)),
        _bad_rows(bad),
        "<h2>Settings</h2>" + _table(config),
    ]
    (folder / "report.html").write_text(_PAGE.replace("BODY", "\n".join(sections)), encoding="utf-8")


def _quantiles(lengths: list[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    return {name: ordered[round(q * (len(ordered) - 1))] for name, q in _QUANTILES.items()} if ordered else {}


def _pictures(statistics: RowStatistics) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2), layout="constrained")
    axes[0].hist(statistics.lengths["prompt"], bins=40)
    axes[0].set_title("prompt length, characters")
    axes[1].hist(statistics.lengths["answer"], bins=40, log=True)
    axes[1].set_title("answer length, characters")
    axes[2].bar([str(k) for k in sorted(statistics.documents)], [v for _, v in sorted(statistics.documents.items())])
    axes[2].set_title("documents in a prompt")
    places = sorted(k for k in statistics.positions if k)
    axes[3].bar([str(k) for k in places], [statistics.positions[k] for k in places])
    axes[3].set_title("place of the golden document")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    data = base64.b64encode(picture.getvalue()).decode()
    return f'<img alt="Histograms of lengths, documents and golden positions" src="data:image/png;base64,{data}">'


def _table(values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(_plain(v))}</td></tr>" for k, v in values.items())
    return f"<table>{rows}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) or "none"
    return str(value)


def _sample(row: Row) -> str:
    prompt, answer = html.escape(row["instruction"]), html.escape(row["output"])
    title = html.escape(str(row.get("source", "")))
    return (
        f"<details><summary>{title} <mark>{answer}</mark></summary><pre>{prompt}<mark>{answer}</mark></pre></details>"
    )


def _bad_rows(bad: list[BadRow]) -> str:
    if not bad:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(f'{b.file}:{b.line}')}</td><td>{html.escape(b.reason)}</td>"
        f"<td><code>{html.escape(b.raw[:80])}</code></td></tr>"
        for b in bad[:50]
    )
    return f"<h2>Bad rows ({len(bad)}, all in quarantine.jsonl)</h2><table>{rows}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>prepare report</title><style>
body { font: 15px/1.6 system-ui, "Noto Sans CJK SC", "Microsoft YaHei", sans-serif; max-width: 1200px;
  margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2em .8em; border-bottom: 1px solid #ddd; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: 1em; } mark { background: #ffe58a; } img { max-width: 100%; }
</style></head><body><h1>Prepared data</h1><p>Marked text is what the model is trained on.</p>
BODY
</body></html>
"""
