"""RoRA: LoRA whose scale falls with the root of the rank, not with the rank.

    python rora.py                                          # the embedded model, on a laptop
    python rora.py --ckpt llama-7b --rank 128 --scale sqrt  # the paper's setting, one GPU

This file is the paper: its layers, how they are put into a LLaMA, and the loop that trains them.
It reads no flags and writes no run folder; plumbing/jobs.py does, and calls `train` below.

    the paper                                          here, in this order
    H(x) = (m0 + γ B A) x, m0 frozen       (Eq. 1)     LoRALinear.forward, attach
    LoRA: γ = α / r                  (below Eq. 1)     SCALES["linear"]
    RoRA: γ = α / √r                  (Sec. III-B)     SCALES["sqrt"]           <- the whole method
    B = 0 at the start                     (Eq. 3)     LoRALinear.__init__
    ‖w‖ falls like 1/r, or stays     (Eq. 14, 15)      "Why √r", measured in lessons/derivation.md
    DoRA: m · (m0 + γ B A) / ‖m0 + γ B A‖    ([27])    DoRALinear
    the training recipe                  (Sec. IV)     learning_rate, train_step, train

    its letters                                        ours
    m0; p_in and p_out, its widths                     W (O, I), the weight of layer.base
    A, B, r, α                                         lora_A (r, I), lora_B (O, r), rank, alpha
    γ, the scale                                       s, layer.scaling
    m, DoRA's length of each row                       magnitude (O,)
    w = γ B A x, what the adapter adds; δ = ∂L/∂w      in "Why √r" alone

The other letters of shapes are in llama.py. There, B is a number of rows; here, it is the matrix.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import fast
from baselines import Adapter, ParallelAdapter, PrefixAttention, SeriesAdapter
from data import IGNORE, Batch, Record, collate, epoch_order
from llama import Llama
from plumbing import refuse
from plumbing.peft_files import AdapterSettings, read_adapter, write_adapter
from plumbing.refuse import NonFiniteError
from plumbing.run_folder import replaced_files

# --- the method -----------------------------------------------------------------------------------

SCALES: dict[str, Callable[[float, int], float]] = {
    "linear": lambda alpha, r: alpha / r,
    "sqrt": lambda alpha, r: alpha / math.sqrt(r),
}


class LoRALinear(nn.Module):
    """A frozen layer and a trained update of rank r: y = W x + s · lora_B lora_A x. (Eq. 1)"""

    base_type = nn.Linear  # what it can sit on
    targets = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    any_target = True  # --targets may put it on other layers
    scale = "linear"
    held: tuple[Tensor, Tensor] | None = None  # cast once for a whole step (fast.held)

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.rank, self.alpha, self.dropout = base, rank, alpha, nn.Dropout(dropout)
        # A random, B zero: the update starts at 0, so training starts from the base model exactly,
        # and B moves at the first step, its gradient being not 0. With both zero nothing would.
        # fp32, whatever the base: bf16 cannot add lr = 1e-4 to a weight of 1.
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))  # (r, I)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))  # (O, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(±1/√I): variance 1 / (3 I)

    @property
    def scaling(self) -> float:
        """s, the paper's γ."""
        return SCALES[self.scale](self.alpha, self.rank)

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        """Down to r numbers, up to O, added to W x in place, so that W x itself is gone."""
        A, B = self.cast()
        y = self.base(x)
        low = F.linear(self.dropout(x), A)  # (..., r)
        if y.dim() == 2:  # as in the model: no copy of y is made
            return y.addmm_(low, B.t(), alpha=self.scaling)
        return torch.add(y, low @ B.t(), alpha=self.scaling)

    def cast(self) -> tuple[Tensor, Tensor]:
        """A and B in the base's dtype, for the products; gradients reach the fp32 originals."""
        if self.held is not None:
            return self.held
        return self.lora_A.to(self.base.weight.dtype), self.lora_B.to(self.base.weight.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one (O, I) matrix, fp32, that does the same as this layer: W + s · lora_B lora_A."""
        return self.base.weight.float() + self.scaling * self.lora_B @ self.lora_A


class RoRALinear(LoRALinear):
    """LoRA with s = α/√r. (Sec. III-B; also rsLoRA's formula, arXiv 2312.03732, PEFT use_rslora)"""

    scale = "sqrt"


# Why √r.
# 1. The paper's steps. B starts at 0, so in the first step A's gradient is 0 and only B moves, by
#    -η γ δ (A x)ᵀ (Eq. 3). For the next input x' the adapter adds w = -η γ² δ · (xᵀAᵀA x') (Eq. 4).
#    Each of A's r rows adds one term to xᵀAᵀA x', so the paper takes its size to grow like r:
#    ‖w‖ ≈ c γ² r (Eq. 12). With γ = α/r that is c α²/r: the higher the rank, the less a step does
#    (Eq. 14). With γ = α/√r it is c α² at every rank (Eq. 15).
# 2. Where this slips, and what carries it. Eq. 9 lets A, x and x' be independent and finds
#    Var[w] = η² δ² γ⁴ · r² p_in. Counted out, it is r p_in (r + p_in + 1): the terms have random
#    signs, and at ranks well below p_in their sum grows like √r, not r. But real inputs are alike.
#    What x and x' share adds up without a sign: E[xᵀAᵀA x'] = r ⟨x, x'⟩ for A of variance 1. For
#    x' = x it is ‖A x‖², r positive terms. This part lowers the loss, in one step by η ‖∂L/∂B‖²,
#    which goes like γ² r: under α/√r the first step's gain is the same at every rank.
# 3. What AdamW changes. All of this is gradient descent. The recipe below uses AdamW, whose first
#    step moves every entry of B by lr, however small its gradient. Then the loss falls by lr γ r
#    times a constant: α/r makes the gain the same, and under α/√r it grows like √r. RoRA at rank r
#    is LoRA whose B learns √r times as fast. It helps where the learning rate is too low for LoRA
#    at a high rank, maybe so in Fig. 1. Where each rank has its own best rate, expect little.
# lessons/derivation.md measures each of these steps, lessons/results/findings.md what came of it.


class DoRALinear(LoRALinear):
    """Direction from LoRA, length apart: W' = m · V / ‖V‖ by row, with V = W + s · lora_B lora_A.

    The norm is a constant to the gradient (DoRA, arXiv 2402.09353, Sec. 4.3). Dropout acts on the
    adapter's branch alone, y = g · (W x + s · B A drop(x)) with g = m / ‖V‖. The original and PEFT
    also drop inside W x: the same at dropout 0, and a second product with W otherwise. A bf16 model
    rounds g as it rounds W x, to steps of .4 to .8%; a merged weight has all of it.
    """

    held_norm: Tensor | None = None  # norm() once for a whole step (fast.held)

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(base, rank, alpha, dropout)
        refuse.bias("DoRA", base)
        self.magnitude = nn.Parameter(self.norm())  # (O,): m = ‖W‖, so that W' = W at the start

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return (self.magnitude / self.norm()).to(x.dtype) * super().forward(x)

    @torch.no_grad()
    def norm(self) -> Tensor:  # (O,), fp32
        """‖V‖ by row. A row of zeros gets a tiny norm, so that g is a number."""
        if self.held_norm is not None:
            return self.held_norm
        return super().merged_weight().norm(dim=1).clamp_min(fast.TINY)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return (self.magnitude / self.norm())[:, None] * super().merged_weight()


@dataclass(frozen=True)
class Method:  # with the class itself, all that other files know of a method
    layer: type[Any]  # an Adapter, as baselines.py describes it
    rank: int = 32  # the default of --rank
    rank_is: str = "rank"  # what --rank counts
    dropout: float | None = 0.05  # the default; None: it takes none
    lr: float = 2e-4  # the default, where the checkpoint has none of its own
    other_scales: tuple[str, ...] = ()  # what --scale may ask for beside layer.scale
    file_format: str | None = None  # in plumbing/peft_files.py; None: ours, which PEFT refuses


METHODS = {
    "lora": Method(LoRALinear, lr=3e-4, file_format="lora"),
    "rora": Method(RoRALinear, file_format="lora"),
    "dora": Method(DoRALinear, other_scales=("sqrt",), file_format="dora"),
    "series": Method(SeriesAdapter, 256, "width", 0.0, 3e-4, file_format="bottleneck"),
    "parallel": Method(ParallelAdapter, 256, "width", 0.0, 3e-4, file_format="parallel bottleneck"),
    "prefix": Method(PrefixAttention, 30, "tokens", None, 3e-2, file_format="prefix"),
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

    rank: as the method counts it (Method.rank_is). scale: for a method that has other_scales.
    The model may be on meta, without numbers. Raises ValueError, worded by plumbing/refuse.py.
    """
    refuse.bad_settings(METHODS, SCALES, method, rank, alpha, targets, scale)
    refuse.second_adapter(wrappers(model))
    layer = METHODS[method].layer
    names = layer.targets if targets is None else targets
    where = list(places(model, layer.base_type))
    refuse.missing_targets(method, names, {name for _, name, _ in where})
    model.requires_grad_(False)
    for parent, name, base in where:
        if name in names:
            wrapper = layer(base, rank, alpha, dropout).train(base.training)
            wrapper.scale = scale or layer.scale
            setattr(parent, name, wrapper)


def places(model: Llama, base_type: type) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of all that an adapter could sit on."""
    for block in model.layers:
        for parent in block.modules():
            for name, module in parent.named_children():
                if isinstance(module, base_type):
                    yield parent, name, module


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name: layers.0.self_attn.q_proj.lora_A, ..."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def wrappers(model: nn.Module) -> dict[str, Adapter]:
    """The adapters, by the name of the layer each sits on."""
    kinds: tuple[type[Any], ...] = tuple({row.layer for row in METHODS.values()})
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def merge(model: Llama) -> None:
    """Fold every adapter into its layer, in memory: added in fp32, rounded once to the base dtype.
    Raises ValueError for a method that cannot be written as another weight matrix."""
    refuse.unmergeable(METHODS, adapter_settings(model).method)
    for name, layer in wrappers(model).items():
        parent, _, child = name.rpartition(".")
        weight = layer.merged_weight().to(layer.base.weight.dtype)
        layer.base.weight = nn.Parameter(weight, requires_grad=False)
        setattr(model.get_submodule(parent), child, layer.base)


# --- the loop -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The numbers of DoRA's scripts, which Sec. IV follows."""

    steps: int
    batch_size: int = 16
    micro_batch_size: int = 16  # records in memory at once; changes dropout's masks, no more
    lr: float = 2e-4
    warmup: int = 100
    seed: int = 0
    recomputed: int = 0  # blocks that keep their input alone and run again in backward


class Step(NamedTuple):  # one update, as `train` tells of it
    number: int  # from 1
    epoch: float
    batch: list[Record]
    lr: float
    loss: float  # mean over the batch's targets
    grad_norm: float
    seconds: float


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear up for `warmup` steps, linear down to 0. `step` counts from 0, so the first update has
    lr 0: transformers' get_linear_schedule_with_warmup, which LLM-Adapters' scripts use."""
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / max(1, steps - warmup)


def new_optimizer(model: nn.Module, lr: float) -> Optimizer:
    params = trainable(model).values()
    return AdamW(params, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)


def cross_entropy(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """(n, C), (n,) -> (), summed, in fp32. fast.frozen_head_loss is the same for a frozen head."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def loss_sum(model: Llama, batch: Batch, recomputed: int = 0) -> Tensor:
    """The loss of a batch, summed. Logits are made only where there is a target."""
    head, device = model.lm_head, model.lm_head.weight.device
    ids, rows = batch.ids.to(device), model.rows(batch.lengths)
    hidden = model.hidden(ids, rows, checkpoint_blocks=recomputed)  # (N, C)
    learned = (batch.targets != IGNORE).nonzero().squeeze(1)  # (n,)
    hidden, targets = hidden[learned.to(device)], batch.targets[learned].to(device)
    loss = cross_entropy if head.weight.requires_grad else fast.frozen_head_loss
    return loss(head, hidden, targets)


def targets_in(records: list[Record]) -> int:
    """Tokens that are learned: of each record those from its split on."""
    return sum(len(r.ids) - r.split for r in records)


def backward(model, batches: Iterable[Batch], count: int, recomputed: int) -> Iterator[Tensor]:
    """Add each micro-batch's gradient, yield its loss; as fast.Graphs.backward does."""
    with fast.held(model):
        for batch in batches:
            loss = loss_sum(model, batch, recomputed) / count
            loss.backward()
            yield loss.detach()


def train_step(
    model: Llama,
    records: list[Record],
    optimizer: Optimizer,
    lr: float,
    micro_batch_size: int,
    recomputed: int = 0,
    clip: float = 1.0,
    team=None,
    backward=backward,
) -> tuple[float, float]:
    """One update on one batch; returns (mean loss per target, gradient norm before clipping).

    Each micro-batch adds its loss divided by the whole batch's targets, so how the batch is cut
    does not matter. Raises NonFiniteError before anything bad reaches a weight. team: the other
    processes of a run on several GPUs, each with its share of the batch; None on one GPU.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    total, count = torch.zeros((), device=params[0].device), targets_in(records)
    mine = team.share(records) if team else records
    starts = range(0, len(mine), micro_batch_size)
    batches = (collate(mine[i : i + micro_batch_size]) for i in starts)
    for loss in backward(model, batches, count, recomputed):
        total += loss
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
    was_training, total = model.training, 0.0
    model.eval()
    with fast.held(model):
        for i in range(0, len(mine), micro_batch_size):
            total += loss_sum(model, collate(mine[i : i + micro_batch_size])).item()
    model.train(was_training)
    if team:
        total = team.total(total, model.lm_head.weight.device)
    return total / targets_in(records)


def train(
    model: Llama,
    records: list[Record],
    recipe: Recipe,
    optimizer: Optimizer,
    done: int = 0,
    team=None,
    backward=backward,
) -> Iterator[Step]:
    """Sec. IV's loop: update after update, each told to whoever iterates. It neither prints nor
    writes: logs, validation, the best adapter, checkpoints and Ctrl-C are the caller's. The last
    batch of an epoch may be a partial one. done: steps made before, to go on from there."""
    per_epoch = math.ceil(len(records) / recipe.batch_size)
    model.train()
    for step in range(done, recipe.steps):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == done:
            order = epoch_order(len(records), recipe.seed, epoch)
        batch = [records[j] for j in order[i * recipe.batch_size : (i + 1) * recipe.batch_size]]
        lr = learning_rate(step, recipe.steps, recipe.lr, recipe.warmup)
        began = time.perf_counter()
        size, again = recipe.micro_batch_size, recipe.recomputed
        loss, norm = train_step(model, batch, optimizer, lr, size, again, 1.0, team, backward)
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        yield Step(step + 1, (step + 1) / per_epoch, batch, lr, loss, norm, seconds)


# --- adapters on disk -----------------------------------------------------------------------------


def adapter_settings(model: nn.Module) -> AdapterSettings:
    """What is attached, read off the modules. Raises ValueError where nothing is."""
    layers = wrappers(model)
    refuse.no_adapter(layers)
    a = next(iter(layers.values()))
    method = next(name for name, row in METHODS.items() if row.layer is type(a))
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    base, s = getattr(model, "source", None), a.scaling if a.scale else None
    kind = METHODS[method].file_format
    return AdapterSettings(method, a.rank, targets, a.alpha, a.scale, a.dropout.p, base, s, kind)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the adapters add, by name, whether it trains or not: what is saved."""
    return {
        f"{layer}.{name}": p
        for layer, module in wrappers(model).items()
        for name, p in module.named_parameters(recurse=False)
    }


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """adapter_config.json and adapter_model.safetensors in PEFT's format, each replaced at once."""
    settings, tensors = adapter_settings(model), adapter_tensors(model)
    refuse.not_finite(tensors)
    with replaced_files(Path(folder)) as temporary:
        write_adapter(temporary, settings, tensors)


def load_adapter(model: Llama, folder: str | Path) -> AdapterSettings:
    """Attach and fill an adapter saved by us, PEFT, NVlabs/DoRA or LLM-Adapters, on a fresh base.

    The adapters stay trainable; train or eval mode stays as it was. Raises CheckpointError where
    file, config and model do not fit, naming the tensor or key, and leaves the model as it was.
    """
    settings, tensors = read_adapter(folder, METHODS)
    with torch.device("meta"):
        trial = Llama(model.cfg)
    with refuse.blaming(folder):
        attach(trial, *settings.build)
    refuse.misfits(folder, adapter_tensors(trial), tensors)
    attach(model, *settings.build)
    with torch.no_grad():
        for name, p in adapter_tensors(model).items():
            p.copy_(tensors[name])
    return settings


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see README. Never raises SystemExit."""
    from plumbing.jobs import main  # not above: jobs.py imports this file

    return main(argv)


if __name__ == "__main__":
    from rora import main  # the module, not the script: its classes must exist once

    sys.exit(main())
