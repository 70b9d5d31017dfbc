"""Where the time of `prepare` goes, as a picture: both passes over some shards in one process, under cProfile.

python -m benchmarks.prepare_profile --raw /tmp/big --tokenizer MODEL --picture docs/prepare-profile.svg
"""

import argparse
import cProfile
import pstats
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from benchmarks.preparing import RECIPE
from pipelines.rows.lines import cut
from pipelines.rows.planning import Choices, make_plan
from pipelines.rows.row_files import Order, write_part
from pipelines.rows.survey import Rules, examine, join

STEPS = {
    "read lines": ("readline",),
    "parse and check JSON": ("parse_row",),
    "NFC": ("clean_sample",),
    "compare documents (copies, answers, split)": ("usable_distractors",),
    "BM25": ("bm25",),
    "MinHash": ("signature",),
    "find quotes": ("find_quote",),
    "tokenize": ("Encode",),
    "write JSON": ("_write",),
}
"""What a bar stands for -> the functions whose time, with all that they call, it shows. None calls another."""


def profile(raw: Path, tokenizer: str, num_pieces: int) -> pstats.Stats:
    """Both passes over the first pieces of the shards."""
    files = sorted(raw.glob("*.json"))
    pieces = [(index, piece) for index, path in enumerate(files) for piece in cut(path)][:num_pieces]
    rules = Rules("multidoc", tokenizer, RECIPE.max_tokens, mask_personal_data=False)
    examine(replace(pieces[0][1], end=1), 0, rules)  # loads the tokenizer
    with tempfile.TemporaryDirectory() as folder, cProfile.Profile() as profiler:
        found = join([piece for _, piece in pieces], [examine(piece, n, rules) for n, (_, piece) in enumerate(pieces)])
        shards = np.array([index for index, _ in pieces])
        plan = make_plan(found, shards, len(files), Choices(0.8, 0.1, 0.1, 42))
        order = Order(folder, list(map(str, files)), "multidoc", tokenizer, False, RECIPE, plan.dev_documents, 0)
        for part in plan.parts:
            write_part(part, order)
    return pstats.Stats(profiler)


def share_by_step(stats: pstats.Stats) -> dict[str, float]:
    """Share of the whole time."""
    total = stats.total_tt  # type: ignore[attr-defined]
    times = dict.fromkeys(STEPS, 0.0)
    for (_, _, function), (_, _, _, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        for step, names in STEPS.items():
            if function in names or any(f"'{name}'" in function for name in names):
                times[step] += cumulative
    shares = {step: seconds / total for step, seconds in times.items()}
    return {**shares, "all else": 1 - sum(shares.values())}


def main() -> None:
    """Profile, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder of shards")
    parser.add_argument("--tokenizer", required=True, help="model folder")
    parser.add_argument("--picture", type=Path, default=Path("docs/prepare-profile.svg"), help="file to draw")
    parser.add_argument("--pieces", type=int, default=4, help="how many pieces of 32 MiB (default 4)")
    chosen = parser.parse_args()
    shares = share_by_step(profile(chosen.raw, chosen.tokenizer, chosen.pieces))
    for step, share in shares.items():
        print(f"{share:6.1%}  {step}")
    matplotlib.rcParams["svg.hashsalt"] = "profile"
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    bars = axes.barh(list(shares), [100 * share for share in shares.values()])
    axes.bar_label(bars, fmt="%.0f %%", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("share of the time of both passes, one process")
    figure.savefig(chosen.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
