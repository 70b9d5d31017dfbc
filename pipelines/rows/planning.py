"""Between the two passes: which good lines become rows, and on which side of the split."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from pipelines.rows import groups
from pipelines.rows.cleaning import digest
from pipelines.rows.lines import SOURCE
from pipelines.rows.row_files import Part, split_into_parts
from pipelines.rows.survey import Findings


@dataclass(frozen=True)
class GoldenDocuments:
    """The distinct documents of one side, in the order of their digests."""

    digests: np.ndarray
    groups: np.ndarray
    sources: np.ndarray
    """A line with each, [documents] of SOURCE."""


@dataclass
class Plan:
    """What the second pass writes."""

    parts: list[Part]
    order: np.ndarray
    """Index into the findings' records of each sample, part by part."""
    dev_documents: np.ndarray
    """Digests of the documents in groups of the dev side: training must not see them. Copies that were dropped count
    too."""
    golden: dict[str, GoldenDocuments]
    """By side."""
    dropped: Counter[str] = field(default_factory=Counter)
    leaks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Choices:
    """The settings that decide it; `prepare -h` explains each."""

    near_copies: float
    dev_share: float
    replay_share: float
    seed: int


def make_plan(found: Findings, shard_of_piece: np.ndarray, first_replay_shard: int, choices: Choices) -> Plan:
    """Drop copies, put each group of documents on one side, draw the replay. Every choice depends on content alone."""
    records = found.records
    shards = shard_of_piece[records["piece"]]
    replay = shards >= first_replay_shard
    copies = groups.exact_copies(records, replay)
    group = groups.group_documents(records, choices.near_copies)
    near = np.zeros(len(records), bool)
    if choices.near_copies < 1:
        kept = np.flatnonzero(~copies)
        near[kept] = groups.near_copies(records[kept], group[kept], [found.questions[i] for i in kept])
    used = ~copies & ~near
    is_dev = groups.on_dev_side(group, used & ~replay, choices.dev_share, choices.seed) & ~replay
    withheld = replay & np.isin(group, group[is_dev])
    drawn = _draw(records["key"], used & replay & ~withheld, int((used & ~replay & ~is_dev).sum()), choices)
    train, dev = used & ~is_dev & (~replay | drawn), used & is_dev
    sources = np.zeros(len(records), SOURCE)
    sources["shard"], sources["offset"], sources["key"] = shards, records["offset"], records["key"]
    sources["group"] = group
    sources["has_triple"] = _first_of_its_kind(records, train | dev)
    # Keys are digests, so their order is a shuffle that no shard's name can change.
    indices = [mask[np.argsort(records["key"][mask], kind="stable")] for mask in map(np.flatnonzero, (train, dev))]
    parts = [split_into_parts(side, sources[where]) for side, where in zip(("train", "dev"), indices, strict=True)]
    dropped = Counter({"exact copies": int(copies.sum()), "near copies": int(near.sum())})
    if replay.any():
        dropped["replay that shows the dev side"] = int((used & withheld).sum())
        dropped["replay not drawn"] = int((used & replay & ~drawn & ~withheld).sum())
    is_question = records["answer"] != 0
    return Plan(
        [part for side in parts for part in side],
        np.concatenate(indices),
        np.unique(records["document"][is_dev]),
        {side: _golden(records, group, sources, mask & is_question) for side, mask in (("train", train), ("dev", dev))},
        dropped,
        _leaks(records, group, train, dev),
    )


def _golden(records: np.ndarray, group: np.ndarray, sources: np.ndarray, mask: np.ndarray) -> GoldenDocuments:
    where = np.flatnonzero(mask)
    where = where[np.argsort(records["key"][where], kind="stable")]
    digests, first = np.unique(records["document"][where], return_index=True)
    return GoldenDocuments(digests, group[where[first]], sources[where[first]])


def _draw(keys: np.ndarray, candidates: np.ndarray, rows: int, choices: Choices) -> np.ndarray:
    """Mask of as many candidates as make `replay_share` of all, or of all of them if there are fewer.

    Rows stand in the order of their keys, so the draw goes by another digest: it is to be spread over them.
    """
    wanted = round(rows * choices.replay_share / (1 - choices.replay_share))
    where = np.flatnonzero(candidates)
    lots = np.array([digest(f"{choices.seed}:{key.decode()}") for key in keys[where].tolist()], np.uint64)
    drawn = np.zeros(len(keys), bool)
    drawn[where[np.argsort(lots, kind="stable")[:wanted]]] = True
    return drawn


def _first_of_its_kind(records: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Mask of one record for each pair of question and document, among those that are `kept`."""
    order = np.flatnonzero(kept)
    order = order[np.argsort(records["key"][order], kind="stable")]
    _, first = np.unique(records["pair"][order], return_index=True)
    mask = np.zeros(len(records), bool)
    mask[order[first]] = True
    return mask


def _leaks(records: np.ndarray, group: np.ndarray, train: np.ndarray, dev: np.ndarray) -> dict[str, int]:
    """How many groups and documents there are, and how many stand on both sides, which must be 0."""
    return {
        "groups": len(np.unique(group[train | dev])),
        "groups_on_both_sides": len(np.intersect1d(group[train], group[dev])),
        "documents": len(np.unique(records["document"][train | dev])),
        "documents_on_both_sides": len(np.intersect1d(records["document"][train], records["document"][dev])),
    }
