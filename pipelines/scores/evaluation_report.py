"""The evaluate stage's report.html: scores, pictures, and the failures to look through, by kind."""

import html
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chatglm3.documents import parse_answer, seed_document, seed_prompt
from pipelines.report_page import as_svg, drawing, grid, pairs, write_page
from pipelines.scores.gate import Verdict
from pipelines.scores.metrics import Score
from pipelines.scores.questions import Row, gold_answer, is_answerable
from pipelines.scores.score_report import Evaluation, Result, draw_bars, score_table, shares

SHOWN_OF_A_KIND = 300
KINDS = ("wrong", "wrong citation", "refused wrongly", "answered wrongly", "no answer")


def write_report(file: Path, found: Evaluation, settings: Mapping[str, Any]) -> None:
    """Write the page."""
    heads, lines = score_table(found)
    sections = {
        "Gate": _gate(found.verdict) if found.verdict else "",
        f"Scores of {len(found.rows):,} rows": grid(heads, lines) + _HINT,
        "Pictures": _pictures(found),
        "F1 where the answer stands": _curves(found),
        "Failures": _failures(found),
        "Settings": pairs(settings.items()),
    }
    write_page(file, f"Evaluation of {found.results['model'].model.name}", sections, _STYLE, _SCRIPT)


def failure_kinds(row: Row, reply: str, exact: bool) -> list[str]:
    """What is wrong with a reply; nothing, for a right one. `exact` says that its text is the right one."""
    answer = parse_answer(reply)
    if not reply:
        return ["no answer"]
    if not is_answerable(row):
        return [] if answer.refused else ["answered wrongly"]
    if answer.refused:
        return ["refused wrongly"]
    kinds = [] if exact else ["wrong"]
    if row.get("golden") is not None and answer.citations != (row["golden"],):
        kinds.append("wrong citation")
    return kinds


def taken_apart(prompt: str, num_documents: int | None) -> tuple[list[str], str]:
    """The documents and the question in a prompt of ours, as far as they can be told apart; else no documents."""
    start, middle, end = seed_prompt("\0", "\0").split("\0")
    text = seed_document(prompt)
    if not prompt.startswith(start) or not prompt.endswith(end):
        return [], prompt
    question = prompt.removeprefix(start + text + middle).removesuffix(end)
    if num_documents is None:  # the preset of one document, which has no number
        return [text] if text else [], question
    documents, rest = [], f"\n{text}"
    for number in range(1, num_documents + 1):
        before, _, rest = rest.partition(f"\n[{number}] ")
        documents.append(before)
    return [*documents[1:], rest], question


_HINT = (
    "<p>In percent, with 95 % intervals from 1,000 bootstrap samples of the document groups, whose rows are drawn "
    "together; a difference with that of the paired bootstrap and the p of a paired permutation test. BLEU-4 wants "
    "runs of four words: it says little of short answers. Seconds are those that the engine took while it answered "
    "others too.</p>"
)


def _gate(verdict: Verdict) -> str:
    return f"<p><b>{'&#10003;' if verdict.passed else '&#10007;'} {html.escape(str(verdict))}</b></p>"


def _pictures(found: Evaluation) -> str:
    with drawing() as plt:
        layout = [["scores"] * 4, ["documents", "golden", "answer_tokens", "answer_seconds"]]
        figure, axes = plt.subplot_mosaic(layout, figsize=(14, 7.5), layout="constrained")
        draw_bars(axes["scores"], found)
        for index, result in enumerate(found.results.values()):
            for field in ("documents", "golden"):
                _draw_curve(axes[field], result.f1_by[field], f"C{index}")
        given = [[answer for answer in result.answers if answer.tokens] for result in found.results.values()]
        for name in ("tokens", "seconds"):
            axes[f"answer_{name}"].hist([[getattr(answer, name) for answer in answers] for answers in given], bins=20)
        axes["documents"].set(title="F1 by the number of documents", ylim=(0, 1.05))
        axes["golden"].set(title="F1 by the golden document's place", ylim=(0, 1.05))
        axes["answer_tokens"].set_title("tokens of an answer")
        axes["answer_seconds"].set_title("seconds of an answer")
        figure.legend(loc="outside lower center", ncols=2)
        picture = as_svg(figure)
        plt.close(figure)
    return picture


def _draw_curve(axes: Any, scores: Mapping[int, Score], color: str) -> None:
    values = [score.value for score in scores.values()]
    axes.plot(list(scores), values, marker="o", color=color)
    low, high = ([getattr(score, end) for score in scores.values()] for end in ("low", "high"))
    axes.fill_between(list(scores), low, high, color=color, alpha=0.2)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _curves(found: Evaluation) -> str:
    results = found.results.values()
    tables = ""
    for field, name in (("documents", "documents in the prompt"), ("golden", "place of the golden document")):
        places = found.results["model"].f1_by[field]
        lines = [[place, *(_with_rows(result.f1_by[field][place]) for result in results)] for place in places]
        tables += grid([name, *(result.heading for result in results)], lines) if lines else ""
    return tables


def _with_rows(score: Score) -> str:
    return f"{score}, {score.n:,} rows"


