"""Measure what FlashU costs in quality and saves in work, on shapes-bench, and draw one against the other.

    python benchmarks/quality.py --json result.json --figure curve.png
    python benchmarks/quality.py --settings stock-8 paper --prompts 60
    python benchmarks/quality.py --group tau cache
    python benchmarks/quality.py --check result.json

Every setting draws the same prompts from the same noise, one seed a prompt. Reported for each:

- the oracle's score, from pixels alone, by DPG-Bench's rule, 0 to 100: of all prompts and of each sort; how far it is
  from the reference's on the same prompts, with the standard error of that difference;
- the same score with the model itself, unaccelerated, as judge of its pictures, and how often it and the oracle agree;
  once, as many rendered scenes as prompts are asked about, to tell how good a judge it is;
- means of image statistics, and the distance to the reference's picture: PSNR, SSIM;
- TFLOP an image, for a prompt of mean length; seconds an image in batches, with VAE; and both against the reference.

`stock-50`, the reference, `paper`, `embedded` and steps of order 2 draw the whole bench, the others its first 150
prompts, the sorts in turn: a default sweep takes about 25 minutes on two cores. `--check` draws what is in a result
file again, and fails where an oracle score is off by more than the tolerance: the same machine repeats it exactly,
another rounds differently.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hardware import describe
from PIL import Image
from quality_figures import draw_curve
from quality_measures import answers_right, psnr, ssim, statistics_of
from quality_settings import REFERENCE, SETTINGS, SWEEP_PROMPTS, Setting
from shapes import oracle
from shapes.bench import SORTS, Item, items
from shapes.captions import training_caption
from shapes.scenes import random_scene

from flashu.acceleration.applied import Acceleration, remove_flashu_patch
from flashu.acceleration.plan import Plan, make_plan
from flashu.acceleration.wanda import WandaScores
from flashu.calibration import calibrate
from flashu.devices import DTYPES, FLOAT8
from flashu.fingerprint import fingerprint
from flashu.flops import count_image
from flashu.models.geometry import PIXELS_PER_TOKEN
from flashu.patch import apply_flashu_patch
from flashu.pipeline import TextToImagePipeline

CALIBRATION_CAPTIONS = 8


def whole_bench() -> list[Item]:
    """All prompts, the sorts in turn, so that the first few are of every sort."""
    sorts = ([item for item in items() if item.sort == sort] for sort in SORTS)
    return [item for one_of_each in zip(*sorts, strict=True) for item in one_of_each]


def seed_of(item: Item) -> int:
    return zlib.crc32(item.id.encode())


@dataclass
class Judged:
    oracle: np.ndarray  # (items,), 0 to 100
    self_answered: np.ndarray
    agreement: float  # per cent of propositions of which both say the same


@dataclass
class Drawn:
    """The reference, as the others are held against it."""

    pictures: list[Image.Image]
    oracle: np.ndarray
    tflop: float
    seconds_per_image: float


class Bench:
    """A model with all that is made once for every setting."""

    def __init__(self, pipe: TextToImagePipeline, batch_size: int):
        self.pipe, self.batch_size = pipe, batch_size
        self.scores: dict[str, WandaScores] = {}
        self.reference: Drawn | None = None
        pipe(["a red circle"] * batch_size, num_inference_steps=3, seeds=0, batch_size=batch_size)  # warm-up

    def scores_by(self, calibration: str) -> WandaScores:
        """Importances measured in that way, on the model as it is unpatched."""
        if calibration not in self.scores:
            if calibration == "captions":
                rng = random.Random("calibration")
                captions = [training_caption(random_scene(rng), rng) for _ in range(CALIBRATION_CAPTIONS)]
                scores = calibrate(self.pipe.model, captions, tokenizer=self.pipe.tokenizer)
            else:
                scores = calibrate(self.pipe.model, tokenizer=self.pipe.tokenizer, method=calibration)
            self.scores[calibration] = scores
        return self.scores[calibration]

    def plan(self, setting: Setting) -> Plan:
        if setting.flashu:
            acceleration = Acceleration.of(setting.flashu, self.pipe.model.config.llm)
            return acceleration.plan(setting.total_steps, self.guidance(setting))
        return make_plan(None, setting.total_steps, self.guidance(setting))

    def guidance(self, setting: Setting) -> float:
        return self.pipe.model.config.guidance_scale if setting.guidance is None else setting.guidance

    def tflop_per_image(self, setting: Setting, prompts: Sequence[Item]) -> float:
        config = self.pipe.model.config
        limit = config.max_text_tokens(config.image_latent_height * config.image_latent_width)
        lengths = [len(self.pipe.tokenizer.encode_prompt(item.text, limit).prefix) for item in prompts]
        prefix = round(np.mean(lengths))
        cost = count_image(config, self.pipe.vae.geometry, self.plan(setting), config.native_grid, prefix)
        return cost.total / 1e12

    def draw(self, setting: Setting, prompts: Sequence[Item]) -> tuple[list[Image.Image], float]:
        """Pictures of the prompts, and the seconds that drawing them took. The model is unpatched again afterwards."""
        if setting.flashu:
            apply_flashu_patch(self.pipe.model, setting.flashu, scores=self.scores_by(setting.calibration))
        try:
            start = time.perf_counter()
            pictures = self.pipe(
                [item.text for item in prompts],
                seeds=[seed_of(item) for item in prompts],
                num_inference_steps=setting.total_steps,
                guidance_scale=setting.guidance,
                batch_size=self.batch_size,
            )
            return pictures, time.perf_counter() - start
        finally:
            remove_flashu_patch(self.pipe.model)

    def judge(self, prompts: Sequence[Item], pictures: Sequence[Image.Image]) -> Judged:
        """Each item's scores, by the oracle and by the model itself."""
        seen = [oracle.answers(picture, item.propositions) for item, picture in zip(prompts, pictures, strict=True)]
        questions = [[statement.question for statement in item.propositions] for item in prompts]
        probabilities = self.pipe.yes_probability(pictures, questions, batch_size=self.batch_size)
        said = [[yes > 0.5 for yes in of_picture] for of_picture in probabilities]
        scores = [
            np.array([100 * item.score(one) for item, one in zip(prompts, answers, strict=True)])
            for answers in (seen, said)
        ]
        agreement = np.mean(
            [a == b for one, other in zip(seen, said, strict=True) for a, b in zip(one, other, strict=True)]
        )
        return Judged(*scores, 100 * float(agreement))

    def measure(self, name: str, prompts: Sequence[Item]) -> dict[str, Any]:
        """Everything that is reported of one setting. The first call is the reference's, on no fewer prompts."""
        setting = SETTINGS[name]
        pictures, seconds = self.draw(setting, prompts)
        judged = self.judge(prompts, pictures)
        tflop = self.tflop_per_image(setting, prompts)
        seconds_per_image = seconds / len(prompts)
        if self.reference is None:
            self.reference = Drawn(pictures, judged.oracle, tflop, seconds_per_image)
        reference = self.reference
        originals = reference.pictures[: len(prompts)]
        change = judged.oracle - reference.oracle[: len(prompts)]
        return {
            "name": name,
            "group": setting.group,
            "steps": setting.total_steps,
            "guidance": None if setting.flashu and setting.flashu.schedule else self.guidance(setting),
            "flashu": setting.flashu and setting.flashu.describe(),
            "calibration": setting.calibration if setting.flashu and setting.flashu.r_p else None,
            "prompts": len(prompts),
            "oracle": by_sort(prompts, judged.oracle),
            "oracle_change": {
                "points": float(change.mean()),
                "standard_error": float(change.std(ddof=1) / len(change) ** 0.5) if len(change) > 1 else None,
            },
            "self_answered": by_sort(prompts, judged.self_answered),
            "agreement": judged.agreement,
            "statistics": statistics_of(pictures),
            "psnr_db": psnr(pictures, originals),
            "ssim": float(np.mean([ssim(one, other) for one, other in zip(pictures, originals, strict=True)])),
            "tflop_per_image": tflop,
            "seconds_per_image": seconds_per_image,
            "flop_ratio": reference.tflop / tflop,
            "speed_up": reference.seconds_per_image / seconds_per_image,
        }


