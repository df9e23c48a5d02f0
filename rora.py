"""RoRA: LoRA whose scale falls with the root of the rank, not with the rank.

    python rora.py                                           # the embedded model: a minute on a laptop
    python rora.py --ckpt llama-7b --rank 128 --scale sqrt   # the paper's setting, one GPU

This file is the paper: its layers, how they are put into a LLaMA, and the loop that trains them.
It reads no flags and writes no run folder; plumbing/jobs.py does, and calls `train` below.

    paper                                                code, in this order
    --------------------------------------------------   ------------------------------------------
    H(x) = (m0 + γ B A) x,  m0 frozen          (Eq. 1)   LoRALinear.forward, attach
    B = 0 at the start                         (Eq. 3)   LoRALinear.__init__
    LoRA:  γ = α / r                           (Eq. 14)  SCALES["linear"]
    RoRA:  γ = α / √r                          (Eq. 15)  SCALES["sqrt"]          <- the whole method
    DoRA:  m · (m0 + γ B A) / ‖m0 + γ B A‖     ([27])    DoRALinear
    why √r                                     (Eq. 2-15) "Why √r"; measured in tests/test_scaling.py
    the training recipe                        (Sec. IV) learning_rate, train_step, train

Letters as in llama.py, and I, O: a linear layer's input and output width; r: the rank; s: the scale,
γ in the paper. (The paper's matrix B is always written lora_B here; a lone B is a number of rows.)
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from baselines import ParallelAdapter, PrefixAttention, SeriesAdapter
from data import IGNORE, Batch, Record, collate, epoch_order
from llama import Llama
from plumbing.peft_files import (
    AdapterSettings,
    CheckpointError,
    adapter_file,
    read_adapter,
    some,
    write_adapter,
)
from plumbing.run_folder import replaced_files

# --- the method -----------------------------------------------------------------------------------

SCALES: dict[str, Callable[[float, int], float]] = {
    "linear": lambda alpha, r: alpha / r,
    "sqrt": lambda alpha, r: alpha / math.sqrt(r),
}


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained update of rank r:  y = W x + s · lora_B (lora_A x).  (Eq. 1)"""

    wraps = nn.Linear
    targets = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    elsewhere = True  # --targets may name other linear layers
    scale = "linear"
    held = None  # what cast() answers while fast.held lasts

    def __init__(self, base: nn.Linear, size: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.size, self.alpha, self.dropout = base, size, alpha, nn.Dropout(dropout)
        # A random, B zero: the update starts at 0, so training starts from the base model exactly,
        # and B's gradient is not 0, so it can leave. With both zero nothing would ever move.
        # fp32, whatever the base: an update of lr · 1 is smaller than bf16 can add to a weight of 1.
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(size, base.in_features, device=device))  # (r, I)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, size, device=device))  # (O, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(±1/√I): variance 1 / (3 I)

    @property
    def scaling(self) -> float:
        """s, γ in the paper."""
        return SCALES[self.scale](self.alpha, self.size)

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        """Down to r numbers, up to O, added to W x in one go: no (O, I) matrix is made or kept."""
        A, B = self.cast()
        y = self.base(x)
        low = F.linear(self.dropout(x), A)  # (..., r)
        flat = torch.addmm(
            y.view(-1, y.size(-1)), low.view(-1, low.size(-1)), B.t(), alpha=self.scaling
        )
        return flat.view_as(y)

    def cast(self) -> tuple[Tensor, Tensor]:
        """A and B in the base's dtype, as the product takes them; gradients reach the fp32 originals."""
        if self.held is not None:
            return self.held
        dtype = self.base.weight.dtype
        return self.lora_A.to(dtype), self.lora_B.to(dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one (O, I) matrix, fp32, that does the same as this layer: W + s · lora_B lora_A."""
        return self.base.weight.float() + self.scaling * self.lora_B @ self.lora_A


# Why √r. At the start lora_B = 0, so the first gradient is  ∂L/∂lora_B = s · G lora_Aᵀ,  G = ∂L/∂W.
# One step of plain gradient descent then lowers the loss by  η ‖∂L/∂lora_B‖² = η s² ‖G lora_Aᵀ‖².
# Each of the r rows of lora_A adds a term of the same expected size, so ‖G lora_Aᵀ‖² grows like r:
# with s = α/r the progress falls like 1/r, with s = α/√r it is the same at every rank. That is the
# paper's argument, and it is about gradient descent. The recipe below trains with AdamW, whose first
# step moves every entry of lora_B by lr whatever its gradient: the progress is then s · lr times a
# sum over r rows, so α/r is the rank-free scale and α/√r grows like √r.


class RoRALinear(LoRALinear):
    """LoRA with s = α/√r.  (Eq. 15; also rsLoRA's formula, arXiv 2312.03732, PEFT's `use_rslora`)"""

    scale = "sqrt"


class DoRALinear(LoRALinear):
    """Direction from LoRA, length learned apart:  W' = m · V / ‖V‖,  V = W + s · lora_B lora_A, by row.

    The norm is a constant to the gradient (DoRA, arXiv 2402.09353, Sec. 4.3). Dropout acts on the
    adapter branch alone, y = g · (W x + s · B A drop(x)) with g = m / ‖V‖; the original and PEFT also
    drop inside W x, which is the same at dropout 0 and costs a second product with W otherwise.
    """

    held_norm = None  # what norm() answers while fast.held lasts

    def __init__(self, base: nn.Linear, size: int, alpha: float, dropout: float = 0.0):
        super().__init__(base, size, alpha, dropout)
        self.magnitude = nn.Parameter(self.norm())  # (O,): m = ‖W‖, so that W' = W at the start

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return (self.magnitude / self.norm()).to(x.dtype) * super().forward(x)

    @torch.no_grad()
    def norm(self) -> Tensor:  # (O,), fp32
        """‖V‖ as the formula says; a row of zeros gets a tiny norm, so that g is 0 and not NaN."""
        if self.held_norm is not None:
            return self.held_norm
        return super().merged_weight().norm(dim=1).clamp_min(fast.TINY)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return (self.magnitude / self.norm())[:, None] * super().merged_weight()


@dataclass(frozen=True)
class Method:
    layer: type[nn.Module]  # built as layer(base, size, alpha, dropout); has .wraps and .targets
    size: int = 32  # rank, bottleneck width, or number of prefix tokens
    dropout: float = 0.05
    lr: float | None = None  # None: the checkpoint's


METHODS = {
    "lora": Method(LoRALinear),
    "rora": Method(RoRALinear),
    "dora": Method(DoRALinear),
    "series": Method(SeriesAdapter, size=256, dropout=0.0, lr=3e-4),
    "parallel": Method(ParallelAdapter, size=256, dropout=0.0, lr=3e-4),
    "prefix": Method(PrefixAttention, size=30, dropout=0.0, lr=3e-2),
}


def attach(
    model: Llama,
    method: str,
    rank: int,
    alpha: float | None = 64,
    dropout: float = 0.0,
    targets: list[str] | tuple[str, ...] | None = None,
    scale: str | None = None,
) -> None:
    """Freeze the model, then wrap its target layers: all that is trainable afterwards is new.

    rank: of lora, rora, dora; width of series, parallel; tokens of prefix. scale, "linear" or
    "sqrt": for dora alone, whose two scales share a name. Works on meta models. Raises ValueError
    for an unknown method, a target that matches nothing, or a model that has adapters already.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    layer = METHODS[method].layer
    targets = (targets,) if isinstance(targets, str) else tuple(targets or layer.targets)
    refuse_bad_settings(layer, method, rank, alpha, targets, scale)
    if wrappers(model):
        raise ValueError(
            "this model has adapters already: merge(model) them, or load the base anew"
        )
    places, known = [], set()
    for block in model.layers:
        for parent in block.modules():
            for name, child in parent.named_children():
                if isinstance(child, layer.wraps):
                    known.add(name)
                    if name in targets:
                        places.append((parent, name, child))
    if missing := set(targets) - known:
        raise ValueError(
            f"no layer to put {method} on is called {some(missing)}; "
            f"choose from {', '.join(sorted(known))}"
        )
    model.requires_grad_(False)
    for parent, name, child in places:
        wrapper = layer(child, rank, alpha, dropout).train(child.training)
        if scale is not None:
            wrapper.scale = scale
        setattr(parent, name, wrapper)


def refuse_bad_settings(
    layer, method: str, rank: int, alpha, targets: tuple, scale: str | None
) -> None:
    """The rules that attach() and the command line share. Raises ValueError."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if scale is not None and scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; choose from {', '.join(SCALES)}")
    if scale is not None and method != "dora" and scale != layer.scale:
        named = ": lora is linear and rora is sqrt, by name" if method in ("lora", "rora") else ""
        raise ValueError(f"method {method} does not take scale {scale}{named}")
    if layer.scale and not (alpha and alpha > 0):
        raise ValueError(f"alpha must be positive, got {alpha}")
    if not layer.elsewhere and set(targets) != set(layer.targets):
        raise ValueError(
            f"{method} sits on {', '.join(layer.targets)} alone, not on {some(targets)}"
        )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name: layers.0.self_attn.q_proj.lora_A, ..."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapters, by the name of the layer each sits on."""
    kinds = tuple({row.layer for row in METHODS.values()})
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def merge(model: Llama) -> None:
    """Fold every adapter into its layer, in memory: Δ added in fp32, rounded once to the base's dtype.

    Raises ValueError for methods that are no change of a weight matrix: series, parallel and prefix.
    """
    settings = adapter_settings(model)
    refuse_unmergeable(settings.method)
    for name, layer in wrappers(model).items():
        parent, _, child = name.rpartition(".")
        weight = layer.merged_weight().to(layer.base.weight.dtype)
        layer.base.weight = nn.Parameter(weight, requires_grad=False)
        setattr(model.get_submodule(parent), child, layer.base)


def refuse_unmergeable(method: str) -> None:
    if not hasattr(METHODS[method].layer, "merged_weight"):
        raise ValueError(
            f"{method} cannot be merged: what it adds is not a change of a weight matrix"
        )


# --- the loop -------------------------------------------------------------------------------------


class NonFiniteError(ValueError):
    """The loss, a gradient or a weight is NaN or infinite. Raised before it reaches a weight or file."""


@dataclass(frozen=True)
class Recipe:
    """Sec. IV, in the numbers of DoRA's scripts."""

    steps: int
    batch_size: int = 16
    micro_batch_size: int = 16  # records in memory at once; changes no result
    lr: float = 2e-4
    warmup: int = 100
    seed: int = 0
    recomputed: int = 0  # blocks that keep their input alone and run again in backward


class Step(NamedTuple):
    """One update, as `train` tells of it."""

    number: int  # from 1
    epoch: float
    batch: list[Record]
    lr: float
    loss: float  # mean over the batch's targets
    grad_norm: float
    seconds: float


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear up for `warmup` steps, linear down to 0; `step` counts from 0, so the first update has
    lr 0: transformers' get_linear_schedule_with_warmup, which LLM-Adapters' scripts use."""
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / max(1, steps - warmup)


def new_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        trainable(model).values(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
    )


def loss_sum(model: Llama, batch: Batch, recomputed: int = 0) -> Tensor:
    """Cross-entropy summed over the batch's targets, fp32. Logits are made only where there is one."""
    device = model.lm_head.weight.device
    hidden = model.hidden(
        batch.ids.to(device), model.rows(batch.lengths), checkpoint_blocks=recomputed
    )
    learned = (batch.targets != IGNORE).nonzero().squeeze(1)
    hidden, targets = hidden[learned.to(device)], batch.targets[learned].to(device)  # (n, C), (n,)
    if model.lm_head.weight.requires_grad:
        return F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")
    return fast.frozen_head_loss(
        model.lm_head, hidden, targets
    )  # the same, a slice of logits at a time


def targets_in(records: list[Record]) -> int:
    return sum(len(r.ids) - r.split for r in records)


def train_step(
    model: Llama,
    records: list[Record],
    optimizer: torch.optim.Optimizer,
    lr: float,
    micro_batch_size: int,
    recomputed: int = 0,
    clip: float = 1.0,
    team=None,
) -> tuple[float, float]:
    """One update on one batch; returns (mean loss per target, gradient norm before clipping).

    Each micro-batch adds its loss divided by the whole batch's targets, so how the batch is cut does
    not matter. Raises NonFiniteError before anything bad reaches a weight. `team`: the other
    processes of a run on several GPUs (plumbing/processes.py), each with its share of the batch.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    total, count = torch.zeros((), device=params[0].device), targets_in(records)
    mine = team.share(records) if team else records
    with fast.held(model):
        for i in range(0, len(mine), micro_batch_size):
            loss = loss_sum(model, collate(mine[i : i + micro_batch_size]), recomputed) / count
            loss.backward()
            total += loss.detach()
    if team:
        team.add_gradients(params)
        team.add(total)
    norm = nn.utils.clip_grad_norm_(params, clip)
    loss, norm = torch.stack([total, norm]).tolist()  # the step's one wait for the device
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        numbers = ", ".join(str(r.number) for r in records)
        raise NonFiniteError(f"loss {loss}, gradient norm {norm}, in records {numbers}")
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    optimizer.step()
    return loss, norm


@torch.no_grad()
def validation_loss(model: Llama, records: list[Record], micro_batch_size: int, team=None) -> float:
    """Mean loss per target, without dropout and without drawing a random number."""
    mine = team.share(records) if team else records
    model.eval()
    with fast.held(model):
        total = sum(
            loss_sum(model, collate(mine[i : i + micro_batch_size])).item()
            for i in range(0, len(mine), micro_batch_size)
        )
    model.train()
    if team:
        total = team.total(total, model.lm_head.weight.device)
    return total / targets_in(records)


def train(
    model: Llama,
    records: list[Record],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    done: int = 0,
    team=None,
) -> Iterator[Step]:
    """Sec. IV's loop: update after update, each told to whoever iterates. It neither prints nor
    writes: logs, validation, the best adapter, checkpoints and Ctrl-C are the caller's.

    The last batch of an epoch may be a partial one. `done`: steps already made, to go on from there.
    """
    per_epoch = math.ceil(len(records) / recipe.batch_size)
    model.train()
    for step in range(done, recipe.steps):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == done:
            order = epoch_order(len(records), recipe.seed, epoch)
        batch = [records[j] for j in order[i * recipe.batch_size : (i + 1) * recipe.batch_size]]
        lr = learning_rate(step, recipe.steps, recipe.lr, recipe.warmup)
        began = time.perf_counter()
        loss, norm = train_step(
            model, batch, optimizer, lr, recipe.micro_batch_size, recipe.recomputed, team=team
        )
        optimizer.zero_grad()
        yield Step(
            step + 1, (step + 1) / per_epoch, batch, lr, loss, norm, time.perf_counter() - began
        )


# --- adapters on disk -----------------------------------------------------------------------------


def adapter_settings(model: nn.Module) -> AdapterSettings:
    """What is attached, read off the modules. Raises ValueError where nothing is."""
    layers = wrappers(model)
    if not layers:
        raise ValueError("the model has no adapter: attach(model, method, rank) first")
    first = next(iter(layers.values()))
    method = next(name for name, row in METHODS.items() if row.layer is type(first))
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    return AdapterSettings(
        method,
        first.size,
        targets,
        first.alpha,
        first.scale,
        first.dropout.p,
        getattr(model, "source", None),
        first.scaling if first.scale else None,
    )


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the adapters add, by name, whether it trains or not: what is saved."""
    return {
        f"{layer}.{name}": p
        for layer, module in wrappers(model).items()
        for name, p in module.named_parameters(recurse=False)
    }


def check_finite(tensors: dict[str, Tensor]) -> None:
    for name, p in tensors.items():
        if not torch.isfinite(p).all():
            raise NonFiniteError(f"{name} holds NaN or infinity; nothing was saved")


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """adapter_config.json and adapter_model.safetensors in PEFT's format, each replaced at once."""
    settings, tensors = adapter_settings(model), adapter_tensors(model)
    check_finite(tensors)
    with replaced_files(Path(folder)) as temporary:
        write_adapter(temporary, settings, tensors)


def load_adapter(model: Llama, folder: str | Path) -> AdapterSettings:
    """Attach and fill an adapter saved by us, PEFT, NVlabs/DoRA or LLM-Adapters, on a fresh base.

    The adapters stay trainable; train or eval mode stays as it was. Raises CheckpointError where
    file, config and model do not fit, naming the tensor or key, and leaves the model as it was.
    """
    settings, tensors = read_adapter(folder)
    with torch.device("meta"):
        trial = Llama(model.cfg)
    try:
        attach_like(trial, settings)
    except ValueError as e:
        raise CheckpointError(f"{folder}: {e}") from None
    refuse_misfit(adapter_file(Path(folder)), adapter_tensors(trial), tensors)
    attach_like(model, settings)
    with torch.no_grad():
        for name, p in adapter_tensors(model).items():
            p.copy_(tensors[name])
    return settings


def attach_like(model: Llama, s: AdapterSettings) -> None:
    attach(model, s.method, s.size, s.alpha, s.dropout, s.targets, s.scale)


def refuse_misfit(path: Path, want: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless names and shapes agree."""
    if missing := want.keys() - found.keys():
        raise CheckpointError(f"{path}: missing {some(missing)}")
    if extra := found.keys() - want.keys():
        raise CheckpointError(f"{path}: no place in this model for {some(extra)}")
    for name, p in want.items():
        if p.shape != found[name].shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(found[name].shape)}, this base needs "
                f"{tuple(p.shape)}: another base?"
            )


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see README. Never raises SystemExit."""
    from plumbing.jobs import main  # not above: jobs.py imports this file

    return main(argv)


if __name__ == "__main__":
    from rora import main  # the module, not the script: its classes must exist once

    sys.exit(main())
