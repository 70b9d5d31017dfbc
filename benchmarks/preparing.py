"""Rows and tokens a second of `prepare`, against the predecessor's loop and `datasets.map`, and the memory each takes.

    python -m benchmarks.big_shards --out /tmp/big --gigabytes 2 --source SHARDS
    python -m benchmarks.preparing --raw /tmp/big --tokenizer MODEL --out /tmp/prepared

Each contender runs as a process of its own, imports and start included; `datasets` is needed for its part
(pip install datasets). Memory is what a process has for itself, the largest of all processes and the sum of all.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from chatglm3 import example_ids, load_tokenizer
from chatglm3.documents import seed_prompt
from pipelines.rows.cleaning import clean_sample
from pipelines.rows.lengths import Ruler
from pipelines.rows.recipe import Kitchen, Recipe, hardest_first, multidoc_rows
from pipelines.rows.shards import Sample, parse_row
from pipelines.rows.survey import sample_key

RECIPE = Recipe({2: 0.2, 4: 0.4, 6: 0.2, 9: 0.2}, 0.5, 0.1, 0.15, 0.05, True, 0.5, 0.8, 4096, 42)
SAMPLE_EVERY_S = 0.2


def prepare_stage(raw: Path, out: Path, tokenizer: str) -> dict[str, int]:
    """This project: checks, copies, split and report included."""
    command = [sys.executable, "-m", "pipelines", "prepare", "--raw", str(raw), "--out", str(out / "data")]
    subprocess.run([*command, "--tokenizer", tokenizer], check=True, stdout=sys.stderr)
    report = json.loads((out / "data/report.json").read_text())
    return {"rows": sum(report["rows"].values()), "tokens": report["tokens"]}


def predecessor_loop(raw: Path, out: Path, tokenizer: str) -> dict[str, int]:
    """The predecessor: one process, one document a row, then each row tokenized; nothing is checked."""
    encoder, tokens, rows = load_tokenizer(tokenizer), 0, 0
    with (out / "rows.jsonl").open("w", encoding="utf-8") as file:
        for path in sorted(raw.glob("*.json")):
            with path.open(encoding="utf-8") as lines:
                for row in map(json.loads, lines):
                    prompt = seed_prompt(row["positive_doc"][0]["text"], row["QA"][0]["question"])
                    written = {"instruction": prompt, "output": row["QA"][0]["answer"]}
                    file.write(json.dumps(written, ensure_ascii=False) + "\n")
    with (out / "rows.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            tokens += len(example_ids(encoder, row["instruction"], row["output"], 1024, 512)[0])
            rows += 1
    return {"rows": rows, "tokens": tokens}


def datasets_map(raw: Path, out: Path, tokenizer: str) -> dict[str, int]:
    """`datasets.map(num_proc=2)` with this project's row maker; no copies dropped, no split, no report."""
    from datasets import load_dataset  # type: ignore[import-not-found]

    files = [str(path) for path in sorted(raw.glob("*.json"))]
    lines = load_dataset("text", data_files=files, split="train", cache_dir=str(out / "cache"))
    rows = lines.map(
        _make_rows, batched=True, batch_size=100, num_proc=2, remove_columns=["text"], fn_kwargs={"model": tokenizer}
    )
    rows.to_json(out / "rows.jsonl", force_ascii=False)
    return {"rows": len(rows), "tokens": sum(rows["tokens"])}


_kitchens: dict[str, Kitchen] = {}


def _make_rows(batch: dict[str, list[str]], model: str) -> dict[str, list[Any]]:
    kitchen = _kitchens.setdefault(model, Kitchen(RECIPE, Ruler(load_tokenizer(model))))
    made: dict[str, list[Any]] = {"row": [], "tokens": []}
    for text in batch["text"]:
        sample = parse_row(text.encode())
        assert isinstance(sample, Sample)
        sample = clean_sample(sample, True, False, kitchen.counts)
        for built in multidoc_rows(sample, hardest_first(sample, kitchen), sample_key(sample), kitchen):
            made["row"].append(json.dumps(built.row, ensure_ascii=False))
            made["tokens"].append(built.tokens)
    return made


CONTENDERS = {"prepare": prepare_stage, "predecessor": predecessor_loop, "datasets.map": datasets_map}


def measure(name: str, raw: Path, out: Path, tokenizer: str) -> dict[str, Any]:
    """Run one contender in a process of its own; returns rows, tokens, seconds and memory in MB."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    arguments = ["--raw", str(raw), "--out", str(out), "--tokenizer", tokenizer, "--only", name]
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.preparing", *arguments], stdout=subprocess.PIPE)
    peaks: dict[str, float] = {"largest process, MB": 0, "all processes, MB": 0}
    watch = threading.Thread(target=_watch, args=(psutil.Process(process.pid), peaks))
    watch.start()
    printed, _ = process.communicate()
    seconds = time.monotonic() - started
    watch.join()
    if process.returncode:
        raise SystemExit(f"{name} failed")
    found = json.loads(printed.decode().strip().splitlines()[-1])
    shutil.rmtree(out, ignore_errors=True)
    return {**found, "seconds": seconds, "tokens/s": found["tokens"] / seconds, **peaks}


def _watch(root: psutil.Process, peaks: dict[str, float]) -> None:
    while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
        sizes = list(_own_memory(root))
        peaks["largest process, MB"] = max([peaks["largest process, MB"], *sizes])
        peaks["all processes, MB"] = max(peaks["all processes, MB"], sum(sizes))
        time.sleep(SAMPLE_EVERY_S)


def _own_memory(root: psutil.Process) -> Iterator[float]:
    try:
        for process in (root, *root.children(recursive=True)):
            memory = process.memory_info()
            yield (memory.rss - memory.shared) / 1e6
    except psutil.NoSuchProcess:
        return


def main() -> None:
    """Measure all contenders and print a table with ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder of shards")
    parser.add_argument("--out", type=Path, required=True, help="folder for what they write; it is emptied")
    parser.add_argument("--tokenizer", required=True, help="model folder whose tokenizer counts")
    parser.add_argument("--only", choices=CONTENDERS, help="run just this one, in this process")
    chosen = parser.parse_args()
    if chosen.only:
        print(json.dumps(CONTENDERS[chosen.only](chosen.raw, chosen.out, chosen.tokenizer)))
        return
    gigabytes = sum(path.stat().st_size for path in chosen.raw.glob("*.json")) / 2**30
    print(f"{gigabytes:.2f} GiB of shards")
    first: dict[str, Any] = {}
    for name in CONTENDERS:
        result = measure(name, chosen.raw, chosen.out, chosen.tokenizer)
        first = first or result
        figures = ", ".join(f"{key} {value:,.0f}" for key, value in result.items())
        print(f"{name:14}{figures}; time x {result['seconds'] / first['seconds']:.2f}", flush=True)


if __name__ == "__main__":
    main()
