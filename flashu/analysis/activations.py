"""How the LLM's layers and the head's output change over a run: what layer skipping and the head cache live from.

All similarities are cosines between token states of the image span, averaged over tokens, rows and prompts, on
unaccelerated runs.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashu import arguments, probe
from flashu.acceleration.layer_skipping import count_to_skip
from flashu.errors import InputError
from flashu.models.showo2 import Showo2
from flashu.tokenizer import PromptTokenizer

MAX_LAG = 8


@dataclass
class Activations:
    """Averages over prompts. Steps are counted from 1, layers from 0; state 0 is the LLM's input, state i + 1 the
    output of layer i."""

    steps: int
    layers: int
    input_output: list[list[float]]  # [step][layer]: similarity of a layer's input and output
    inter_layer: list[list[float]]  # [state][state]: similarity between depths, averaged over steps
    across_steps: list[list[float]]  # [step - 1][state]: similarity of a state with itself one step before
    skipped: list[list[float]]  # [step][layer]: share of prompts that would skip the layer if measured there
    head_drift: list[list[float]]  # [lag - 1][step]: ‖h_s − h_{s−lag}‖ / ‖h_s‖ of the head's output; 0 where s ≤ lag
    skip_ratio: float

    def save(self, file: str | Path) -> None:
        Path(file).write_text(json.dumps(vars(self)) + "\n", encoding="utf-8")


@torch.no_grad()
def analyze(
    model: Showo2,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str] = probe.PROMPTS,
    num_inference_steps: int = 35,
    guidance_scale: float | None = None,
    skip_ratio: float = 0.2,
    on_item: Callable[[], object] | None = None,
) -> Activations:
    """Watch unaccelerated runs of an unpatched model, one per prompt."""
    probe.require_unpatched(model)
    if not prompts:
        raise InputError("the analysis needs at least one prompt")
    arguments.whole("num_inference_steps", num_inference_steps, least=3)  # two steps, to compare one with the next
    if not 0 <= skip_ratio < 1:
        raise InputError(f"skip_ratio is {skip_ratio}; it must be at least 0 and below 1")
    grid = model.config.native_grid
    plan = probe.stock_plan(model, num_inference_steps, guidance_scale)
    watchers = []
    for seed, prompt in enumerate(prompts):
        prefix = model.encode_prefix(probe.prompt_tokens(model, prompt, tokenizer, grid, plan).prefixes, grid)
        watcher = _Watcher(model, skip_ratio)
        probe.denoise(model, prefix, seed, plan, watcher.end_step)
        watcher.close()
        watchers.append(watcher)
        if on_item:
            on_item()

    def mean(name: str) -> list[Any]:
        return torch.stack([torch.stack(getattr(watcher, name)) for watcher in watchers]).mean(dim=0).tolist()

    layers = len(model.showo.model.layers)
    return Activations(
        steps=num_inference_steps - 1,
        layers=layers,
        input_output=mean("input_output"),
        inter_layer=torch.tensor(mean("inter_layer")).mean(dim=0).tolist(),
        across_steps=mean("across_steps"),
        skipped=mean("skipped"),
        head_drift=torch.tensor(mean("head_drift")).T.tolist(),
        skip_ratio=skip_ratio,
    )


class _Watcher:
    """One prompt's run: collects each step's layer states by hooks, and reduces them when the step ends."""

    def __init__(self, model: Showo2, skip_ratio: float):
        llm = model.showo.model
        self.to_skip = count_to_skip(len(llm.layers), skip_ratio)
        self.states: list[Tensor] = []  # of the step being run: unit token vectors, (rows · tokens, hidden)
        self.before: Tensor | None = None
        self.heads: deque[Tensor] = deque(maxlen=MAX_LAG)
        self.input_output: list[Tensor] = []
        self.inter_layer: list[Tensor] = []
        self.across_steps: list[Tensor] = []
        self.skipped: list[Tensor] = []
        self.head_drift: list[Tensor] = []
        self.handles = [llm.layers[0].register_forward_pre_hook(lambda _, args: self._keep(args[0]))]
        # The last layer's output is taken as the final norm leaves it, as layer skipping does.
        self.handles += [layer.register_forward_hook(lambda *args: self._keep(args[2][0])) for layer in llm.layers[:-1]]
        self.handles.append(llm.norm.register_forward_hook(lambda *args: self._keep(args[2])))

    def _keep(self, state: Tensor) -> None:
        self.states.append(F.normalize(state.float(), dim=-1).flatten(0, 1))

    def end_step(self, step: int, features: Tensor) -> None:
        states = torch.stack(self.states)  # (states, tokens, hidden)
        # The mean over tokens of cosines between unit vectors is one matrix product over tokens and hidden.
        flat = states.flatten(1)
        similarity = (flat @ flat.T / states.shape[1]).cpu()
        self.inter_layer.append(similarity)
        along = similarity.diagonal(offset=1)
        self.input_output.append(along)
        skipped = torch.zeros(len(along))
        skipped[along.argsort(descending=True, stable=True)[: self.to_skip]] = 1
        self.skipped.append(skipped)
        if self.before is not None:
            along_steps = [(now * then).sum(dim=-1).mean() for now, then in zip(states, self.before, strict=True)]
            self.across_steps.append(torch.stack(along_steps).cpu())
        self.before, self.states = states, []

        drift = torch.zeros(MAX_LAG)
        for lag, earlier in enumerate(reversed(self.heads), start=1):
            drift[lag - 1] = (features - earlier).float().norm() / features.float().norm()
        self.head_drift.append(drift)
        self.heads.append(features)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
