"""FFNs in float8 (e4m3): half the bytes of bfloat16, and on a GPU twice the rate of its matrix units.

Weights have one scale an output, made once; what they multiply, one scale a position, made as it comes. Each scale lets
the largest value of its row just fit, so that nothing is cut off, and no position depends on what shares its batch.
All else stays as it is, in bfloat16: attention is small beside the FFNs, and what is normed or summed needs the digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu.devices import is_device_error, is_out_of_memory
from flashu.errors import InputError
from flashu.fingerprint import fingerprint
from flashu.models.layers import GatedMlp, Span

if TYPE_CHECKING:
    from collections.abc import Callable

    from flashu.models.geometry import Showo2Config
    from flashu.models.showo2 import Showo2

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max  # 448
SMALLEST_ROW = 1e-12  # the largest value of a row that counts as zero
MULTIPLE = 16  # of all sizes of a product, and of where its operands begin in memory
LEAST_CAPABILITY = (8, 9)
TRIED = 256  # rows and columns of the product that tells whether there are products with scales of rows at all


class Float8Matrix(NamedTuple):
    """The rows of a matrix, each as float8 values times its scale."""

    data: Tensor  # (rows, columns), float8
    scale: Tensor  # (rows, 1), float32

    @classmethod
    def of(cls, x: Tensor) -> Float8Matrix:
        """Those of `x` (rows, columns)."""
        largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
        scale = largest.clamp(min=SMALLEST_ROW) / LARGEST
        # No clamp of the quotients: what rounding takes past LARGEST by a few units in float32 rounds back to it.
        return cls((x / scale).to(FORMAT), scale)


class Float8Linear(nn.Module):
    """A linear layer without bias, in float8: stands in for an `nn.Linear` that is only run, not trained."""

    data: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor):
        """Made of its weight (out, in), which is not kept."""
        super().__init__()
        rows = Float8Matrix.of(weight.detach())
        self.register_buffer("data", rows.data)
        self.register_buffer("scale", rows.scale.T)  # (1, out)

    @property
    def weight(self) -> Tensor:
        """What it is to calculate with, (out, in), float32: a copy."""
        return self.data.float() * self.scale.T

    def forward(self, x: Tensor, inputs: Span | None = None) -> Tensor:
        """The product with `x` (positions, in), or with a span of the inputs only."""
        return self.product(Float8Matrix.of(x), x.dtype, inputs=inputs)

    def product(
        self, x: Float8Matrix, dtype: torch.dtype, outputs: Span | None = None, inputs: Span | None = None
    ) -> Tensor:
        """The product with rows (positions, in), (positions, out) in `dtype`; of spans of outputs and inputs only."""
        rows, columns = (slice(*span) if span else slice(None) for span in (outputs, inputs))
        weight, scale = self.data[rows, columns].T, self.scale[:, rows]
        if x.data.is_cpu:  # which gains nothing by it, and has no product with scales of rows in every PyTorch
            return ((x.data.float() * x.scale) @ (weight.float() * scale)).to(dtype)
        product = torch._scaled_mm(
            x.data, weight, scale_a=x.scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return product.to(dtype)  # PyTorch has no other one with scales of rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        """Moved as other modules are; not converted: `model.to(torch.float32)` and the like are not about these."""

        def as_whole_numbers(tensor: Tensor) -> Tensor:  # which no conversion touches
            like = torch.uint8 if tensor.dtype == FORMAT else torch.int32
            return fn(tensor.view(like)).view(tensor.dtype)

        return super()._apply(as_whole_numbers, recurse)  # type: ignore[no-untyped-call]


class Float8Mlp(nn.Module):
    """A `GatedMlp` in float8."""

    def __init__(self, mlp: GatedMlp, device: torch.device):
        super().__init__()
        self.neurons = mlp.gate_proj.out_features
        gate, up, down = (linear.weight.to(device) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.gate_up = Float8Linear(torch.cat((gate, up)))
        self.down_proj = Float8Linear(down)

    def forward(self, x: Tensor, neurons: Span | None = None) -> Tensor:
        """Run the whole FFN, or a span of its neurons, widened to multiples of 16."""
        rows = Float8Matrix.of(x.flatten(0, -2))
        if neurons is None:
            gate, up = self.gate_up.product(rows, x.dtype).chunk(2, dim=-1)
        else:
            first, last = neurons[0] // MULTIPLE * MULTIPLE, -(-neurons[1] // MULTIPLE) * MULTIPLE
            neurons = (first, last)
            gate = self.gate_up.product(rows, x.dtype, outputs=neurons)
            up = self.gate_up.product(rows, x.dtype, outputs=(self.neurons + first, self.neurons + last))
        return self.down_proj(F.silu(gate) * up, neurons).view(x.shape)

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """As `GatedMlp.reorder`: scales are of outputs, so that of `down_proj` neither changes nor moves any."""
        order = order.to(self.gate_up.data.device)
        both = torch.cat((order, order + self.neurons))
        self.gate_up.data = self.gate_up.data.view(torch.uint8)[both].view(FORMAT)
        self.gate_up.scale = self.gate_up.scale[:, both]
        self.down_proj.data = self.down_proj.data.view(torch.uint8)[:, order].contiguous().view(FORMAT)


@torch.no_grad()
def to_float8(model: Showo2, device: torch.device | None = None) -> None:
    """Replace the FFNs of LLM and diffusion head by float8 ones, in place, one after the other.

    They are made on `device`, so that a model on its way there never takes the memory of the whole ones; its other
    weights stay where they are. Raises `InputError` where float8 does not work, and for a model on which FlashU is on.
    Where memory runs out meanwhile, some FFNs are float8 and others are whole: the model is of no more use.
    """
    device = device or model.device
    require_float8(device, model.config)
    if model.acceleration is not None:
        raise InputError("float8 is made of the unpatched model; call remove_flashu_patch(model) first")
    model.original_fingerprint = fingerprint(model)
    for owner in ffn_owners(model):
        owner.mlp = Float8Mlp(owner.mlp, device)


def ffn_owners(model: nn.Module) -> list[Any]:
    """The layers and blocks whose `mlp` is a `GatedMlp`."""
    return [module for module in model.modules() if isinstance(getattr(module, "mlp", None), GatedMlp)]


def require_float8(device: torch.device, config: Showo2Config) -> None:
    """Raises `InputError` unless FFNs of this geometry can run in float8 on `device`."""
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"dtype float8 runs on CUDA and on a CPU, not on {device}; use bfloat16")
    if device.type == "cuda" and torch.version.hip:
        raise InputError("dtype float8 needs an NVIDIA GPU; use bfloat16")
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        name, has, least = torch.cuda.get_device_name(device), *map(_dotted, (capability, LEAST_CAPABILITY))
        raise InputError(f"dtype float8 needs compute capability {least} or more, and {name} has {has}; use bfloat16")
    for what, geometry in (("LLM", config.llm), ("diffusion head", config.head)):
        sizes = geometry.hidden_size, geometry.intermediate_size
        if any(size % MULTIPLE for size in sizes):
            raise InputError(
                f"dtype float8 needs FFN sizes that are multiples of {MULTIPLE}, and those of the {what} are "
                f"{sizes[0]} and {sizes[1]}; use bfloat16"
            )
    if device.type == "cuda":
        try:
            ones = torch.ones(TRIED, TRIED, dtype=torch.bfloat16, device=device)
            Float8Linear(ones)(ones)
            torch.cuda.synchronize(device)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error) or is_device_error(error):
                raise
            reason = str(error).partition("\n")[0]
            raise InputError(f"dtype float8 does not work with this PyTorch and GPU ({reason}); use bfloat16") from None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
