"""Shards of any size with 100 documents a row, for measuring `prepare`.

`python -m benchmarks.big_shards --out DIR --gigabytes 2` writes them from the made-up knowledge of the tiny model;
with `--source DIR` questions and documents are drawn from the Multi-Doc-QA shards there. The same seed gives the same
bytes.
"""

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

from chatglm3.tiny.knowledge import rows
from chatglm3.tiny.worlds import DEMO
from pipelines.rows.shards import Sample, find_shards, parse_row

SHARD_BYTES = 256 << 20
NEGATIVES = 99
MADE_UP = 3000


def write_shards(out: Path, total_bytes: int, source: str, seed: int) -> int:
    """Write shards of `total_bytes` together; returns how many rows they have."""
    out.mkdir(parents=True, exist_ok=True)
    samples = _samples(source)
    pool = [text for sample in samples for text in (sample.positive, *sample.negatives)]
    random, written, count = Random(seed), 0, 0
    while written < total_bytes:
        with (out / f"big-{written // SHARD_BYTES:03d}.json").open("w", encoding="utf-8") as file:
            limit = min(file.tell() + SHARD_BYTES, total_bytes - written)
            while file.tell() < limit:
                file.write(json.dumps(_row(samples, pool, random), ensure_ascii=False) + "\n")
                count += 1
            written += SHARD_BYTES
    return count


def _samples(source: str) -> list[Sample]:
    if not source:
        lines = [json.dumps(row).encode() for row in rows(DEMO, MADE_UP, seed=7)]
    else:
        lines = [line for path in find_shards(source) for line in path.read_bytes().splitlines()]
    return [item for item in map(parse_row, lines) if isinstance(item, Sample)]


def _row(samples: list[Sample], pool: list[str], random: Random) -> dict[str, Any]:
    sample = random.choice(samples)
    serial = f"{random.getrandbits(64):016x}"  # without it the rows would be copies, and dropped
    return {
        "QA": [{"question": f"关于“{serial}”，{sample.question}", "answer": sample.answer}],
        "positive_doc": [{"text": f"{serial}。{sample.positive}"}],
        "negative_doc": [{"text": text} for text in random.choices(pool, k=NEGATIVES)],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of all shards together (default 2)")
    parser.add_argument("--source", default="", help="folder of shards whose questions and documents are used")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    print(write_shards(Path(chosen.out), int(chosen.gigabytes * 2**30), chosen.source, chosen.seed), "rows")
