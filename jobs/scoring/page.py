"""A benchmark's comparison as a file of numbers and a page, with the pictures of the prompts where its arms differ."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from cluster.storage import Storage
from jobs.dataset.keys import METADATA, json_file, metadata_key, shards_with
from jobs.report.page import page, thumbnails
from jobs.report.wording import NOTHING
from jobs.scoring.answers import answers_key
from jobs.scoring.comparison import COSTS, Arm, table_of, verdict
from jobs.scoring.questions import Item

SHOWN = 8  # prompts


def write_comparison(
    storage: Storage, comparison: Mapping[str, Any], arms: Sequence[Arm], items: Mapping[str, Item], vqa: str
) -> str:
    """Puts numbers and page into the benchmark's folder, as `comparison`, or under the name of an arm that is alone.

    Returns the page's key. Raises `StorageError`.
    """
    names = [arm.name for arm in arms]
    stem = "comparison" if len(names) > 1 else names[0]
    storage.put(f"{stem}.json", json_file(comparison))
    html = page(
        "comparison.html",
        name=storage.url.rstrip("/").rpartition("/")[2],
        url=storage.url,
        arms=names,
        vqa=vqa,
        written_at=time.time(),
        comparison=comparison,
        costs=COSTS,
        table=table_of(comparison),
        verdict=verdict(comparison) if "difference" in comparison else "",
        shown=_shown(arms, [items[item] for item in _worth_seeing(comparison, arms)]),
        nothing=NOTHING,
    )
    storage.put(f"{stem}.html", html.encode())
    return f"{stem}.html"


def _worth_seeing(comparison: Mapping[str, Any], arms: Sequence[Arm]) -> list[str]:
    """The items that the arms score most differently, or those that the only one scores lowest."""
    if "by_item" in comparison:
        return [item["item"] for item in comparison["by_item"] if item["difference"]][:SHOWN]
    scores = arms[0].scored.scores.items
    return sorted(scores, key=lambda item: (scores[item], item))[:SHOWN]


def _shown(arms: Sequence[Arm], items: Sequence[Item]) -> list[dict[str, Any]]:
    ids = {item.id for item in items}
    prompts: dict[str, str] = {}
    pictures = {arm.name: _pictures(arm, ids, prompts) for arm in arms}
    answers = {arm.name: _answers(arm, ids) for arm in arms}
    return [
        {
            "id": item.id,
            "prompt": prompts.get(item.id, item.prompt),  # a manifest's own may be another than the question file's
            "scores": {arm.name: arm.scored.scores.items[item.id] for arm in arms},
            "pictures": {arm.name: pictures[arm.name][item.id] for arm in arms},
            "questions": [
                (question.text, {arm.name: answers[arm.name][item.id, question.id] for arm in arms})
                for question in item.questions
            ],
        }
        for item in items
    ]


def _pictures(arm: Arm, ids: Collection[str], prompts: dict[str, str]) -> dict[str, list[str | None]]:
    """The pictures of some prompts as `data:` URLs, in their order; None for one that cannot be read.

    Notes in `prompts` what they were made of.
    """
    places = []
    for shard in shards_with(arm.storage, METADATA):
        with arm.storage.open(metadata_key(shard)) as file:
            rows = pq.read_table(file, columns=["prompt_id", "prompt", "image_index", "file_name"]).to_pylist()
        places += [row | {"shard": shard, "row": index} for index, row in enumerate(rows) if row["prompt_id"] in ids]
    urls = thumbnails(arm.storage, arm.summary["config"]["output"]["format"], places)
    found: dict[str, list[str | None]] = defaultdict(list)
    for place in sorted(places, key=lambda place: place["image_index"]):
        prompts[place["prompt_id"]] = place["prompt"]
        found[place["prompt_id"]].append(urls.get((place["shard"], place["row"])))
    return found


def _answers(arm: Arm, ids: Collection[str]) -> dict[tuple[str, int], tuple[int, int]]:
    """How many of a prompt's images were answered yes, and how many were answered at all, by prompt and question."""
    counts: dict[tuple[str, int], tuple[int, int]] = defaultdict(lambda: (0, 0))
    folder = arm.scored.folder
    for shard in shards_with(arm.storage, folder):
        with arm.storage.open(answers_key(folder, shard)) as file:
            rows = pq.read_table(file, columns=["prompt_id", "question_id", "yes"]).to_pylist()
        for row in rows:
            if row["prompt_id"] in ids and row["question_id"] is not None:
                yes, asked = counts[row["prompt_id"], row["question_id"]]
                counts[row["prompt_id"], row["question_id"]] = yes + row["yes"], asked + 1
    return counts
