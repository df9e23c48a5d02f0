"""Faster ways to the same numbers: each stands beside the plain one it equals, and is tested by it.

    plain, in rora.py and llama.py       here
    ----------------------------------   -----------------------------------------------------------
    LoRALinear.cast at every use         held: once for all micro-batches of a step, all together
    DoRALinear.norm forms W + s B A      held: ‖W + s B A‖ from r-sized products
    F.cross_entropy(lm_head(hidden))     frozen_head_loss: a slice of logits at a time
    x · cos + roll(x) · sin              Rotation: fewer passes, and backwards it turns back
    backward, kernel after kernel        Graphs: a micro-batch's work recorded once, then replayed

With the plain ones in their place, rora.py and llama.py would be right without this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:  # these files import this one
    from llama import Llama
    from rora import DoRALinear, LoRALinear

TINY = torch.finfo(torch.float32).tiny


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Inside, every layer's cast() and norm() answer what they answered at the start.

    True as long as no adapter changes: for the micro-batches of one step, recomputed blocks too.
    """
    with held_norms(factored_norms(model)), held_casts(model):
        yield


@contextmanager
def held_norms(norms: dict[DoRALinear, Tensor]) -> Iterator[None]:
    for layer, norm in norms.items():
        layer.held_norm = norm
    try:
        yield
    finally:
        for layer in norms:
            layer.held_norm = None


@contextmanager
def held_casts(model: nn.Module) -> Iterator[None]:
    layers: list[LoRALinear] = layers_with(model, "held")
    try:
        for dtype in {layer.base.weight.dtype for layer in layers}:
            these = [layer for layer in layers if layer.base.weight.dtype == dtype]
            tensors = [x for layer in these for x in (layer.lora_A, layer.lora_B)]
            casts = iter(tensors if dtype == torch.float32 else Casts.apply(dtype, *tensors))
            for layer, held in zip(these, zip(casts, casts)):
                layer.held = held
        yield
    finally:
        for layer in layers:
            layer.held = None