def by_sort(prompts: Sequence[Item], scores: np.ndarray) -> dict[str, float]:
    """The mean score of all prompts, and of each sort that is among them."""
    sorts = np.array([item.sort for item in prompts])
    return {"all": scores.mean()} | {sort: scores[sorts == sort].mean() for sort in SORTS if sort in sorts}


def rounded(value: Any) -> Any:
    """Numbers to five digits, so that a result file reads and compares well."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value  # NumPy's float64 is one


HEADER = (
    f"{'setting':<31}{'prompts':>8}{'oracle':>8}{'change':>14}{'self':>7}{'PSNR':>7}{'SSIM':>7}"
    f"{'GFLOP':>8}{'ms':>8}{'FLOP':>7}{'time':>7}"
)


def table_row(entry: dict[str, Any]) -> str:
    change, error = entry["oracle_change"].values()
    changed = "" if entry["name"] == REFERENCE else f"{change:+.1f} ± {error or 0:.1f}"
    likeness = "equal" if entry["psnr_db"] is None else f"{entry['psnr_db']:.1f}"
    return (
        f"{entry['name']:<31}{entry['prompts']:>8}{entry['oracle']['all']:>8.1f}{changed:>14}"
        f"{entry['self_answered']['all']:>7.1f}{likeness:>7}{entry['ssim']:>7.3f}"
        f"{entry['tflop_per_image'] * 1e3:>8.2f}{entry['seconds_per_image'] * 1e3:>8.1f}"
        f"{entry['flop_ratio']:>6.2f}x{entry['speed_up']:>6.2f}x"
    )


def chosen(options: argparse.Namespace, committed: dict[str, Any] | None) -> dict[str, int | None]:
    """How many prompts each setting draws (None: all), the reference first."""
    names = [name for name, setting in SETTINGS.items() if setting.group in options.group] + options.settings
    counts = {name: None if setting.whole else SWEEP_PROMPTS for name, setting in SETTINGS.items()}
    if options.prompts is not None and (committed or options.prompts < 1):
        raise ValueError("--prompts is at least 1, and --check goes by the result's own")
    if committed:
        counts = {entry["name"]: entry["prompts"] for entry in committed["settings"]}
        unknown = counts.keys() - SETTINGS.keys()
        if unknown:
            raise ValueError(f"no setting is called {', '.join(sorted(unknown))} any more")
    elif options.prompts:
        counts = dict.fromkeys(SETTINGS, options.prompts)
    if names:
        counts = {name: count for name, count in counts.items() if name in names or name == REFERENCE}
    return counts


def differences(result: dict[str, Any], committed: dict[str, Any], tolerance: float) -> list[str]:
    """What keeps a result from being the committed one, line by line."""
    if result["fingerprint"] != committed["fingerprint"]:
        return [f"these are other weights: {result['fingerprint'][:12]}, not {committed['fingerprint'][:12]}"]
    expected = {entry["name"]: entry["oracle"]["all"] for entry in committed["settings"]}
    return [
        f"{entry['name']}: oracle score {entry['oracle']['all']:.2f}, not {expected[entry['name']]:.2f}"
        for entry in result["settings"]
        if abs(entry["oracle"]["all"] - expected[entry["name"]]) > tolerance
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="checkpoint folder or hub id (default: the embedded one)")
    groups = sorted({setting.group for setting in SETTINGS.values()})
    parser.add_argument("--settings", nargs="+", default=[], choices=SETTINGS, metavar="NAME", help="only these")
    parser.add_argument("--group", nargs="+", default=[], choices=groups, help="only the settings of these groups")
    parser.add_argument("--prompts", type=int, metavar="N", help=f"of each setting (default: {SWEEP_PROMPTS}, or all)")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", help="default: CUDA if there is one")
    parser.add_argument("--dtype", choices=[*DTYPES, FLOAT8], help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw quality against cost there, as PNG")
    parser.add_argument("--check", type=Path, metavar="FILE", help="repeat the settings of this result, and compare")
    parser.add_argument("--tolerance", type=float, default=1.0, help="of --check, in points (default 1.0)")
    options = parser.parse_args()
    try:
        committed = json.loads(options.check.read_text(encoding="utf-8")) if options.check else None
        counts = chosen(options, committed)
        pipe = TextToImagePipeline.from_pretrained(options.model, dtype=options.dtype, device=options.device)
        bench = Bench(pipe, options.batch_size)
        side = pipe.model.config.image_latent_height * PIXELS_PER_TOKEN
        prompts = whole_bench()
        right = answers_right(pipe, len(prompts[: counts[REFERENCE]]), side, options.batch_size)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{options.model} answers {right:.1f}% of yes-or-no questions about renders right\n\n{HEADER}")
    result = {
        **describe(pipe.model.device),
        "dtype": pipe.model.number_format,
        "model": options.model,
        "fingerprint": fingerprint(pipe.model),
        "batch_size": options.batch_size,
        "reference": REFERENCE,
        "answers_right": rounded(right),
        "settings": [],
    }
    for name, count in counts.items():
        entry = rounded(bench.measure(name, prompts[:count]))
        result["settings"].append(entry)
        print(table_row(entry), flush=True)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.figure:
        draw_curve(result, options.figure)
    if committed:
        found = differences(result, committed, options.tolerance)
        if found:
            sys.exit("\n".join(["", f"not the result in {options.check}:", *found]))
        print(f"\nas in {options.check}, within {options.tolerance:g} points")


if __name__ == "__main__":
    main()
