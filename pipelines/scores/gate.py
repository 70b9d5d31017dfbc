"""Is a new model worse than the one of an earlier evaluation? The step between training and rollout."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.errors import StageError
from pipelines.scores import questions
from pipelines.scores.comparison import FEWEST_GROUPS, Difference, compare, compare_scores
from pipelines.scores.metrics import METRICS, Groups, MetricName, Points, Score
from pipelines.scores.questions import Row

GATED: tuple[MetricName, ...] = ("exact_match", "f1", "citation_accuracy", "refusal_precision", "refusal_recall")
"""What is held against an earlier model unless the user names metrics. One measure of each kind, and F1: every further
one raises the odds that a model as good as the earlier one is turned down, which are 6 % with these, 10 % with all."""


@dataclass(frozen=True)
class Earlier:
    """An evaluation that the new one is held against."""

    place: str
    """What the user called it."""
    path: Path
    """Its folder, or only its scores.json."""
    model: str
    scores: dict[str, Score]
    points: dict[int, Points]
    """Of its answer to each new row that it was asked too; empty where its rows.jsonl is not there."""

    @property
    def digest(self) -> str:
        """sha256 for receipts."""
        return storage.file_digest(self.path / storage.RECEIPT if self.path.is_dir() else self.path)


@dataclass(frozen=True)
class Verdict:
    """How a new model does beside an earlier one."""

    earlier: str
    """Folder of the earlier model."""
    rows: int
    """Rows that both answered; 0 if only the two intervals could be compared."""
    differences: dict[str, Difference]
    left_out: dict[str, str] = field(default_factory=dict)
    """Metric -> why it could not be compared."""

    @property
    def worse(self) -> dict[str, Difference]:
        """The metrics on which the new model is worse, beyond chance."""
        return {name: difference for name, difference in self.differences.items() if difference.is_worse}

    @property
    def passed(self) -> bool:
        """Whether something could be compared, and the new model is worse at none of it."""
        return bool(self.differences) and not self.worse

    def __str__(self) -> str:
        how = f"on the same {self.rows} rows" if self.rows else "by the intervals of both"
        left_out = "".join(f"; {name} is left out ({why})" for name, why in self.left_out.items())
        if not self.differences:
            return f"not to be compared with {self.earlier}{left_out}"
        if not self.worse:
            return f"not worse than {self.earlier} {how} in {', '.join(self.differences)}{left_out}"
        return f"worse than {self.earlier} {how}: {', '.join(map(_by_how_much, self.worse.items()))}{left_out}"


_REMEDY = "give the folder of an earlier evaluate, or its scores.json"


def open_earlier(reference: str, rows: Sequence[Row], gated: Sequence[str] = GATED) -> Earlier:
    """The evaluation at `reference`, a folder that evaluate wrote or a scores.json, made ready for `judge`.

    Raises StageError where it is none, is of other questions than `rows`, or lacks a metric that these will have.
    """
    path = Path(reference)
    file = path / "scores.json" if path.is_dir() else path
    report = _read_json(reference, file)
    try:
        model = str(report["model"]["folder"])
        scores: dict[str, Score] = {name: Score(**report["model"][name]) for name in METRICS if name in report["model"]}
    except (KeyError, TypeError):
        raise StageError(f"--gate {reference}: {file.name} was not written by evaluate; {_REMEDY}") from None
    lines = file.with_name("rows.jsonl")
    points = _read_points(reference, lines, rows) if lines.is_file() else {}
    if not points:
        _check_questions(reference, report.get("data"), rows)
        _check_metrics(reference, scores, rows, gated)
    has_receipt = file.with_name(storage.RECEIPT).is_file()
    return Earlier(reference, file.parent if has_receipt else file, model, scores, points)


def judge(
    earlier: Earlier,
    points: Sequence[Points],
    scores: Mapping[str, Score],
    gated: Sequence[str] = GATED,
    groups: Groups = None,
) -> Verdict:
    """Hold a model's points, one a row, and its scores against the earlier ones; `groups` are the rows'."""
    if earlier.points:
        common = sorted(earlier.points)
        ours, theirs = ([of[index] for index in common] for of in (points, earlier.points))
        paired = compare(ours, theirs, [groups[index] for index in common] if groups else None)
        return _verdict(earlier, len(common), paired, gated)
    both = [name for name in gated if name in scores and name in earlier.scores]
    by_interval = {name: compare_scores(scores[name], earlier.scores[name]) for name in both}
    return _verdict(earlier, 0, by_interval, gated)


def _verdict(earlier: Earlier, rows: int, found: Mapping[str, Difference], gated: Sequence[str]) -> Verdict:
    """Few rows can show that a model is worse (in pairs, whose test holds for any number), but not that it is not."""
    differences, left_out = {}, {}
    for name in gated:
        if name not in found:
            left_out[name] = "one of them has no row for it"
        elif found[name].groups >= FEWEST_GROUPS or (rows and found[name].is_worse):
            differences[name] = found[name]
        else:
            few = f"its {found[name].n} rows"
            few += f" of {found[name].groups} document groups" if found[name].groups < found[name].n else ""
            left_out[name] = f"{few} are too few to tell"
    return Verdict(earlier.model, rows, differences, left_out)


def _by_how_much(item: tuple[str, Difference]) -> str:
    name, found = item
    values = f"{100 * found.old:.1f} to {100 * found.new:.1f}"
    interval = f"95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}"
    chance = "" if found.p is None else f", p {found.p:.2g}"
    return f"{name} {100 * found.difference:+.1f} points ({values}; {interval}{chance})"


def _read_json(reference: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StageError(f"--gate {reference}: {file} cannot be read ({error.strerror}); {_REMEDY}") from None
    except ValueError:
        raise StageError(f"--gate {reference}: {file} is not JSON; {_REMEDY}") from None
    return found if isinstance(found, dict) else {}


def _read_points(reference: str, file: Path, rows: Sequence[Row]) -> dict[int, Points]:
    """Points of the earlier answer to each of the rows; scored anew, so that all metrics are there, as they are now.

    Raises StageError unless all earlier questions are among the new ones or the reverse, as --limit makes them.
    """
    earlier = _read_replies(reference, file)
    known = sum(map(len, earlier.values()))
    points = {}
    for index, row in enumerate(rows):
        if replies := earlier[_key(row, questions.gold_answer(row))]:
            points[index] = questions.score_answer(row, replies.pop(0))
    if not points or len(points) < min(known, len(rows)):
        raise StageError(
            f"--gate {reference} is about another data set: {len(points)} of its {known} questions are among the "
            f"{len(rows)} of this one; evaluate that model on this --data and --split"
        )
    return points


def _read_replies(reference: str, file: Path) -> dict[str, list[str]]:
    """The earlier model's replies to each question; a question may stand there more than once."""
    replies = defaultdict(list)
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                replies[_key(row, row["gold"])].append(str(row["model"]["prediction"]))
            except (ValueError, KeyError, TypeError):
                place = f"--gate {reference}: {file}, line {number}"
                raise StageError(f"{place} was not written by evaluate; evaluate that model again") from None
    return replies


