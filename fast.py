"""Faster ways to the same numbers: each stands beside the plain one it equals, and a test compares the two.

    plain, in rora.py                             here
    -------------------------------------------   ----------------------------------------------------
    LoRALinear.cast at every use                  held: once for all micro-batches of an optimizer step
    DoRALinear.norm forms W + s B A               held: ‖W + s B A‖ from r-sized products
    F.cross_entropy(lm_head(hidden))              frozen_head_loss: a slice of logits at a time

rora.py can be read, and would be right, without this file.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TINY = torch.finfo(torch.float32).tiny


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Inside, every layer's cast() and norm() answer what they answered at the start.

    True as long as no adapter changes: for the micro-batches of one step, with their recomputed blocks.
    """
    layers = [m for m in model.modules() if hasattr(m, "held")]
    doras = [m for m in layers if hasattr(m, "held_norm")]
    norms = [factored_norm2(m) for m in doras]
    cancelled = (
        torch.stack([bad.any() for _, bad in norms]).tolist() if norms else []
    )  # one wait for the device
    for layer, (norm2, _), bad in zip(doras, norms, cancelled):
        layer.held_norm = layer.norm() if bad else norm2.clamp_min(TINY).sqrt()
    for layer in layers:
        layer.held = layer.cast()
    try:
        yield
    finally:
        for layer in layers:
            layer.held = None
        for layer in doras:
            layer.held_norm = None


@torch.no_grad()
def factored_norm2(layer) -> tuple[Tensor, Tensor]:
    """(‖V‖² per row, whether a row cancels too much to be trusted), without forming V = W + s B A:

    ‖W + s B A‖² = ‖W‖² + 2 s Σ (W Aᵀ) ∘ B + s² Σ (B A Aᵀ) ∘ B, with ‖W‖² computed once: r/O of the work.
    """
    W, A, B, s = layer.base.weight, layer.lora_A, layer.lora_B, layer.scaling
    if getattr(layer, "frozen_norm2", None) is None or layer.frozen_norm2[0] is not W:
        layer.frozen_norm2 = (W, W.float().square().sum(1))
    base = layer.frozen_norm2[1]
    cross = (W @ A.to(W.dtype).t()).float().mul_(B).sum(1)  # (O,)
    square = (B @ (A @ A.t())).mul_(B).sum(1)  # (O,)
    norm2 = base + 2 * s * cross + s * s * square
    # The error is of the size of the largest term times the precision of W Aᵀ. Where the terms cancel, it shows.
    trusted = 1e-6 if W.dtype == torch.float32 else 0.25
    return norm2, norm2 < trusted * torch.maximum(base, s * s * square)


# --- the loss of a frozen head ---------------------------------------------------------------------


def logit_bytes(device: torch.device) -> int:
    """fp32 logits held at once: on a GPU 2,048 tokens of a vocabulary of 32,000, on a CPU as many as its cache holds."""
    return 1 << 28 if device.type == "cuda" else 1 << 25


def frozen_head_loss(
    head: nn.Linear, hidden: Tensor, targets: Tensor
) -> Tensor:  # (n, C), (n,) -> ()
    size = max(1, logit_bytes(hidden.device) // (4 * head.out_features))
    return HeadLoss.apply(hidden, targets, head, size)


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a frozen head, in slices. The head needs no gradient, so all that backward asks for is that
    of `hidden`: it is made beside the loss, and each slice's logits are dropped at once instead of kept or made twice."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, targets: Tensor, head: nn.Linear, size: int
    ) -> Tensor:  # (n, C), (n,) -> ()
        needed = ctx.needs_input_grad[0]
        total, gradients = torch.zeros((), device=hidden.device), []
        for x, t in zip(hidden.split(size), targets.split(size)):
            with torch.set_grad_enabled(needed):
                x = x.detach().requires_grad_(needed)
                loss = F.cross_entropy(head(x).float(), t, reduction="sum")
            if needed:
                gradients += torch.autograd.grad(loss, x)
            total += loss.detach()
        if needed:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple:
        return (ctx.saved_tensors[0] * d).to(ctx.saved_tensors[0].dtype), None, None, None