class Casts(torch.autograd.Function):
    """x.to(dtype) of many tensors; on a GPU a few launches in place of one for each, backwards too:
    of the 4,600 that a step of LLaMA-7B took, these were 640."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(cast_all(tensors, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple:
        there = [d for d in gradients if d is not None]
        cast = iter(cast_all(there, ctx.dtype))
        return None, *(None if d is None else next(cast) for d in gradients)


def cast_all(tensors: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    out = [torch.empty_like(x, dtype=dtype) for x in tensors]
    if out:
        torch._foreach_copy_(out, tensors)
    return out


def layers_with(model: nn.Module, name: str) -> list:
    """The adapters that have this attribute."""
    return [m for m in model.modules() if hasattr(m, name)]


@torch.no_grad()
def factored_norms(model: nn.Module) -> dict[DoRALinear, Tensor]:
    """Every DoRA layer's norm(), without forming V = W + s B A:

    ‖V‖² = ‖W‖² + 2 s Σ (W Aᵀ) ∘ B + s² Σ (B A Aᵀ) ∘ B, with ‖W‖² computed once: r/O of the work.

    The error is of the size of the largest term times the precision of W Aᵀ. Where the terms
    cancel, it shows: such a layer is computed as it stands in rora.py.
    """
    norms: dict[DoRALinear, Tensor] = {}
    cancelled = []
    for layers in alike(layers_with(model, "held_norm")):
        base, cross, square = norm_terms(layers)  # (n, O) each, n layers
        norm2 = base + cross + square
        trusted = 0.01 if layers[0].base.weight.dtype == torch.float32 else 0.25
        cancelled.append((norm2 < trusted * torch.maximum(base, square)).any(1))
        norms |= zip(layers, norm2.clamp_min(0).sqrt().clamp_min(TINY))
    bad = torch.cat(cancelled).tolist() if norms else []  # one wait for the device
    for layer in [layer for layer, one in zip(norms, bad) if one]:
        norms[layer] = layer.norm()
    return norms


def alike(layers: list[DoRALinear], most: int = 32) -> Iterator[list[DoRALinear]]:
    """On a GPU, layers of one shape together, up to `most`: each by itself costs more launches."""
    groups: dict[object, list[DoRALinear]] = {}
    for i, layer in enumerate(layers):
        shape = (layer.base.weight.shape, layer.rank, layer.scaling)
        groups.setdefault(shape if layer.base.weight.is_cuda else i, []).append(layer)
    for group in groups.values():
        yield from (group[i : i + most] for i in range(0, len(group), most))


def norm_terms(layers: list[DoRALinear]) -> tuple[Tensor, Tensor, Tensor]:
    """‖W‖², 2 s Σ (W Aᵀ) ∘ B and s² Σ (B A Aᵀ) ∘ B by row, of layers of one shape: (n, O) each."""
    for layer in layers:
        W, kept = layer.base.weight, vars(layer)
        now = W, W._version, W.dtype, W.device  # another weight, written to, cast or moved
        before, _ = kept.get("frozen_norm2", ((None,), None))
        if before[0] is not W or before[1:] != now[1:]:
            kept["frozen_norm2"] = now, W.float().square().sum(1)
    W, s = layers[0].base.weight, layers[0].scaling
    A, B = (stack([getattr(m, name) for m in layers]) for name in ("lora_A", "lora_B"))
    cast = A.to(W.dtype)  # (n, r, I)
    cross = W.new_empty(len(layers), W.size(0), A.size(1))  # (n, O, r)
    for i, layer in enumerate(layers):
        torch.mm(layer.base.weight, cast[i].t(), out=cross[i])
    by_row = lambda x: x.mul_(B).sum(2)  # (n, O, r) -> (n, O)
    square = B @ (A @ A.transpose(1, 2))  # (n, O, r)
    base = stack([vars(layer)["frozen_norm2"][1] for layer in layers])
    return base, 2 * s * by_row(cross.float()), s * s * by_row(square)


def stack(tensors: list[Tensor]) -> Tensor:
    """torch.stack, which copies each by itself, in one launch."""
    if len(tensors) == 1:
        return tensors[0][None]
    out = tensors[0].new_empty(len(tensors), *tensors[0].shape)
    torch._foreach_copy_(list(out.unbind()), tensors)
    return out


# --- the loss of a frozen head --------------------------------------------------------------------


def logit_bytes(device: torch.device) -> int:
    """Of fp32 logits at once: on a GPU 2,097 tokens of LLaMA, on a CPU what its cache holds."""
    return 1 << 28 if device.type == "cuda" else 1 << 25


def frozen_head_loss(
    head: nn.Linear, hidden: Tensor, targets: Tensor
) -> Tensor:  # (n, C), (n,) -> ()
    size = max(1, logit_bytes(hidden.device) // (4 * head.out_features))
    return HeadLoss.apply(hidden, targets, head, size)


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a frozen head, in slices. The head needs no gradient, so all that
    backward asks for is that of `hidden`: it is made beside the loss, and each slice's logits are
    dropped at once instead of kept or made twice."""

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


# --- rotary positions -----------------------------------------------------------------------------


