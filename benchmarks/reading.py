"""Does the multi-document recipe teach reading? Exact match of two tiny models by how many distractors a prompt has.

    python -m benchmarks.reading --out out/reading --picture docs/reading.svg

Both are tuned from the built-in model on the same made-up shards with the same settings, one on rows of preset
`multidoc`, one on preset `seed`, and then asked about other documents, among 0 to 9 distractors. Minutes on two cores.
Without quotes: to copy a sentence first is more than a model of this size learns in a minute.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

from chatglm3.tiny.knowledge import write_shards
from pipelines.demo import RECIPE
from pipelines.evaluation import EvaluateConfig, evaluate
from pipelines.merging import MergeConfig, merge
from pipelines.preparation import PrepareConfig, prepare
from pipelines.training import TrainConfig, train

MOST_DISTRACTORS = 9
EXAM = {"golden_only_share": 0.0, "refusal_share": 0.0, "twin_share": 0.0, "dev_share": 0.0, "max_tokens": 2048}


def tuned(preset: str, raw: str, out: Path) -> str:
    """The folder of the built-in model tuned on rows of `preset`."""
    rows = PrepareConfig(raw=raw, out=str(out / f"{preset}-data"), preset=preset, quotes=False)  # type: ignore[arg-type]
    data = prepare(rows)
    adapter = train(TrainConfig(data=data, out=str(out / f"{preset}-adapter"), workers=2, **RECIPE))
    return merge(MergeConfig(adapter=adapter, out=str(out / preset)))


def exact_match_by_distractors(evaluation: str) -> dict[str, list[float]]:
    """Of "model" and "against": exact match with 0, 1, ... distractors."""
    hits: dict[str, dict[int, list[float]]] = {"model": defaultdict(list), "against": defaultdict(list)}
    with Path(evaluation, "rows.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            for name, by_count in hits.items():
                by_count[row["documents"] - 1].append(row[name]["exact_match"])
    return {name: [sum(by[k]) / len(by[k]) for k in sorted(by)] for name, by in hits.items()}


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The curves as a picture."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("model", "preset multidoc"), ("against", "preset seed")):
        axes.plot(range(len(curves[name])), curves[name], marker="o", label=label)
    axes.set(ylim=(0, 1.02), xlabel="distractors in the prompt", ylabel="exact match on unseen documents")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Tune both, ask both, print and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/reading"), help="folder for data and models")
    parser.add_argument("--picture", type=Path, default=Path("docs/reading.svg"), help="file to draw")
    parser.add_argument("--samples", type=int, default=1600, help="questions to learn from (default 1600)")
    parser.add_argument("--questions", type=int, default=600, help="questions to be asked (default 600)")
    chosen = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "reading"
    for name, samples, seed in (("raw", chosen.samples, 1), ("exam-raw", chosen.questions, 2)):
        write_shards(chosen.out / name, "demo", samples, seed, negatives=MOST_DISTRACTORS + 2)
    counts = dict.fromkeys(range(MOST_DISTRACTORS + 1), 1 / (MOST_DISTRACTORS + 1))
    exam = prepare(
        PrepareConfig(raw=str(chosen.out / "exam-raw"), out=str(chosen.out / "exam"), distractors=counts, **EXAM)
    )
    multidoc, seed_model = (tuned(preset, str(chosen.out / "raw"), chosen.out) for preset in ("multidoc", "seed"))
    evaluation = evaluate(
        EvaluateConfig(model=multidoc, against=seed_model, data=exam, split="train", out=str(chosen.out / "scores"))
    )
    curves = exact_match_by_distractors(evaluation)
    for name, curve in curves.items():
        print(f"{name:8}", " ".join(f"{value:.0%}" for value in curve))
    draw(curves, chosen.picture)


if __name__ == "__main__":
    main()
