"""The chart of a plan: what each step of an image runs with FlashU, and what it costs. From the plan itself, as SVG."""

from __future__ import annotations

from itertools import groupby

from svg import SMALL, Drawing

from flashu.acceleration.applied import Acceleration
from flashu.acceleration.head_cache import Head
from flashu.acceleration.plan import Llm, Plan, PlannedStep, make_plan
from flashu.config import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, flashu_preset
from flashu.flops import FlopCount, count_image
from flashu.models.geometry import token_grid
from flashu.models.presets import preset

MODEL, SETTINGS, PREFIX = "show-o2-1.5b", "paper-1.5b", 62  # tokens, as `benchmarks/flops.py` has it
LLM = {  # what a step does with it: words, fill and line of a cell
    "whole": ("whole", "blue", "blue"),
    "skips": ("pruned, layers skipped", "pale", "pale"),
    "measures": ("pruned, layers measured", "warm", "warm"),
    "none": ("not run", "none", "faint"),
}
HEAD = {
    Head.COMPUTE: ("computes", "teal", "teal"),
    Head.STORE: ("computes, stores", "teal", "teal", True),
    Head.REUSE: ("stored output reused", "none", "faint"),
}


def planned() -> Plan:
    settings = flashu_preset(SETTINGS)
    return Acceleration.of(settings, preset(MODEL)[0].llm).plan(settings.total_steps, GUIDANCE_SCALE)


def unaccelerated() -> Plan:
    return make_plan(None, NUM_INFERENCE_STEPS, GUIDANCE_SCALE)


def counted(plan: Plan) -> FlopCount:
    """FLOP of one image of the model's own size."""
    config, vae = preset(MODEL)
    return count_image(config, vae, plan, token_grid(None, config.native_grid), PREFIX)


def of_llm(step: PlannedStep) -> str:
    """The key in `LLM` of what a step does. Raises `ValueError` for what no key stands for."""
    kinds = {
        (Llm.NONE, False, False): "none",
        (Llm.FULL, False, False): "whole",
        (Llm.PRUNED, True, False): "skips",
        (Llm.PRUNED, False, True): "measures",
    }
    kind = kinds.get((step.llm, step.skip, step.measure))
    if kind is None:
        raise ValueError(f"the chart has no colour for {step}")
    return kind


def plan() -> str:
    """A strip of cells for the LLM, the head and the guidance scale, and a bar of TFLOP, for each step."""
    steps, cost = planned().steps, counted(planned())
    plainly = counted(unaccelerated())
    each, side, floor, scale = 22, 18, 556, 25  # scale: units of the picture for a TFLOP
    left, right = 136, 136 + each * len(steps)
    drawing = Drawing(
        900,
        634,
        f"What each of the {len(steps)} steps of an image runs with FlashU, and its operations",
        "; ".join(
            f"step {step.number}: LLM {LLM[of_llm(step)][0]}, head {HEAD[step.head][0]}, guidance {step.guidance:g}, "
            f"{flop / 1e12:.2f} TFLOP"
            for step, flop in zip(steps, cost.steps, strict=True)
        ),
    )
    drawing.heading(
        f"What the {len(steps)} steps of an image run, with FlashU",
        f"LLM and diffusion head under the preset {SETTINGS}; Show-o2 1.5B at 432 pixels",
    )
    llm, head, guidance = 148, 228, 284
    names = {"LLM": llm + 15, "head": head + 15, "guidance": guidance + 20, "TFLOP": floor - 194, "step": floor + 26}
    for name, y in names.items():
        drawing.text(32, y, name, SMALL + 1, bold=True)
    drawing.legend(left, llm - 16, LLM.values())
    drawing.legend(left, head - 16, HEAD.values())
    for tflop in (0, 2, 4, 6, 8):
        drawing.path(f"M{left} {floor - scale * tflop}H{right - each + side}", "line")
        drawing.text(left - 12, floor - scale * tflop + 6, str(tflop), SMALL, "soft", "end")
    for guidance_scale, alike in groupby(steps, key=lambda step: step.guidance):
        numbers = [step.number for step in alike]
        x, width = left + each * (numbers[0] - 1), each * (len(numbers) - 1) + side
        drawing.rect(x, guidance, width, 28, "raised", "line", rx=5, stroke_width=1.5)
        drawing.text(x + width / 2, guidance + 20, f"{guidance_scale:g}", SMALL, anchor="middle")
    for step, flop in zip(steps, cost.steps, strict=True):
        x, (_, *colours) = left + each * (step.number - 1), LLM[of_llm(step)]
        drawing.cell(x, llm, side, *colours)
        drawing.cell(x, head, side, *HEAD[step.head][1:])
        if round(tall := scale * flop / 1e12, 2):
            drawing.rect(x, floor - tall, side, tall, colours[0])
        if step.number == 1 or step.number % 5 == 0 or step.number == len(steps):
            drawing.text(x + side / 2, floor + 26, str(step.number), SMALL, "soft", "middle")
    words = f"An image takes {cost.total / 1e12:.1f} TFLOP, decoding too; unaccelerated, in {len(plainly.steps)} whole "
    drawing.text(32, floor + 58, f"{words}steps, {plainly.total / 1e12:.1f}.", SMALL, "soft")
    return drawing.svg()
