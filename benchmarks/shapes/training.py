"""What both trainings share: seeded steps that resume, a warm-up and cosine schedule, averaged weights, a log.

On a CPU, two processes with a share of every batch each are a little faster than one with two threads: at these sizes
threads mostly wait for each other. On a GPU one process trains, and others draw the batches for it.
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, Dataset

WARM_UP = 100  # steps
EMA_DECAY = 0.998
REPORT_EVERY, SAVE_EVERY = 25, 250  # steps
STATE = "state.pt"

BatchOf = Callable[[int], Any]
LossesOf = Callable[[Any], dict[str, Tensor]]


def in_processes(count: int, work: Callable[..., None], *arguments: object) -> None:
    """Call `work` in so many processes that share the machine's cores, and each know its `rank`."""
    if count == 1:
        work(*arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        torch.multiprocessing.spawn(_join, (count, meeting, work, arguments), nprocs=count)


def _join(number: int, count: int, meeting: str, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(max((os.cpu_count() or 1) // count, 1))
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=count)
    try:
        work(*arguments)
    finally:
        dist.destroy_process_group()


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class _Batches(Dataset):
    """Batches by the number of their step."""

    def __init__(self, batch_of: BatchOf):
        self.batch_of = batch_of

    def __getitem__(self, step: int) -> Any:
        return self.batch_of(step)


class Training:
    """Trains `model` for a number of steps; its averaged copy is what is kept.

    `model` itself is made bfloat16 and does the work; weights are kept, updated and averaged in float32.
    The state (weights, average, optimisers, step) is written to `folder`/state.pt and gone on from there. What a step
    sees must depend on its number and the process alone, so a training that was cut off ends as one that was not.
    The losses that are logged are those of the first process's share of each batch.
    """

    def __init__(self, model: nn.Module, steps: int, lr: float, folder: Path):
        self.steps, self.lr, self.folder = steps, lr, folder
        self.weights = copy.deepcopy(model)
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.model = model.to(torch.bfloat16, memory_format=torch.channels_last)
        self.step, self.seconds = 0, 0.0
        self.shares = [_inner_matrices(self.weights)[number :: processes()] for number in range(processes())]
        self.adamw, self.muon = _optimisers(self.weights, self.shares[rank()], lr)
        folder.mkdir(parents=True, exist_ok=True)
        self.state_file, self.log_file = folder / STATE, folder / "log.jsonl"
        if self.state_file.exists():
            self._load()

    def run(self, batch_of: BatchOf, losses_of: LossesOf, loaders: int = 0) -> None:
        """`losses_of(batch_of(step))` gives a step's weighted losses by name; their sum is what is minimised.

        Batches are made by so many processes beside this one; 0: by this one, between steps.
        """
        steps = range(self.step, self.steps)
        batches = DataLoader(_Batches(batch_of), batch_size=None, sampler=steps, num_workers=loaders)
        recent: dict[str, list[Tensor]] = {}  # losses not read yet, for which a GPU would have to stop
        start = time.perf_counter()
        for batch in batches:
            losses = losses_of(batch)
            self._update(sum(losses.values()))
            self.step += 1
            for name, loss in losses.items():
                recent.setdefault(name, []).append(loss.detach())
            if self.step % REPORT_EVERY == 0 or self.step == self.steps:
                means = {name: round(torch.stack(values).mean().item(), 5) for name, values in recent.items()}
                now = time.perf_counter()
                self.seconds, start = self.seconds + now - start, now
                self._report({"step": self.step, "seconds": round(self.seconds, 1), **means})
                recent = {}
            if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                self._save()

    def _update(self, loss: Tensor) -> None:
        for optimiser in (self.adamw, self.muon):
            for group in optimiser.param_groups:
                group["lr"] = self.lr * _schedule(self.step, self.steps)
        loss.backward()
        weights = list(self.weights.parameters())
        grads = torch.cat([parameter.grad.float().flatten() for parameter in self.model.parameters()]) / processes()
        if processes() > 1:
            dist.all_reduce(grads)
        grads *= (1 / (grads.norm() + 1e-6)).clamp(max=1)
        for weight, grad in zip(weights, grads.split([weight.numel() for weight in weights]), strict=True):
            weight.grad = grad.view_as(weight)
        self.adamw.step()
        self.muon.step()
        if processes() > 1:
            for owner, share in enumerate(self.shares):
                updated = parameters_to_vector(share).detach()
                dist.broadcast(updated, owner)
                sizes = [matrix.numel() for matrix in share]
                for matrix, new in zip(share, updated.split(sizes), strict=True):
                    matrix.data.copy_(new.view_as(matrix))  # in place: Muon holds views of them
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), weights, 1 - decay)
            torch._foreach_copy_(list(self.model.parameters()), weights)
        self.model.zero_grad()

    def _report(self, line: dict[str, float]) -> None:
        if rank() == 0:
            print(json.dumps(line), flush=True)
            with self.log_file.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        momenta = [self.muon.state_dict()]
        if processes() > 1:
            dist.all_gather_object(momenta := [None] * processes(), self.muon.state_dict())
        if rank() > 0:
            return
        state = {
            "weights": self.weights.state_dict(),
            "average": self.average.state_dict(),
            "adamw": self.adamw.state_dict(),
            "muon": momenta,  # of each process's share
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state_file)

    def _load(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        self.weights.load_state_dict(state["weights"])
        self.model.load_state_dict(state["weights"])
        self.average.load_state_dict(state["average"])
        self.adamw.load_state_dict(state["adamw"])
        self.muon.load_state_dict(state["muon"][rank()])
        self.step, self.seconds = state["step"], state["seconds"]
        if rank() == 0:
            print(f"going on from step {self.step} of {self.steps}", flush=True)


def check_processes(folder: Path, count: int) -> None:
    """Raises `ValueError` where a training was begun by another number of processes, which cannot go on with it."""
    if (folder / STATE).exists():
        earlier = len(torch.load(folder / STATE, weights_only=True)["muon"])
        if earlier != count:
            raise ValueError(f"{folder} was trained by {earlier} processes; go on with --processes {earlier}")


class Muon(torch.optim.Muon):
    """Orthogonalised momentum, for convolutions too: as matrices from all inputs of a patch to the outputs."""

    def __init__(self, weights: Sequence[nn.Parameter], lr: float):
        self.weights = weights
        self.matrices = [nn.Parameter(weight.data.view(len(weight), -1)) for weight in weights]  # of one storage
        super().__init__(self.matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    def step(self) -> None:
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = weight.grad.reshape(matrix.shape)
        super().step()


def _inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices inside the network: not gains, biases, embeddings (or a head tied to them), nor either end."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and min(len(module.weight), module.weight[0].numel()) >= 16
        if id(module.weight) not in embeddings
    ]


def _optimisers(model: nn.Module, share: Sequence[nn.Parameter], lr: float) -> tuple[torch.optim.AdamW, Muon]:
    """Muon for this process's share of the inner matrices, AdamW for everything else."""
    inner = {id(matrix) for matrix in _inner_matrices(model)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inner]
    return torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0), Muon(share, lr)


def _schedule(step: int, steps: int) -> float:
    """A linear warm-up, then half a cosine down to a fiftieth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(steps - WARM_UP, 1)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * min(progress, 1))) / 2
