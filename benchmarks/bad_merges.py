"""What merge says of mistakes that others make: each is made on purpose, measured by the stage, and told of.

    python -m benchmarks.bad_merges --adapter out/demo/adapter

"In place" is into the 4-bit weights themselves, which rounds the sum again. The table is in Markdown.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from cluster import storage
from pipelines.merging import MergeConfig, merge
from pipelines.weights.folding import Update, folded
from pipelines.weights.weight_formats import through_nf4

Fold = Callable[[Tensor, Sequence[Update]], Tensor]


def in_place(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """The update added to what NF4 leaves of the weight, and the sum left in NF4."""
    return through_nf4(folded(through_nf4(weight.bfloat16()), updates).bfloat16())


def twice(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """The update added two times."""
    return folded(folded(weight, updates), updates)


def twice_in_place(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """Both mistakes."""
    return in_place(in_place(weight, updates), updates)


def not_at_all(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """The base as it was."""
    return weight.float()


WAYS: dict[str, Fold] = {
    "rightly": folded,
    "into 4 bits in place": in_place,
    "twice": twice,
    "twice, into 4 bits in place": twice_in_place,
    "not at all": not_at_all,
}


def line(name: str, fold: Fold, adapter: str, data: str, out: Path) -> str:
    """A line of the table."""
    config = MergeConfig(adapter=adapter, data=data, measure=True, keep=True, out=str(out))
    with patch("pipelines.weights.folding.folded", fold), contextlib.redirect_stdout(io.StringIO()):
        receipt = storage.open_folder(merge(config), "merge").receipt
    found, verdict = receipt.counts, "refused" if receipt.facts["verdict"] == "past the limits" else "written"
    numbers = f"{found['kl']:.4f} | {found['top1']:.1%} | {found['loss']:.4f} | {found['exact_match']:.1%}"
    return f"| {name} | {numbers} | {found['same_answers']} of {found['questions']} | {verdict} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="out/demo/adapter", help="folder written by train")
    parser.add_argument("--data", default="", help="folder written by prepare (default: what the adapter says)")
    chosen = parser.parse_args()
    print("| folded in | KL, nats | same likeliest token | loss | exact match | same answers | merge |")
    print("|---|--:|--:|--:|--:|--:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, fold in WAYS.items():
            print(line(name, fold, chosen.adapter, chosen.data, Path(folder, "model")), flush=True)


if __name__ == "__main__":
    main()