def _key(row: Row, gold: str) -> str:
    return json.dumps([row.get("id"), row["instruction"], gold, row.get("golden")])


def _check_questions(reference: str, data: Any, rows: Sequence[Row]) -> None:
    """Raise StageError unless scores that come without their rows were measured on these rows."""
    if not data:
        raise StageError(
            f"--gate {reference} does not say on which questions it was measured; put its rows.jsonl beside it, or "
            f"evaluate that model again"
        )
    if data.get("digest") != questions.digest(rows):
        raise StageError(
            f"--gate {reference} was measured on other questions: {data.get('rows')} {data.get('split')} rows of "
            f"{data.get('folder')}, not these {len(rows)}; give the same --data, --split and --limit"
        )


def _check_metrics(reference: str, scores: Mapping[str, Score], rows: Sequence[Row], gated: Sequence[str]) -> None:
    """Raise StageError if the scores lack a metric that any model would have on these rows, whatever it answers."""
    asked = {name for row in rows for name, points in questions.score_answer(row, "").items() if points[-1]}
    if missing := [name for name in gated if name in asked and name not in scores]:
        raise StageError(
            f"--gate {reference} has no {' and no '.join(missing)}; put its rows.jsonl beside it, evaluate that "
            f"model again, or name other --gate_metrics"
        )
