"""What both trainings share: seeded steps that resume, a warm-up and cosine schedule, averaged weights, a log."""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

WARM_UP = 100  # steps
EMA_DECAY = 0.998
REPORT_EVERY, SAVE_EVERY = 25, 250  # steps

LossesOf = Callable[[int], dict[str, Tensor]]


class Training:
    """Trains `model` for a number of steps; its averaged copy is what is kept.

    The state (weights, average, optimisers, step) is written to `folder`/state.pt and gone on from there. What a step
    sees must depend on its number alone, so a training that was cut off ends as one that was not.
    """

    def __init__(self, model: nn.Module, steps: int, lr: float, folder: Path):
        self.model, self.steps, self.lr, self.folder = model, steps, lr, folder
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.step, self.seconds = 0, 0.0
        self.optimisers = _optimisers(model, lr)
        folder.mkdir(parents=True, exist_ok=True)
        self.state_file, self.log_file = folder / "state.pt", folder / "log.jsonl"
        if self.state_file.exists():
            self._load()

    def run(self, losses_of: LossesOf) -> None:
        """`losses_of(step)` gives the weighted losses of a step by name; their sum is what is minimised."""
        recent: dict[str, list[float]] = {}
        start = time.perf_counter()
        while self.step < self.steps:
            losses = losses_of(self.step)
            self._update(sum(losses.values()))
            self.step += 1
            for name, loss in losses.items():
                recent.setdefault(name, []).append(float(loss.detach()))
            if self.step % REPORT_EVERY == 0 or self.step == self.steps:
                now = time.perf_counter()
                self.seconds, start = self.seconds + now - start, now
                means = {name: round(statistics.mean(values), 5) for name, values in recent.items()}
                self._report({"step": self.step, "seconds": round(self.seconds, 1), **means})
                recent = {}
            if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                self._save()

    def _update(self, loss: Tensor) -> None:
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.lr * _schedule(self.step, self.steps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def _report(self, line: dict[str, float]) -> None:
        print(json.dumps(line), flush=True)
        with self.log_file.open("a") as log:
            log.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state_file)

    def _load(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"going on from step {self.step} of {self.steps}", flush=True)


class Muon(torch.optim.Muon):
    """Orthogonalised momentum, for convolutions too: as matrices from all inputs of a patch to the outputs."""

    def __init__(self, weights: Sequence[nn.Parameter], lr: float):
        self.weights = weights
        self.matrices = [nn.Parameter(weight.data.view(len(weight), -1)) for weight in weights]  # of one storage
        super().__init__(self.matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    def step(self) -> None:
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = weight.grad.reshape(matrix.shape)
            weight.grad = None
        super().step()


def _optimisers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, AdamW for everything else: gains, biases, embeddings, both ends."""
    inner = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and min(len(module.weight), module.weight[0].numel()) >= 16
    }
    inner -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}  # a tied head
    parameters = list(model.parameters())
    return [
        torch.optim.AdamW([p for p in parameters if id(p) not in inner], lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        Muon([p for p in parameters if id(p) in inner], lr),
    ]


def _schedule(step: int, steps: int) -> float:
    """A linear warm-up, then half a cosine down to a fiftieth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(steps - WARM_UP, 1)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * min(progress, 1))) / 2