def _failures(found: Evaluation) -> str:
    """The rows that something is wrong with, the worst first, behind a choice of kinds and a search."""
    by_row = {index: kinds for index in range(len(found.rows)) if (kinds := _kinds(found, index))}
    if not by_row:
        return "<p>None.</p>"
    counts = Counter(kind for kinds in by_row.values() for kind in kinds)
    points = found.results["model"].points
    seen: Counter[str] = Counter()
    shown = []
    for index in sorted(by_row, key=lambda index: points[index]["f1"][0]):
        if any(seen[kind] < SHOWN_OF_A_KIND for kind in by_row[index]):
            seen.update(by_row[index])
            shown.append(_failure(found, index, by_row[index]))
    choices = "".join(map(_choice, [("", len(by_row)), *((kind, counts[kind]) for kind in sorted(counts, key=_place))]))
    less = (
        f" At most {SHOWN_OF_A_KIND:,} of a kind are here; all are in rows.jsonl." if len(shown) < len(by_row) else ""
    )
    return (
        f'<form id="choice">{choices}<input type="search" placeholder="search" aria-label="search"> '
        f'<output></output></form><p>By F1, the worst first.{less}</p><div id="failures">{"".join(shown)}</div>'
    )


def _kinds(found: Evaluation, index: int) -> list[str]:
    model = found.results["model"]
    kinds = _kinds_of(found.rows[index], model, index)
    if other := found.results.get("against"):
        ours, theirs = (result.points[index]["f1"][0] for result in (model, other))
        if ours != theirs:
            kinds.append(f"{'better' if ours > theirs else 'worse'} than {other.heading}")
    return kinds


def _kinds_of(row: Row, result: Result, index: int) -> list[str]:
    return failure_kinds(row, result.answers[index].text, result.points[index]["exact_match"][0] == 1)


def _place(kind: str) -> tuple[int, str]:
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)


def _choice(kind: tuple[str, int]) -> str:
    name, count = kind
    checked = "" if name else " checked"
    value = html.escape(name)
    return f'<label><input type="radio" name="kind" value="{value}"{checked}> {value or "all"} {count:,}</label> '


def _failure(found: Evaluation, index: int, kinds: list[str]) -> str:
    row, gold = found.rows[index], gold_answer(found.rows[index])
    documents, question = taken_apart(row["instruction"], row.get("documents"))
    answer = found.results["model"].answers[index].text
    tags = "".join(f"<b>{html.escape(kind)}</b> " for kind in kinds)
    facts = [("row", row["id"])] if "id" in row else []
    facts += [("question", question), ("right answer", gold)]
    for result in found.results.values():
        facts.append((result.heading, result.answers[index].text or "(none)"))
        facts.append(("", ", ".join(f"{name} {share:.2f}" for name, share in shares(result.points[index]).items())))
    cited = parse_answer(answer).citations
    texts = (_document(number, text, row, gold, cited) for number, text in enumerate(documents, 1))
    last = f"{html.escape(question[-200:])} <i>{html.escape(gold[:100])}</i> &#8592; {html.escape(answer[:200])}"
    return (
        f'<details data-kinds="{html.escape("|".join(kinds))}"><summary>{tags}{last}</summary>'
        f"{pairs(facts)}{''.join(texts)}</details>"
    )


def _document(number: int, text: str, row: Row, gold: str, cited: Iterable[int]) -> str:
    golden = number == row.get("golden")
    name = f"[{number}]{' golden' if golden else ''}{' cited' if number in cited else ''}"
    pieces = map(html.escape, text.split(gold) if golden and gold else [text])
    shown = f"<mark>{html.escape(gold)}</mark>".join(pieces)
    return f"<pre{' class=golden' if golden else ''}><i>{name}</i> {shown}</pre>"


_STYLE = """
#choice { position: sticky; top: 0; background: #fff; padding: .5em 0; }
#choice label { margin-right: 1em; white-space: nowrap; }
details { content-visibility: auto; contain-intrinsic-size: auto 1.6em; }
summary b { background: #e8e8e8; border-radius: .3em; padding: 0 .4em; font-weight: normal; font-size: 13px; }
summary i { color: #2a7d2a; font-style: normal; }
pre { margin: .4em 0; padding: .5em 1em; } pre.golden { border-left: .4em solid #2a7d2a; }
"""
# Without it, all failures are there, unfiltered.
_SCRIPT = """
const form = document.querySelector("#choice"), failures = [...document.querySelectorAll("#failures > details")];
function choose() {
  const kind = form.elements.kind.value, words = form.querySelector("[type=search]").value.toLowerCase();
  let shown = 0;
  for (const failure of failures) {
    const fits = (!kind || failure.dataset.kinds.split("|").includes(kind))
      && (!words || failure.textContent.toLowerCase().includes(words));
    failure.hidden = !fits;
    shown += fits;
  }
  form.querySelector("output").textContent = `${shown} shown`;
}
if (form) {
  form.addEventListener("input", choose);
  form.addEventListener("submit", event => event.preventDefault());
  choose();
}
"""
