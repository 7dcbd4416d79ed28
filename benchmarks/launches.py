"""Count what the host dispatches for one batch of images, by part of the network, and where it waits for the device.

    python benchmarks/launches.py
    python benchmarks/launches.py --preset show-o2-7b --images 8 --json result.json

A batch of one is bound by the host, and there this is what one can take off. The real sampler and VAE run on PyTorch's
`meta` device, with projections joined as on a GPU: no weights, no GPU. Once uncompiled; once as if what `Blocks` calls
were compiled: each such call is then one, and what is dispatched around them counts as before; and once as if calls
were captured as CUDA graphs, each replay of which is one.

An operator is what PyTorch dispatches to the device below its composite functions, in inference. Left out are views
(whose schema says that the result shares its argument's memory), what only sets memory aside, what makes nothing (a
result without elements), and the host's own arithmetic. It is not a kernel: some launch several, as a convolution with
a bias does. Two functions are one operator here because a GPU has one for them, while `meta` takes them apart:
`scaled_dot_product_attention`, whatever a backend does with its mask, with a result that lies in memory as its query
does (cuDNN's; that of others may take a copy more or less), and `rms_norm`: on CUDA `_fused_rms_norm`, which copies an
input that is not contiguous first.

A wait is a tensor of the device made from Python's numbers, or a copy from the host that is not `non_blocking`: the
host goes on when the device has come that far. Reading the device (`item`, `tolist`, `nonzero`) cannot be tried out:
without data it is an error. The one place that does, on a GPU, is the choice of layers after a step that measures; it
is counted from the plan, without its operators. Images of a batch are taken to skip the same layers.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hardware import describe
from time_split import OTHER, labelled
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flashu
from flashu import sampler
from flashu.acceleration import layer_skipping
from flashu.acceleration.applied import Acceleration
from flashu.acceleration.plan import Plan
from flashu.config import GUIDANCE_SCALE, flashu_preset
from flashu.flops import REPEATED_BLOCKS, any_text
from flashu.models.blocks import AS_THEY_ARE, Blocks
from flashu.models.geometry import PATCH_SIZE, Showo2Config, VaeGeometry
from flashu.models.graphs import Graphs
from flashu.models.presets import PRESETS, preset
from flashu.models.showo2 import Showo2
from flashu.models.wan_vae import WanVae

aten = torch.ops.aten

SETTINGS = ("off", "paper-1.5b", "few-steps")
PREFIX_TOKENS = 62  # of a prompt with bos and boi
PARTS = {
    "_embed_span": "image path",
    "run_llm": "LLM",
    "measure_llm": "LLM",
    "run_head": "head",
    "run_final": "final layer",
    "lay_out_text": "prefix",
    "read_text": "prefix",
    "embed_times": "times",
}
VAE = "VAE"
ORDER = (*dict.fromkeys(PARTS.values()), VAE, OTHER)
MOST_PLACES = 15  # that are printed; the JSON has them all

ONE_OPERATOR = {F.scaled_dot_product_attention, F.rms_norm, torch.rms_norm}
FROM_PYTHON = {torch.tensor: 0, torch.as_tensor: 0, torch.asarray: 0, Tensor.new_tensor: 1}  # which argument is data
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
COPIES = {aten._to_copy, aten.copy_}
NO_LAUNCH = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view
}  # fmt: skip
PACKAGE = str(Path(flashu.__file__).parent)

UNCOMPILED, COMPILED, CAPTURED = WAYS = "uncompiled", "compiled", "captured"
CALLS = [field.name for field in fields(Blocks) if field.name not in ("compiler", "graphs")]
OPERATOR, WAIT, CALL = "operator", "wait", "call"


class Event(NamedTuple):
    part: str
    step: int  # how many steps were done before it
    kind: str
    name: str  # of the operator, of what waits, or of the field of `Blocks` that is called
    place: str  # file and line of ours


class Launches:
    """What is dispatched to the device where this is entered."""

    def __init__(self) -> None:
        self.events: Counter[Event] = Counter()
        self.part, self.step = OTHER, 0
        self._quiet = False
        self._remembered: dict[Any, tuple[Any, Counter[Event]]] = {}
        self._modes = (_Functions(self), _Operators(self))

    def __enter__(self) -> Launches:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def by(self, key: Callable[[Event], Any], *kinds: str, steps: range | None = None) -> dict[Any, int]:
        """How many events of these kinds, and of these steps, have what `key` says in common: most first."""
        counts: Counter[Any] = Counter()
        for event, count in self.events.items():
            if event.kind in kinds and (steps is None or event.step in steps):
                counts[key(event)] += count
        return dict(counts.most_common())

    def note(self, kind: str, name: str) -> None:
        if not self._quiet:
            self.events[Event(self.part, self.step, kind, name, _place())] += 1

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What is dispatched belongs to `part`; where parts are nested, to the innermost."""
        around, self.part = self.part, part
        try:
            yield
        finally:
            self.part = around

    @contextmanager
    def as_one(self, kind: str, name: str) -> Iterator[None]:
        """What is dispatched counts as one event."""
        self.note(kind, name)
        around, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = around

    def blocks(self, way: str) -> Blocks:
        """Blocks that count, called in one of `WAYS`: as they are, with each compiled call as one event, or with each
        replay of a graph as one.

        Calls that dispatch the same are dispatched once, and counted as often as they come.
        """
        blocks = Blocks.through(lambda function: function) if way != UNCOMPILED else AS_THEY_ARE
        calls = {name: self._watched(name, getattr(blocks, name), way != UNCOMPILED) for name in CALLS}
        if way != UNCOMPILED:
            calls["compiler"] = lambda function: self._watched(function.__name__.strip("_"), function, True)
        blocks = replace(blocks, **calls)
        return blocks.captured(Graphs(_Replays(self), math.inf)) if way == CAPTURED else blocks

    def _watched(self, name: str, call: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
        def once(*args: Any, **kwargs: Any) -> Any:
            key = (name, self.part, _alike(args), _alike(tuple(kwargs.items())))
            if key in self._remembered:
                result, events = self._remembered[key]
                for event, count in events.items():
                    self.events[event._replace(step=self.step)] += count
                return result
            before = self.events.copy()
            result = call(*args, **kwargs)
            self._remembered[key] = result, self.events - before
            return result

        def as_one(*args: Any, **kwargs: Any) -> Any:
            with self.as_one(CALL, name):
                return once(*args, **kwargs)

        return as_one if compiled else once


class _Replays:
    """Captures calls, each replay of which is one event; see `flashu.models.graphs.Capture`."""

    def __init__(self, launches: Launches):
        self.launches = launches

    def __call__(self, work: Callable[[], object]) -> tuple[Callable[[], None], int]:
        with self.launches.as_one(CALL, "capture"):
            work()
        return lambda: self.launches.note(CALL, "graph"), 0

    def renew(self) -> None:
        pass


class _Functions(TorchFunctionMode):
    """Sees what `meta` takes apart before the dispatcher, or makes without it."""

    def __init__(self, launches: Launches):
        super().__init__()
        self.launches = launches

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in ONE_OPERATOR:
            with self.launches.as_one(OPERATOR, function.__name__):
                result = function(*args, **kwargs)
                return torch.empty_like(args[0]) if function is F.scaled_dot_product_attention else result
        result = function(*args, **kwargs)
        if function in FROM_PYTHON and _on_device(result):
            if not isinstance((*args, *kwargs.values())[FROM_PYTHON[function]], Tensor):
                self._made_from_python(function.__name__)
        elif function in INDEXING and isinstance(args[0], Tensor) and _on_device(args[0]):
            for index in args[1] if isinstance(args[1], tuple) else (args[1],):
                if isinstance(index, (list, range)):
                    self._made_from_python("index")
        return result

    def _made_from_python(self, name: str) -> None:
        self.launches.note(OPERATOR, name)  # the copy
        self.launches.note(WAIT, name)


class _Operators(TorchDispatchMode):
    """Sees what is dispatched."""

    def __init__(self, launches: Launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        kind = operator.overloadpacket
        made = tree_leaves(result) if result is not None else tree_leaves(args)  # or written, where nothing is returned
        if not any(map(_on_device, made)) or operator.is_view or kind in NO_LAUNCH:
            return result
        name = kind.__name__
        self.launches.note(OPERATOR, name)
        from_host = (one for one in tree_leaves(args) if isinstance(one, Tensor) and not one.is_meta)
        if any(kind in COPIES or one.ndim for one in from_host):  # other operators are given a scalar by value
            waits = not kwargs.get("non_blocking") and not (kind is aten.copy_ and args[2:] == (True,))
            if waits:
                self.launches.note(WAIT, name)
        return result


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta and value.numel() > 0


def _place() -> str:
    """The innermost line of the package that is being run."""
    frame = sys._getframe(1)
    while frame.f_back and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    file = frame.f_code.co_filename
    return _told(file, frame.f_lineno) if file.startswith(PACKAGE) else "elsewhere"


def _told(file: str, line: int) -> str:
    return f"{Path(file).relative_to(Path(PACKAGE).parent)}:{line}"


def _alike(value: Any) -> Any:
    """What is the same in calls that dispatch the same."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, (tuple, list)):
        return tuple(map(_alike, value))
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), _alike(tuple(vars(value).values()))
    return type(value) if isinstance(value, REPEATED_BLOCKS) else value


@torch.no_grad()
def count_launches(
    config: Showo2Config, vae: VaeGeometry, plan: Plan, images: int = 1, way: str = UNCOMPILED
) -> Launches:
    """What one batch dispatches, from noise to pixels: where calls are captured, one after those that captured them."""
    grid = config.native_grid
    with torch.device("meta"):
        model, decoder = Showo2(config).bfloat16(), WanVae(vae).bfloat16()
    model.join()
    height, width = (side * PATCH_SIZE for side in grid)
    noise = sampler.initial_noise(range(images), config.image_latent_dim, height, width)
    text = any_text(config, plan, grid, PREFIX_TOKENS, images)
    points = sampler.time_grid(plan.num_inference_steps)
    launches = Launches()
    calls = [*((model, method, part) for method, part in PARTS.items()), (decoder, "decode_pixels", VAE)]
    blocks = launches.blocks(way)
    with labelled(calls, launches.within), launches:
        for _ in range(3 if way == CAPTURED else 1):
            launches.events.clear()
            launches.step = 0
            states = sampler.trajectory(model, noise, text, points, plan, blocks)
            latents = next(states)
            for step in plan.steps:
                latents = next(states)
                launches.step = step.number
            decoder.decode_pixels(latents)
    return launches


def summary(launches: Launches, plan: Plan) -> dict[str, Any]:
    """As the JSON has it. The first step stands apart, as it makes the times and its prefix."""
    steps = len(plan.steps)
    per_step = launches.by(lambda event: event.step, OPERATOR, CALL)
    return {
        "together": sum(per_step.values()),
        "per_step": [per_step.get(step, 0) for step in range(steps)],
        "calls": launches.by(lambda event: event.name, CALL),
        "operators": launches.by(lambda event: event.part, OPERATOR),
        "operators_by_name": launches.by(lambda event: event.name, OPERATOR),
        "operators_by_place": launches.by(_where, OPERATOR),
        "waits": {
            "first_step": launches.by(_where, WAIT, steps=range(1)),
            "later": launches.by(_where, WAIT, steps=range(1, steps + 1)),
        },
    }


def _where(event: Event) -> str:
    return event.place if event.kind == OPERATOR else f"{event.place} {event.name}"


def count_settings(name: str, flashu_name: str, images: int) -> dict[str, Any]:
    """All ways of one setting, as the JSON has them."""
    config, vae = preset(name)
    settings = flashu_preset(flashu_name)
    plan = Acceleration.of(settings, config.llm).plan(settings.total_steps, GUIDANCE_SCALE)
    choice = layer_skipping.least_important.__code__
    return {
        "flashu": flashu_name,
        "evaluations": len(plan.steps),
        **{way: summary(count_launches(config, vae, plan, images, way), plan) for way in WAYS},
        "waits_after_measuring": {
            _told(choice.co_filename, choice.co_firstlineno): sum(step.measure for step in plan.steps)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="show-o2-1.5b", choices=PRESETS, help="the model's size")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="of the batch (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    options = parser.parse_args()
    if options.images < 1:
        parser.error(f"--images {options.images}: a batch has one at least")
    counts = [count_settings(options.preset, flashu_name, options.images) for flashu_name in SETTINGS]
    print(f"{options.preset}, a batch of {options.images}, prefix {PREFIX_TOKENS} tokens, guided\n")
    print_counts(counts)
    if options.json:
        result = {
            **describe(torch.device("meta")),
            "command": "python benchmarks/launches.py " + shlex.join(sys.argv[1:]),
            "preset": options.preset,
            "images": options.images,
            "prefix_tokens": PREFIX_TOKENS,
            "counts": counts,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def print_counts(counts: Sequence[dict[str, Any]]) -> None:
    waits = [each["compiled"]["waits"] for each in counts]
    measured = [each["waits_after_measuring"] for each in counts]
    together = [
        sum(sum(places.values()) for places in (*waits_of.values(), after))
        for waits_of, after in zip(waits, measured, strict=True)
    ]
    print_table("", {"evaluations": [each["evaluations"] for each in counts], "waits": together})
    for way in WAYS:
        ways = [each[way] for each in counts]
        rows = {f"calls of {name}": numbers for name, numbers in side_by_side([each["calls"] for each in ways]).items()}
        rows |= {part: [each["operators"].get(part, 0) for each in ways] for part in ORDER}
        rows["together"] = [each["together"] for each in ways]
        rows["in a step, the median"] = [statistics.median_low(each["per_step"]) for each in ways]
        print_table(f"operators, {way}", rows)
    for way in WAYS:
        print_table(f"operators by place, {way}", side_by_side([each[way]["operators_by_place"] for each in counts]))
    print_table("waits in the first step", side_by_side([each["first_step"] for each in waits]))
    print_table("waits later", side_by_side([each["later"] for each in waits]))
    print_table("waits after measuring", side_by_side(measured))


def side_by_side(columns: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    """Of what columns name, the rows with the largest numbers, most first."""
    rows = {name: [column.get(name, 0) for column in columns] for column in columns for name in column}
    return dict(sorted(rows.items(), key=lambda row: -max(row[1]))[:MOST_PLACES])


def print_table(title: str, rows: Mapping[str, Sequence[int]]) -> None:
    print(f"{title:<48}" + "".join(f"{setting:>12}" for setting in SETTINGS))
    for name, numbers in rows.items():
        print(f"  {name:<46}" + "".join(f"{number:>12,}" for number in numbers))
    print()


if __name__ == "__main__":
    main()
