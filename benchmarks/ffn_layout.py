"""Measure what another order of an FFN's weights in memory would bring to a pruned FFN.

    python benchmarks/ffn_layout.py --preset mid show-o2-1.5b --batch-size 1 4 --repeats 15 --json result.json
    python benchmarks/ffn_layout.py --preset show-o2-1.5b --batch-size 1 8 --dtype bfloat16 --device cuda

Gate and up are one matrix product where all neurons run, and two where FlashU runs the first of them only, as these lie
apart in the two layers' rows. Timed, over the same random weights and the same image spans, as they are and compiled:

    two          a product for gate, and one for up; of a pruned FFN, that of the library
    one          one product for both, of a gate's rows and then an up's; of a whole FFN, that of the library. Of a
                 pruned one it is no order that the layers' parameters could be views of, but the most that one can gain
    interleaved  one product, of rows in the order gate 0, up 0, gate 1, up 1, of which any span of neurons is a block,
                 and both layers' parameters are views; its result is read at every other place

These take turns. Reported are a call's median time, and its share of that of `two` right beside it: median and
quartiles. On a CPU one thread runs, and its own time counts: a busy machine disturbs that least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from generate import MODELS
from hardware import describe
from torch import Tensor

from flashu.acceleration.ffn_pruning import kept_neurons
from flashu.config import FlashUConfig
from flashu.devices import DTYPES, resolve_device

CALLS = {"cpu": 1, "cuda": 20}  # for one time; a GPU's follow each other, so that it does not wait for the host


@torch.no_grad()
def measure(
    rows: int,
    hidden: int,
    neurons: int,
    run: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    repeats: int,
) -> list[dict[str, Any]]:
    """Times of the first `run` of `neurons` over `rows` tokens, by every way, as it is and compiled by `backend`."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, fan_in: int = 1) -> Tensor:
        return (fan_in**-0.5 * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    x, down = draw(rows, hidden), draw(hidden, neurons, fan_in=neurons)[:, :run]
    gate, up = (draw(neurons, hidden, fan_in=hidden) for _ in range(2))
    block, interleaved = torch.cat((gate[:run], up[:run])), torch.stack((gate, up), dim=1).flatten(0, 1)
    ways: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "two": (by_two_products, (gate[:run], up[:run])),
        "one": (by_one_product, (block,)),
        "interleaved": (by_interleaved_product, (interleaved[: 2 * run],)),
    }
    expected = by_two_products(x, gate[:run], up[:run], down).float()
    found = []
    for compiled in (False, True):
        torch.compiler.reset()  # or one shape after the other would be compiled as one of any size
        calls = {
            name: partial(torch.compile(way, backend=backend) if compiled else way, x, *weights, down)
            for name, (way, weights) in ways.items()
        }
        for name, figures in take_turns(calls, device, repeats).items():
            difference = (calls[name]().float() - expected).abs().max() / expected.abs().max()
            found.append({"compiled": compiled, "way": name, **figures, "relative_difference": difference.item()})
    return found


def by_two_products(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
    return F.linear(F.silu(gate) * up, down)


def by_one_product(x: Tensor, gate_and_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_and_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def by_interleaved_product(x: Tensor, gate_and_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_and_up).unflatten(-1, (-1, 2)).unbind(-1)
    return F.linear(F.silu(gate) * up, down)


def take_turns(calls: dict[str, Callable[[], Tensor]], device: torch.device, repeats: int) -> dict[str, dict[str, Any]]:
    """Of each call the median seconds, and their share of the first call's; after a turn to warm up."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = call_seconds(calls[name], device)
            if turn:
                times[name].append(seconds)
    figures = {}
    for name, mine in times.items():
        shares = [one / other for one, other in zip(mine, times[names[0]], strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        figures[name] = {"seconds": statistics.median(mine), "share": middle, "share_quartiles": [low, high]}
    return figures


def call_seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    count = CALLS[device.type]
    if device.type != "cuda":
        start = time.process_time()
        for _ in range(count):
            call()
        return (time.process_time() - start) / count
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["mid"], choices=MODELS)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], help="images, of two rows each (default 1)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="default: both")
    parser.add_argument("--repeats", type=int, default=31, help="times of each (default 31)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default inductor)")
    parser.add_argument("--device", help="default: CUDA if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    options = parser.parse_args()
    if options.repeats < 2 or min(options.batch_size) < 1:
        parser.error("--repeats is a number from 2, for quartiles, and --batch-size are numbers from 1")
    try:
        device = resolve_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    if device.type not in CALLS:
        parser.error(f"--device {device}: choose one of: {', '.join(CALLS)}")
    if device.type == "cpu":
        torch.set_num_threads(1)

    ratio = FlashUConfig().r_p
    runs: list[dict[str, Any]] = []
    for preset in options.preset:
        config = MODELS[preset]
        hidden, neurons = config.llm.hidden_size, config.llm.intermediate_size
        span = 1 + config.native_grid[0] * config.native_grid[1]
        for batch in options.batch_size:
            for dtype in options.dtype:
                for run in (kept_neurons(neurons, ratio), neurons):
                    shape = {"rows": 2 * batch * span, "hidden": hidden, "neurons": neurons, "run": run}
                    settings = {"backend": options.backend, "repeats": options.repeats}
                    for entry in measure(**shape, dtype=DTYPES[dtype], device=device, **settings):
                        runs.append({"preset": preset, "batch_size": batch, "dtype": dtype, **shape, **entry})
                        print(line(runs[-1]), flush=True)
    if options.json:
        result = {**describe(device), "backend": options.backend, "repeats": options.repeats, "runs": runs}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def line(entry: dict[str, Any]) -> str:
    shape = f"{entry['rows']:>6} rows, {entry['run']:>5} of {entry['neurons']:>5} neurons"
    how = "compiled" if entry["compiled"] else "as it is"
    share = "{:.3f} ({:.3f} to {:.3f})".format(entry["share"], *entry["share_quartiles"])
    figures = f"{entry['seconds'] * 1e3:10.3f} ms   {share}"
    return f"{entry['preset']:<13}{shape}  {entry['dtype']:<9} {how:<9} {entry['way']:<12}{figures}"


if __name__ == "__main__":
    main()
