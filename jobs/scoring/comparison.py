"""The arms of a benchmark beside each other: scores, their difference prompt by prompt, and what an image costs; as a
table for a terminal, and as a file of numbers and a page, with the pictures of the prompts where the arms differ.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from cluster.storage import Storage
from flashu.errors import InputError
from jobs.dataset.keys import METADATA, json_file, metadata_key, shards_with
from jobs.report.page import page, thumbnails
from jobs.report.wording import NOTHING, number
from jobs.scoring.answers import answers_key
from jobs.scoring.questions import Item
from jobs.scoring.rules import Scored

COSTS = {
    "seconds_per_image": "worker seconds per image",
    "gpu_seconds_per_image": "GPU seconds per image",
    "tflop_per_image": "TFLOP per image",
}
GAPS = {  # shown where there are any
    "items_not_scored": "items left out of the scores",
    "failed_prompts": "prompts given up",
    "images_not_answered": "images not answered about",
    "answers_neither_yes_nor_no": "answers neither yes nor no",
}
LABEL = 34  # columns of a terminal
SHOWN = 8  # prompts


@dataclass
class Arm:
    """A run of the benchmark, scored. `summary` is what its summary.json holds."""

    name: str
    storage: Storage
    scored: Scored
    summary: Mapping[str, Any]
    tflop_per_image: float | None  # None where it could not be counted


def compare(arms: Sequence[Arm]) -> dict[str, Any]:
    """What comparison.json holds. Scores are over the items that all arms have images of, answered; differences are the
    last arm's less the first's.

    Raises `InputError` for arms that other models drew, or judged.
    """
    _check_models(arms)
    common = set.intersection(*(set(arm.scored.scores.items) for arm in arms))
    comparison: dict[str, Any] = {"version": 1, "arms": {arm.name: _describe(arm, common) for arm in arms}}
    if len(arms) < 2:
        return comparison
    first, second = (comparison["arms"][arm.name] for arm in arms)
    items = [
        {"item": item, "difference": arms[1].scored.scores.items[item] - score, arms[0].name: score}
        | {arms[1].name: arms[1].scored.scores.items[item]}
        for item, score in arms[0].scored.scores.items.items()
        if item in common
    ]
    differences = [item["difference"] for item in items]
    return comparison | {
        "difference": {
            "score": sum(differences) / len(differences) if differences else None,
            "standard_error": _standard_error(differences),
            "items_better": sum(value > 0 for value in differences),
            "items_worse": sum(value < 0 for value in differences),
            "items_equal": sum(value == 0 for value in differences),
            "level_1": _less(second["level_1"], first["level_1"]),
            "level_2": _less(second["level_2"], first["level_2"]),
        },
        "speed_up": {name: first[name] / second[name] if first[name] and second[name] else None for name in COSTS},
        "by_item": sorted(items, key=lambda item: (-abs(item["difference"]), item["item"])),
    }


def _check_models(arms: Sequence[Arm]) -> None:
    for what, of_arm in (
        ("drawn", {arm.name: (arm.summary["model"].get("identity") or "").partition(", scores ")[0] for arm in arms}),
        ("judged", {arm.name: arm.scored.answered_by for arm in arms}),
    ):
        if len(set(of_arm.values())) > 1:
            by = ", ".join(f"{name} by {identity}" for name, identity in of_arm.items())
            again = "its run" if what == "drawn" else "its folder of scores"
            raise InputError(f"the arms were {what} by different models: {by}. Remove {again}, and make it again")


def _describe(arm: Arm, items: Collection[str]) -> dict[str, Any]:
    scores, throughput = arm.scored.scores.over(items), arm.summary["throughput"]
    return {
        "score": scores.overall,
        "items": len(scores.items),
        "images": arm.scored.images,
        "items_not_scored": len(arm.scored.left_out) + len(arm.scored.scores.items) - len(scores.items),
        "failed_prompts": arm.summary["prompts"]["failed"],
        "images_not_answered": len(arm.scored.unanswered),
        "answers_neither_yes_nor_no": arm.scored.odd.neither,
        "seconds_per_image": throughput["worker_seconds_per_image"],
        "gpu_seconds_per_image": throughput["gpu_seconds_per_image"],
        "images_per_second": throughput["images_per_second"],
        "tflop_per_image": arm.tflop_per_image,
        "level_1": {name: tally.score for name, tally in scores.levels_1.items()},
        "level_2": {name: tally.score for name, tally in scores.categories.items()},
        "flashu": arm.summary["config"]["flashu"],
        "model": arm.summary["model"],
        "answered_by": arm.scored.answered_by,
    }


def _standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of paired differences."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _less(second: Mapping[str, float], first: Mapping[str, float]) -> dict[str, float]:
    return {name: second[name] - score for name, score in first.items() if name in second}


def table_of(comparison: Mapping[str, Any]) -> list[tuple[str, list[str], str]]:
    """The table of a comparison: a label, each arm's value, and the difference or ratio. A label alone is a heading."""
    arms = list(comparison["arms"].values())
    difference, speed_up = comparison.get("difference"), comparison.get("speed_up")
    error = difference and difference["standard_error"]
    spread = f" ± {error:.2f}" if error is not None else ""
    lines = [("DPG-Bench score", [_score(arm["score"]) for arm in arms], _signed(difference, "score") + spread)]
    for name, label in COSTS.items():
        if any(arm[name] is not None for arm in arms):
            ratio = f"{speed_up[name]:.2f}x" if speed_up and speed_up[name] else ""
            lines.append((label, [number(arm[name]) for arm in arms], ratio))
    for name, label in GAPS.items():
        if any(arm[name] for arm in arms):
            lines.append((label, [f"{arm[name]:,}" for arm in arms], ""))
    for level in ("level_1", "level_2"):
        lines.append((level.replace("_", " "), [], ""))
        for name in sorted({name for arm in arms for name in arm[level]}):
            values = [_score(arm[level].get(name)) for arm in arms]
            lines.append((f"  {name}", values, _signed(difference and difference[level], name)))
    return lines


def _score(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _signed(values: Mapping[str, Any] | None, name: str) -> str:
    if not values or values.get(name) is None:
        return ""
    return f"{round(values[name], 2) or 0:+.2f}"  # without a minus before nothing


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """The comparison as a table for a terminal."""
    arms = list(comparison["arms"])
    lines = [f"{'':<{LABEL}}" + "".join(f"{name:>12}" for name in arms) + ("  difference" if len(arms) > 1 else "")]
    for label, values, change in table_of(comparison):
        if not values:
            lines.append("")
        lines.append((f"{label:<{LABEL}}" + "".join(f"{value:>12}" for value in values) + f"  {change}").rstrip())
    if "difference" in comparison:
        lines.append(f"\n{verdict(comparison)}")
    return "\n".join(lines)


def verdict(comparison: Mapping[str, Any]) -> str:
    """How many prompts the second arm draws better, worse and alike."""
    difference = comparison["difference"]
    return (
        f"Of {len(comparison['by_item']):,} prompts, {list(comparison['arms'])[1]} scores better on "
        f"{difference['items_better']:,}, worse on {difference['items_worse']:,}, and the same on "
        f"{difference['items_equal']:,}."
    )


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