class Rotation(torch.autograd.Function):
    """llama.apply_rope. The gradient of a rotation is the rotation back, by the same code."""

    @staticmethod
    def forward(
        ctx, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
    ) -> Tensor:  # (N, H, D), two of (N, 1, D) -> (N, H, D)
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return rotate(x, cos, sin, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        return rotate(d, cos, -sin, ctx.dtype), None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """x · cos + roll(x, D/2) · sin in fp32, cos's dtype: x is read as it is, not cast first."""
    halves = x.chunk(2, -1)
    if not x.is_cuda or torch.compiler.is_compiling():
        turned = torch.cat(halves[::-1], -1)  # roll, in one pass
        return (x * cos).add_(turned.to(cos.dtype).mul_(sin)).to(dtype)
    y, still = torch.empty_like(x, dtype=dtype), x * cos
    parts = zip(still.chunk(2, -1), halves[::-1], sin.chunk(2, -1), y.chunk(2, -1))
    for a, b, c, out in parts:  # neither rolled nor cast in a pass of its own
        torch.addcmul(a, b, c, out=out)
    return y


# --- CUDA graphs ----------------------------------------------------------------------------------


class Graphs:
    """rora.backward with each micro-batch's work recorded once and replayed after that: a step of
    LLaMA-7B starts thousands of kernels, and a GPU waits for the host that starts them.

    A recording is of one size: rows and tokens are filled up, tokens to a multiple of `step` by a
    row of padding that predicts nothing. Everything a recording reads or adds to stays where it is:
    its inputs, DoRA's norms, the gradients. The largest comes first, so that the others fit into
    its memory; where it does not fit, torch.OutOfMemoryError is raised, and nothing is kept.

    rows, tokens: the most in a micro-batch. longest: the most tokens in a record.
    """

    def __init__(self, model: Llama, rows: int, tokens: int, longest: int, step: int = 16):
        self.model, self.rows, self.step = model.train(), rows, step
        self.longest = max(longest, step)
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.grads = [torch.zeros_like(p) for p in self.params]
        self.norms = factored_norms(model)
        ids, full = torch.zeros(tokens, dtype=torch.long), tokens // longest
        lengths = [longest] * full + [tokens - full * longest] * (full < rows)
        try:
            self.take_gradients()
            with held_norms(self.norms):
                batch = SimpleNamespace(ids=ids, targets=ids, lengths=lengths)
                self.record(*self.filled_up(batch, 1))
        finally:
            for p in self.params:
                p.grad = None

    @staticmethod
    def refusal(model: Llama, recomputed: int) -> str | None:
        """Why this model's steps cannot be recorded, or None."""
        from llama import can_vary  # not above: llama.py imports this file

        weight = model.lm_head.weight
        if not can_vary(weight):  # other attention is cut to its batch's lengths
            return "they are for a GPU, in bf16, with torch 2.10 or later"
        if weight.requires_grad or model.prefix_len:
            return "they cover no prefix, and no head that trains"
        return "they cover no recomputed blocks" if recomputed else None

    def backward(self, model, batches: Iterable, count: int, recomputed: int) -> Iterator[Tensor]:
        """As rora.backward. `model` and `recomputed` are what this was made for."""
        self.take_gradients()
        filled = [self.filled_up(batch, count) for batch in batches]
        if self.norms:
            norms = factored_norms(model)
            torch._foreach_copy_([*self.norms.values()], [norms[layer] for layer in self.norms])
        with held_norms(self.norms):
            for rows, inputs in filled:
                yield self.replay(rows, inputs)

    def take_gradients(self) -> None:
        torch._foreach_zero_(self.grads)
        for p, grad in zip(self.params, self.grads):
            p.grad = grad

    def filled_up(self, batch, count: int) -> tuple:
        """The micro-batch as a recording takes it: its rows, and all tensors that it reads."""
        pad = -len(batch.ids) % self.step
        lengths = [*batch.lengths, *[0] * (self.rows - len(batch.lengths)), pad]
        rows = self.model.rows(lengths)
        rows.T = self.longest  # all that a recording keeps of the lengths is this bound
        ids = F.pad(batch.ids, (0, pad)).to(rows.cos.device)
        targets = F.pad(batch.targets, (0, pad), value=-100).to(rows.cos.device)
        total = rows.cos.new_tensor(float(count))
        return rows, [ids, targets, total, rows.cu_seq, rows.cos, rows.sin]

    def replay(self, rows, inputs: list[Tensor]) -> Tensor:
        size = len(inputs[0])
        if size not in self.recorded:
            self.record(rows, inputs)
        graph, places, loss = self.recorded[size]
        torch._foreach_copy_(places, inputs)
        graph.replay()
        return loss

    def record(self, rows, inputs: list[Tensor]) -> None:
        """Keep the recording, where it reads, where it leaves the loss. Draws no random number."""
        if not self.recorded:  # what happens at a first use alone must not be recorded
            before = torch.cuda.current_stream()
            with torch.random.fork_rng([inputs[0].device]), torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_stream(before)
                self.work(rows, *inputs)
            torch.cuda.synchronize()
        graph, recompiled = torch.cuda.CUDAGraph(), nullcontext()
        if self.model.layers[0]._compiled_call_impl:  # nothing can be compiled while it is recorded
            recompiled = torch.compiler.set_stance("eager_on_recompile")
        with recompiled, torch.cuda.graph(graph, pool=self.pool):
            loss = self.work(rows, *inputs)
        self.recorded[len(inputs[0])] = graph, inputs, loss

    def work(self, rows, ids: Tensor, targets: Tensor, count: Tensor, *_: Tensor) -> Tensor:
        """One micro-batch forward and backward, padding and all."""
        with held_casts(self.model):
            hidden = self.model.hidden(ids, rows)
            loss = frozen_head_loss(self.model.lm_head, hidden, targets) / count
            loss.backward()
        return loss.detach()
