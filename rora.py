"""RoRA: LoRA whose scale falls with the root of the rank, not with the rank.

    python rora.py                                           # the embedded default: a minute on a laptop, no download
    python rora.py --ckpt llama-7b --rank 128 --scale sqrt   # the paper's setting, one GPU

Read from top to bottom; the paper, in the order of this file:

    paper                                                code
    --------------------------------------------------   -----------------------------------------------
    H(x) = (m0 + γ B A) x,  m0 frozen          (Eq. 1)   LoRALinear.forward, attach
    B = 0 at the start                         (Eq. 3)   LoRALinear.__init__
    LoRA:  γ = α / r                           (Eq. 14)  SCALES["linear"]
    RoRA:  γ = α / √r                          (Eq. 15)  SCALES["sqrt"]              <- the whole method
    DoRA:  m · (m0 + γ B A) / ‖m0 + γ B A‖     ([27])    DoRALinear
    why √r                                     (Eq. 2-15) "Why √r" above RoRALinear; tests/test_scaling.py measures it
    the training recipe                        (Sec. IV) learning_rate, train_step, train

Letters as in llama.py, and I, O: a linear layer's input and output width; r: the rank; s: the scale, γ in the paper.
(The paper's matrix B is always written lora_B here; a lone B is the number of rows in a batch.)
"""

import argparse
import json
import math
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

import memory
import ranks
import runs
from baselines import ParallelAdapter, PrefixAttention, SeriesAdapter
from checkpoints import AdapterSettings, CheckpointError, TensorFiles, adapter_file, read_adapter, some, write_adapter
from data import (IGNORE, Batch, DataError, Record, collate, encode_records, epoch_order, load_examples, load_tokenizer,
                  split_validation)
from flags import (CHECKPOINTS, DTYPES, HERE, MAY_CHANGE, FlagError, NonFiniteError, NothingLearned, OutOfMemory, Settings, exit_code,
                   find_checkpoint, find_device, naming_memory, resolve, training_parser)
from llama import Llama, LlamaConfig, load_llama, open_llama, save_llama

# --- the method ------------------------------------------------------------------------------------

SCALES: dict[str, Callable[[float, int], float]] = {
    "linear": lambda alpha, r: alpha / r,
    "sqrt": lambda alpha, r: alpha / math.sqrt(r),
}


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained update of rank r:  y = W x + s · lora_B (lora_A x).   (Eq. 1)"""

    wraps = nn.Linear
    targets = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    elsewhere = True  # --targets may name other linear layers
    scale = "linear"

    def __init__(self, base: nn.Linear, size: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.size, self.alpha, self.dropout = base, size, alpha, nn.Dropout(dropout)
        # A random, B zero: the update starts at 0, so training starts from the base model exactly, and B's gradient
        # is not 0, so it can leave. With both zero nothing would ever move. fp32, whatever the base: an update of
        # lr · 1 is smaller than bf16 can add to a weight of size 1.
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(size, base.in_features, device=device, dtype=torch.float32))   # (r, I)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, size, device=device, dtype=torch.float32))  # (O, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(±1/√I): variance 1 / (3 I)
        self.held: tuple[Tensor, Tensor] | None = None

    @property
    def scaling(self) -> float:
        """s, γ in the paper."""
        return SCALES[self.scale](self.alpha, self.size)

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        """Down to r numbers, up to O, and added to W x in one go. Backward keeps lora_A x and x, no (O, I) matrix."""
        lora_A, lora_B = self.held or self.cast()
        y = self.base(x)
        low = F.linear(self.dropout(x), lora_A)  # (..., r)
        return torch.addmm(y.view(-1, y.size(-1)), low.view(-1, low.size(-1)), lora_B.t(), alpha=self.scaling).view_as(y)

    def cast(self) -> tuple[Tensor, Tensor]:
        """A and B as the matrix product takes them, in the base's dtype. Gradients flow back to the fp32 originals."""
        dtype = self.base.weight.dtype
        return self.lora_A.to(dtype), self.lora_B.to(dtype)

    def hold(self) -> None:
        """Cast once for a whole optimizer step instead of at every use: see `held_adapters`."""
        self.held = self.cast()

    def release(self) -> None:
        self.held = None

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one (O, I) matrix, fp32, that does the same as this layer: W + s · lora_B lora_A."""
        return self.base.weight.float() + self.scaling * self.lora_B @ self.lora_A


# Why √r. At the start lora_B = 0, so the first gradient is  ∂L/∂lora_B = s · G lora_Aᵀ  with G = ∂L/∂W. One step of plain
# gradient descent then lowers the loss by  η ‖∂L/∂lora_B‖² = η s² ‖G lora_Aᵀ‖².  Each of the r rows of lora_A adds a term
# of the same expected size, so ‖G lora_Aᵀ‖² grows like r: with s = α/r the progress falls like 1/r, with s = α/√r it is
# the same at every rank. That is the paper's argument, and it is about gradient descent. The recipe below trains with
# AdamW, whose first step moves every entry of lora_B by lr whatever its gradient: the progress is then s · lr times a sum
# over r rows, so α/r is the rank-free scale and α/√r grows like √r. tests/test_scaling.py measures all four.


class RoRALinear(LoRALinear):
    """LoRA with s = α/√r.   (Eq. 15; the formula is also rsLoRA's, arXiv 2312.03732, PEFT's `use_rslora`)"""

    scale = "sqrt"


class DoRALinear(LoRALinear):
    """Direction from LoRA, length learned apart:  W' = m · V / ‖V‖,  V = W + s · lora_B lora_A, per output row.

    The norm is a constant to the gradient (DoRA, arXiv 2402.09353, Sec. 4.3). Dropout acts on the adapter branch alone,
    y = g · (W x + s · B A drop(x)) with g = m / ‖V‖; the original and PEFT write W x + (g - 1) · W drop(x) + g · s · B A
    drop(x), which is the same at dropout 0 and costs a second product with W otherwise.
    """

    def __init__(self, base: nn.Linear, size: int, alpha: float, dropout: float = 0.0):
        super().__init__(base, size, alpha, dropout)
        self.held_norm: Tensor | None = None
        self.base_norm2: Tensor | None = None
        self.magnitude = nn.Parameter(self.norm())  # (O,): m = ‖W‖, so that W' = W at the start

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        norm = self.norm() if self.held_norm is None else self.held_norm
        return (self.magnitude / norm).to(x.dtype) * super().forward(x)

    @torch.no_grad()
    def norm(self) -> Tensor:  # (O,), fp32
        """‖V‖ as the formula says. A row of zeros gets a tiny norm, so that g = m / ‖V‖ is 0 and not NaN."""
        return super().merged_weight().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def factored_norm2(self) -> tuple[Tensor, Tensor]:
        """(‖V‖² per row, whether a row cancels too much to be trusted), without forming V:

        ‖W + s B A‖² = ‖W‖² + 2 s Σ (W Aᵀ) ∘ B + s² Σ (B A Aᵀ) ∘ B, with ‖W‖² computed once per run: r/O of the work.
        """
        W, A, B, s = self.base.weight, self.lora_A, self.lora_B, self.scaling
        if self.base_norm2 is None:
            self.base_norm2 = W.float().square().sum(1)
        cross = (W @ A.to(W.dtype).t()).float().mul_(B).sum(1)           # (O,)
        square = (B @ (A @ A.t())).mul_(B).sum(1)                        # (O,)
        norm2 = self.base_norm2 + 2 * s * cross + s * s * square
        # The error is of the size of the largest term times the precision of W Aᵀ. Where the terms cancel, it shows.
        trusted = 1e-6 if W.dtype == torch.float32 else 0.25
        return norm2, norm2 < trusted * torch.maximum(self.base_norm2, s * s * square)

    def release(self) -> None:
        super().release()
        self.held_norm = self.base_norm2 = None

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        V = super().merged_weight()
        return (self.magnitude / self.norm())[:, None] * V


@contextmanager
def held_adapters(model: nn.Module) -> Iterator[Callable[[], None]]:
    """For the training loop: yields refresh(), to be called whenever the adapters have changed.

    Between two calls A and B are cast once and DoRA's norms computed once (factored), for all micro-batches and for
    recomputed blocks. Outside this context nothing is held and every forward computes what it needs.
    """
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    doras = [m for m in layers if isinstance(m, DoRALinear)]

    def refresh() -> None:
        for layer in layers:
            layer.hold()
        norms = [layer.factored_norm2() for layer in doras]
        if not norms:
            return
        cancelled = torch.stack([bad.any() for _, bad in norms]).tolist()  # one wait for the device, not one a layer
        for layer, (norm2, _), bad in zip(doras, norms, cancelled):
            layer.held_norm = layer.norm() if bad else norm2.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    try:
        yield refresh
    finally:
        for layer in layers:
            layer.release()


@dataclass(frozen=True)
class Method:
    layer: type[nn.Module]  # built as layer(base, size, alpha, dropout); has .wraps and .targets
    size: int = 32          # rank, bottleneck width, or number of prefix tokens
    dropout: float = 0.05
    lr: float | None = None  # None: the checkpoint's


# To add a method, add a line: it is then trained, saved, loaded, scored and contract-tested.
METHODS = {
    "lora": Method(LoRALinear),
    "rora": Method(RoRALinear),
    "dora": Method(DoRALinear),
    "series": Method(SeriesAdapter, size=256, dropout=0.0, lr=3e-4),
    "parallel": Method(ParallelAdapter, size=256, dropout=0.0, lr=3e-4),
    "prefix": Method(PrefixAttention, size=30, dropout=0.0, lr=3e-2),
}


def attach(model: Llama, method: str, rank: int, alpha: float | None = 64, dropout: float = 0.0,
           targets: list[str] | tuple[str, ...] | None = None, scale: str | None = None) -> None:
    """Freeze the model, then wrap its target layers: all that is trainable afterwards is new.

    rank: of lora, rora, dora; bottleneck width of series, parallel; number of tokens of prefix. alpha is ignored where
    it means nothing. scale, "linear" or "sqrt": for dora alone, whose two scales share a name. Works on meta models.
    Raises ValueError for an unknown method, a target that matches nothing, or a model that has adapters already.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    layer = METHODS[method].layer
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if scale is not None and scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; choose from {', '.join(SCALES)}")
    if scale is not None and method != "dora" and scale != layer.scale:
        raise ValueError(f"method {method} does not take scale {scale}" + (
            ": lora is linear and rora is sqrt, by name" if method in ("lora", "rora") else ""))
    if any(type(m) in {row.layer for row in METHODS.values()} for m in model.modules()):
        raise ValueError("this model has adapters already: merge(model) them, or load the base anew")
    if layer.scale and not (alpha and alpha > 0):
        raise ValueError(f"alpha must be positive, got {alpha}")
    targets = (targets,) if isinstance(targets, str) else tuple(targets or layer.targets)
    if not layer.elsewhere and set(targets) != set(layer.targets):
        raise ValueError(f"{method} sits on {', '.join(layer.targets)} alone, not on {some(targets)}")
    places = [(parent, name, child) for block in model.layers for parent in block.modules()
              for name, child in parent.named_children() if name in targets and isinstance(child, layer.wraps)]
    if missing := set(targets) - {name for _, name, _ in places}:
        known = {name for block in model.layers for parent in block.modules() for name, m in parent.named_children()
                 if isinstance(m, layer.wraps)}
        raise ValueError(f"no layer to put {method} on is called {some(missing)}; choose from {', '.join(sorted(known))}")
    model.requires_grad_(False)
    for parent, name, child in places:
        wrapper = layer(child, rank, alpha, dropout).train(child.training)
        if scale is not None:
            wrapper.scale = scale
        setattr(parent, name, wrapper)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name: layers.0.self_attn.q_proj.lora_A, ..."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapters, by the name of the layer each sits on."""
    kinds = tuple({row.layer for row in METHODS.values()})
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def adapter_settings(model: nn.Module) -> AdapterSettings:
    """What is attached, read off the modules. Raises ValueError where nothing is."""
    layers = wrappers(model)
    if not layers:
        raise ValueError("the model has no adapter: attach(model, method, rank) first")
    first = next(iter(layers.values()))
    method = next(name for name, row in METHODS.items() if row.layer is type(first))
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    return AdapterSettings(method, first.size, targets, first.alpha, first.scale, first.dropout.p, getattr(model, "source", None),
                           first.scaling if first.scale else None)


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the adapters add, by name, whether it trains or not: what is saved."""
    return {f"{layer}.{name}": p for layer, module in wrappers(model).items() for name, p in module.named_parameters(recurse=False)}


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """adapter_config.json and adapter_model.safetensors in PEFT's format, each replaced at once.

    Raises ValueError for a model without adapters and for NaN or infinity in them: neither is worth a file.
    """
    settings, tensors = adapter_settings(model), adapter_tensors(model)
    check_finite(tensors)
    with runs.replaced_files(Path(folder)) as temporary:
        write_adapter(temporary, settings, tensors)


def check_finite(tensors: dict[str, Tensor]) -> None:
    for name, p in tensors.items():
        if not torch.isfinite(p).all():
            raise NonFiniteError(f"{name} holds NaN or infinity; nothing was saved")


def load_adapter(model: Llama, folder: str | Path) -> AdapterSettings:
    """Attach and fill an adapter saved by us, PEFT, NVlabs/DoRA or LLM-Adapters, on a fresh base.

    The adapters stay trainable; train or eval mode stays as it was. Raises CheckpointError where file, config and model
    do not fit, naming the tensor or key.
    """
    settings, tensors = read_adapter(folder)
    path = adapter_file(Path(folder))
    how = (settings.method, settings.size, settings.alpha, settings.dropout, settings.targets, settings.scale)
    with torch.device("meta"):
        trial = Llama(model.cfg)  # so that a misfit leaves the model as it was
    try:
        attach(trial, *how)
    except ValueError as e:
        raise CheckpointError(f"{folder}: {e}") from None
    params = adapter_tensors(trial)
    if missing := params.keys() - tensors.keys():
        raise CheckpointError(f"{path}: missing {some(missing)}")
    if extra := tensors.keys() - params.keys():
        raise CheckpointError(f"{path}: no place in this model for {some(extra)}")
    for name, p in params.items():
        if p.shape != tensors[name].shape:
            raise CheckpointError(f"{path}: {name} is {tuple(tensors[name].shape)}, this base needs {tuple(p.shape)}: another base?")
    attach(model, *how)
    with torch.no_grad():
        for name, p in adapter_tensors(model).items():
            p.copy_(tensors[name])
    return settings


def merge(model: Llama) -> None:
    """Fold every adapter into its layer, in memory: Δ added in fp32, rounded once to the base's dtype.

    Raises ValueError for methods that are no change of a weight matrix: series, parallel and prefix.
    """
    layers = wrappers(model)
    settings = adapter_settings(model)
    if not all(hasattr(layer, "merged_weight") for layer in layers.values()):
        raise ValueError(f"{settings.method} cannot be merged: what it adds is not a change of a weight matrix")
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        layer.base.weight = nn.Parameter(layer.merged_weight().to(layer.base.weight.dtype), requires_grad=False)
        setattr(model.get_submodule(parent), child, layer.base)


# --- the loop --------------------------------------------------------------------------------------



def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear up for `warmup` steps, linear down to 0; `step` counts from 0, so the first update has lr 0 (PROTOCOL of
    the LLM-Adapters scripts: transformers' get_linear_schedule_with_warmup)."""
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / max(1, steps - warmup)


def loss_sum(model: Llama, batch: Batch, checkpoint_blocks: int = 0) -> Tensor:
    """Cross-entropy summed over the batch's targets, fp32. Logits are made only where there is a target."""
    device = model.lm_head.weight.device
    hidden = model.hidden(batch.ids.to(device), model.rows(batch.lengths), checkpoint_blocks=checkpoint_blocks)
    learned = (batch.targets != IGNORE).nonzero().squeeze(1)
    hidden, targets = hidden[learned.to(device)], batch.targets[learned].to(device)  # (n, C), (n,)

    if model.lm_head.weight.requires_grad:  # the plain thing, which HeadLoss equals where the head is frozen
        return F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")
    return HeadLoss.apply(hidden, targets, model.lm_head, max(1, logit_bytes(device) // (4 * model.cfg.vocab_size)))


def logit_bytes(device: torch.device) -> int:
    """fp32 logits held at once: on a GPU 2,048 tokens of a vocabulary of 32,000, on a CPU as many as its cache holds."""
    return 1 << 28 if device.type == "cuda" else 1 << 25


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a frozen head, in slices. The head needs no gradient, so all that backward asks for is that
    of `hidden`: it is made beside the loss, and each slice's logits are dropped at once instead of kept or made twice."""

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: nn.Linear, size: int) -> Tensor:  # (n, C), (n,) -> ()
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


def train_step(model: Llama, records: list[Record], optimizer: torch.optim.Optimizer, lr: float, micro_batch_size: int,
               checkpoint_blocks: int = 0, clip: float = 1.0) -> tuple[float, float]:
    """One update on one batch; returns (mean loss per target, gradient norm before clipping).

    The loss is the mean over all targets of the batch. Each micro-batch adds its sum, divided by the whole batch's
    count, so how the batch is cut does not matter. Raises NonFiniteError before anything bad reaches a weight.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    count = sum(len(r.ids) - r.split for r in records)
    total = torch.zeros((), device=params[0].device)
    mine = ranks.share(records)
    for i in range(0, len(mine), micro_batch_size):
        loss = loss_sum(model, collate(mine[i : i + micro_batch_size]), checkpoint_blocks) / count
        loss.backward()
        total += loss.detach()
    ranks.add_gradients(params)
    ranks.add(total)
    norm = nn.utils.clip_grad_norm_(params, clip)
    loss, norm = torch.stack([total, norm]).tolist()  # the step's one wait for the device
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        raise NonFiniteError(f"loss {loss}, gradient norm {norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    optimizer.step()
    return loss, norm


@torch.no_grad()
def validation_loss(model: Llama, records: list[Record], micro_batch_size: int) -> float:
    """Mean loss per target, without dropout and without drawing a random number."""
    model.eval()
    mine = ranks.share(records)
    total = sum(loss_sum(model, collate(mine[i : i + micro_batch_size])).item() for i in range(0, len(mine), micro_batch_size))
    model.train()
    return ranks.total(total, model.lm_head.weight.device) / sum(len(r.ids) - r.split for r in records)


def new_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model).values(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)


def train(model: Llama, records: list[Record], held_out: list[Record], s: Settings, run: Path, record: dict,
          resume: Path | None = None) -> dict:
    """The whole run, into the folder `run`; from the checkpoint `resume` where one is given. Returns the final state.
    `record` is what run.json holds: the best adapter's step is kept there.

    Raises NonFiniteError, or runs.Stopped once the state is saved after SIGINT or SIGTERM.
    """
    params, optimizer, device = trainable(model), new_optimizer(model, s.lr), model.lm_head.weight.device
    per_epoch = math.ceil(len(records) / s.batch_size)
    steps = total_steps(records, s)
    state = {"step": 0, "steps": steps, "best_step": None, "best_loss": None, "seconds": 0.0}
    if resume:
        state = load_state(resume, model, params, optimizer)
    metrics = runs.Metrics(run / "metrics.jsonl", state["step"]) if ranks.first() else None
    start = time.perf_counter() - state["seconds"]
    model.train()
    bar = tqdm(total=steps, initial=state["step"], desc="train", unit="step", disable=None if ranks.first() else True)

    def log(**row) -> None:
        if metrics:
            metrics.write(**row)

    def keep_best() -> None:
        state["best_step"] = state["step"]
        if ranks.first():
            save_adapter(model, run)
            runs.write_json(run / "run.json", record | {"best_step": state["best_step"], "best_loss": state["best_loss"]})

    def save() -> None:
        generators = ranks.gathered({"cpu": torch.get_rng_state()} | (
            {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}))
        if not metrics:
            return
        metrics.sync()
        state["seconds"] = round(time.perf_counter() - start, 3)
        with runs.new_checkpoint(run, state["step"]) as folder:
            save_state(folder, model, params, optimizer, state, generators)
        bar.write(f"saved {run}/checkpoints/step-{state['step']:06}")

    with runs.stop_signals() as stop, held_adapters(model) as refresh:
        for step in range(state["step"], steps):
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == state["step"]:
                order = epoch_order(len(records), s.seed, epoch)
            batch = [records[j] for j in order[i * s.batch_size : (i + 1) * s.batch_size]]
            lr = learning_rate(step, steps, s.lr, s.warmup)
            began = time.perf_counter()
            refresh()
            try:
                with naming_memory(f"in step {step + 1}"):
                    loss, norm = train_step(model, batch, optimizer, lr, s.micro_batch_size, s.checkpoint_blocks)
            except NonFiniteError as e:
                raise NonFiniteError(f"step {step + 1}: {e}, in records {', '.join(str(r.number) for r in batch)} of {s.data}; "
                                     f"the weights are untouched. A smaller --lr or --alpha, or --dtype fp32, may help") from None
            if step == 0 and (idle := [n for n, p in params.items() if n.endswith("lora_B") and (p.grad is None or not p.grad.any())]):
                raise NothingLearned(f"no gradient reached {some(idle)}: the adapter there is not in the model's path; other --targets "
                                     "may be")
            optimizer.zero_grad()
            seconds = time.perf_counter() - began
            tokens = sum(len(r.ids) for r in batch)
            state["step"] = step + 1
            log(step=step + 1, epoch=round((step + 1) / per_epoch, 4), loss=loss, lr=lr, grad_norm=norm, tokens=tokens,
                tok_per_s=round(tokens / seconds, 1), mem_gb=round(peak_memory(device) / 1e9, 3),
                seconds=round(time.perf_counter() - start, 3))
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tok/s", refresh=False)
            last, stopping = step + 1 == steps, ranks.anyone(bool(stop), device)  # asked once: a signal that comes later is the next step's
            if last and steps > 1 and all_zero(params):
                raise NothingLearned(f"the adapter is still zero after {steps} steps; a larger --lr may help")
            if bar.disable and (last or step % max(1, steps // 10) == 0):  # a log or a pipe: a few lines, no bar
                print(f"step {step + 1}/{steps}  loss {loss:.3f}  lr {lr:.2e}  {tokens / seconds:,.0f} tok/s", flush=True)
            if held_out and ((step + 1) % s.eval_every == 0 or last):
                refresh()
                with naming_memory(f"in the validation after step {step + 1}"):
                    value = validation_loss(model, held_out, s.micro_batch_size)
                if not math.isfinite(value):
                    raise NonFiniteError(f"step {step + 1}: validation loss {value}; this step was not saved. A smaller --lr or --alpha, "
                                         "or --dtype fp32, may help")
                log(step=step + 1, val_loss=value)
                if (state["best_loss"] is None or value < state["best_loss"]) and not (steps > 1 and all_zero(params)):
                    state["best_loss"] = value
                    keep_best()
            if last and not held_out:
                keep_best()
            if last or stopping or (step + 1) % s.save_every == 0:
                save()
            if stopping and not last:
                bar.close()
                raise runs.Stopped(stop[0] if stop else 143)
    bar.close()
    if metrics:
        metrics.close()
    return state


def all_zero(params: dict[str, nn.Parameter]) -> bool:
    """Whether the adapter still does nothing: every lora_B is zero, as after step 1, whose lr is 0."""
    lora_B = [p for name, p in params.items() if name.endswith("lora_B")]
    return bool(lora_B) and not any(p.any() for p in lora_B)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's tensors, or of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def save_state(folder: Path, model: nn.Module, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict,
               generators: list[dict[str, Tensor]]) -> None:
    """All that the rest of the run depends on: adapter, AdamW's moments, every process's random numbers, position."""
    check_finite(adapter_tensors(model))
    write_adapter(folder, adapter_settings(model), adapter_tensors(model))
    tensors = {f"{kind}_rng.{i}": state for i, states in enumerate(generators) for kind, state in states.items()}
    for name, p in params.items():
        tensors |= {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in optimizer.state[p].items()}
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state) + "\n")


def load_state(folder: Path, model: nn.Module, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict:
    """Fill parameters, optimizer and generators; return the position."""
    settings, tensors = read_adapter(folder)
    if replace(settings, base=None) != replace(adapter_settings(model), base=None, scaling=None):
        raise CheckpointError(f"{folder}: holds {settings}, but run.json describes {adapter_settings(model)}")
    saved = load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, p in adapter_tensors(model).items():
            p.copy_(tensors[name])
        for name, p in params.items():
            optimizer.state[p] = {key: saved[f"{name}.{key}"].to(p.device) for key in ("step", "exp_avg", "exp_avg_sq")}
    torch.set_rng_state(saved[f"cpu_rng.{ranks.rank()}"])
    if p.is_cuda and f"cuda_rng.{ranks.rank()}" in saved:
        torch.cuda.set_rng_state(saved[f"cuda_rng.{ranks.rank()}"], p.device)
    return json.loads((folder / "state.json").read_text())


# --- what to run -----------------------------------------------------------------------------------


def load_base(ckpt: str, device: torch.device, dtype: torch.dtype | None) -> Llama:
    folder = find_checkpoint(ckpt)
    model = load_llama(folder, device, dtype)
    model.source = ckpt if ckpt in CHECKPOINTS else str(folder)  # named in saved adapters
    return model


def find_tokenizer(ckpt: str):
    """The checkpoint's tokenizer, checked against its vocabulary."""
    folder = find_checkpoint(ckpt)
    cfg, tokenizer = LlamaConfig.from_json(folder / "config.json"), load_tokenizer(folder)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise DataError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary only {cfg.vocab_size}: "
                        "this is another model's tokenizer")
    if cfg.vocab_size > 1.1 * tokenizer.vocab_size + 64:
        raise DataError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary {cfg.vocab_size}, more than "
                        "padding explains: this is another model's tokenizer")
    if tokenizer.vocab_size < cfg.vocab_size:
        print(f"note: the model's vocabulary of {cfg.vocab_size} is padded beyond the tokenizer's {tokenizer.vocab_size}")
    if (cfg.bos, cfg.eos) != (tokenizer.bos, tokenizer.eos):
        print(f"note: config.json says bos/eos {cfg.bos}/{cfg.eos}; using the tokenizer's {tokenizer.bos}/{tokenizer.eos}")
    return tokenizer


def start_line(model: Llama, method: str) -> str:
    """rora: s = 64/√128 = 5.657 · 224,395,264 of 6,962,810,880 trainable (3.22%) · PEFT: use_rslora=true"""
    a, added = adapter_settings(model), sum(p.numel() for p in trainable(model).values())
    total = sum(p.numel() for p in model.parameters())
    size = {"series": f"bottleneck {a.size}", "parallel": f"bottleneck {a.size}", "prefix": f"{a.size} tokens a layer"}.get(a.method)
    if size is None:
        root = "√" if a.scale == "sqrt" else ""
        size = f"s = {a.alpha:g}/{root}{a.size} = {a.scaling:.4g}" if a.scale in ("linear", "sqrt") else f"s = {a.scaling:.4g} ({a.scale})"
    peft = {"series": "LLM-Adapters: BOTTLENECK", "parallel": "LLM-Adapters: BOTTLENECK", "prefix": "PEFT: PREFIX_TUNING"}.get(a.method)
    if peft is None:
        peft = ("PEFT: use_dora=true, " if a.method == "dora" else "PEFT: ") + f"use_rslora={str(a.scale == 'sqrt').lower()}"
    return f"{method}: {size} · {added:,} of {total:,} trainable ({100 * added / total:.2f}%) · {peft}"


# --- command line ----------------------------------------------------------------------------------


def prepare(s: Settings, device: torch.device) -> tuple[Llama, list[Record], list[Record]]:
    """(model with adapters, training records, held-out records). What can be wrong shows before the weights are read."""
    tokenizer = find_tokenizer(s.ckpt)
    trial = open_llama(find_checkpoint(s.ckpt))[0]
    try:
        attach(trial, s.method, s.rank, s.alpha, s.dropout, s.targets, s.scale)
    except ValueError as e:
        raise FlagError(str(e)) from None
    if isinstance(s.checkpoint_blocks, int) and s.checkpoint_blocks > trial.cfg.n_layers:
        raise FlagError(f"--checkpoint-blocks {s.checkpoint_blocks}: the model has {trial.cfg.n_layers} blocks")
    examples = load_examples(s.data)
    split_validation(examples, s.val_size)  # refuses a --val-size that is too large
    show = lambda x: tqdm(x, desc="tokenize", unit="record", disable=None if len(examples) > 20_000 else True)
    records, cut, dropped = encode_records(examples, tokenizer, s.max_len, s.loss, s.prompt, show)
    if cut or dropped:
        print(f"note: {cut} records lost the start of their instruction to fit {s.max_len} tokens, {dropped} were dropped")
    records, held_out = split_validation(records, s.val_size)
    model = load_base(s.ckpt, device, DTYPES[s.dtype])
    torch.manual_seed(s.seed)
    attach(model, s.method, s.rank, s.alpha, s.dropout, s.targets, s.scale)
    if not ranks.first():
        torch.manual_seed(s.seed + ranks.rank())  # the same adapters at the start, other dropout
    return model, records, held_out


def label(s: Settings) -> str:
    """The method's name in folders and tables: dora-sqrt is DoRA with RoRA's scale."""
    return s.method if s.scale in (None, METHODS[s.method].layer.scale) else f"{s.method}-{s.scale}"


def facts(s: Settings, model: Llama) -> dict:
    """What run.json says beside the settings: enough to know later what made the numbers."""
    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True) if shutil.which("git") else None
    a = adapter_settings(model)
    return {"effective_scale": a.scaling, "device": str(model.lm_head.weight.device),
            "trainable": sum(p.numel() for p in trainable(model).values()), "processes": ranks.world(),
            "base_sha256": TensorFiles(find_checkpoint(s.ckpt)).fingerprint(), "data_sha256": runs.sha256(Path(s.data)),
            "python": platform.python_version(),
            "packages": {p: version(p) for p in ("torch", "safetensors", "sentencepiece", "tqdm")},
            "commit": commit.stdout.strip() or None if commit else None}


def start(args: argparse.Namespace) -> int:
    """Train from the beginning."""
    s, device = resolve(args, METHODS)
    run = Path(args.out or f"runs/{Path(s.ckpt).name}-{label(s)}-r{s.rank}-s{s.seed}")
    runs.check_writable(run)
    refuse_existing(run, args.overwrite)
    model, records, held_out = prepare(s, device)
    ranks.wait()  # all have looked at the folder before the first fills it
    record = {"settings": asdict(s), **facts(s, model), "best_step": None, "finished": False}
    with runs.lock(run) if ranks.first() else nullcontext():
        if ranks.first():
            refuse_existing(run, args.overwrite)  # once more: another run may have come and gone since
            runs.sweep(run)
            if (run / "checkpoints").exists():  # first of all: they must not be taken for the new run's
                runs.discard(run / "checkpoints")
            runs.write_json(run / "run.json", record)
            for old in run.iterdir():
                if old.name not in (".lock", "run.json"):
                    runs.discard(old)
        return fit(model, records, held_out, s, run, record, compiled=args.compile)


def refuse_existing(run: Path, overwrite: bool | None) -> None:
    """Raise RunError if something is in the folder that --overwrite does not cover; what a crash before the start left does not count."""
    if not run.is_dir() or all(p.name == ".lock" or p.name.startswith(".tmp-") for p in run.iterdir()):
        return
    if not (run / "run.json").is_file():
        raise runs.RunError(f"{run} exists and is not a run; choose another --out")
    if not overwrite:
        raise runs.RunError(f"{run} exists: --resume {run} goes on with it, --overwrite starts anew, --out DIR goes elsewhere")


def resume(args: argparse.Namespace) -> int:
    """Go on with a run, exactly as if it had never stopped."""
    run = Path(args.resume)
    record = read_run(run)
    s = Settings(**{**record["settings"], "targets": tuple(record["settings"]["targets"])})
    changes = {f.name: tuple(v) if f.name == "targets" else v for f in fields(Settings)
               if (v := getattr(args, f.name, None)) is not None and (tuple(v) if f.name == "targets" else v) != getattr(s, f.name)}
    if refused := {k: v for k, v in changes.items() if k not in MAY_CHANGE}:
        raise FlagError(f"{run} was made with other settings: " + ", ".join(
            f"--{k.replace('_', '-')} {getattr(s, k)} (now {v})" for k, v in refused.items()) + "; resume without them, or start a new run")
    s = Settings(**{**asdict(s), **changes, "targets": s.targets})
    runs.check_writable(run)
    if record.get("processes", 1) != ranks.world():
        raise FlagError(f"{run} was trained by {record.get('processes', 1)} processes, this is {ranks.world()}: their shares would differ; "
                        f"torchrun --nproc_per_node={record.get('processes', 1)} rora.py --resume {run}")
    with runs.lock(run) if ranks.first() else nullcontext():
        for folder in (run, run / "checkpoints") if ranks.first() else ():
            runs.sweep(folder)
        newest, complaints = runs.newest_intact(run)
        if record["finished"]:
            print(f"{run} is finished; to score it: python eval.py {run}")
            return 0
        if newest is None and complaints:
            raise CheckpointError(f"no checkpoint of {run} is intact ({complaints[0]}); start it again with --overwrite")
        if newest is None:
            raise runs.RunError(f"{run} has no checkpoint yet to resume from; start it again with --overwrite")
        for complaint in complaints:
            print(f"note: {complaint}; using the older {newest}", file=sys.stderr)
        model, records, held_out = prepare(s, find_device(args.device))
        now = facts(s, model)
        for key, what in [("data_sha256", s.data), ("base_sha256", s.ckpt)]:
            if now[key] != record[key]:
                raise DataError(f"{what} is not what {run} was started with; put the original back, or start a new run")
        print(f"resuming {newest}")
        ranks.wait()
        for damaged in runs.checkpoints(run)[: len(complaints)] if ranks.first() else ():  # their places are needed: these steps come again
            runs.discard(damaged)
        return fit(model, records, held_out, s, run, record, newest, args.compile)


def read_run(run: Path) -> dict:
    """run.json, its settings checked as flags are. Raises RunError."""
    try:
        record = json.loads((run / "run.json").read_text())
        record["finished"], record["base_sha256"], record["data_sha256"]
        settings, parser = Settings(**record["settings"]), training_parser(METHODS, SCALES)
        for f in fields(Settings):
            value = getattr(settings, f.name)
            words = [f"--{f.name.replace('_', '-')}", *map(str, value if f.name == "targets" else [value])]
            if not isinstance(None, f.type) if value is None else getattr(parser.parse_args(words), f.name) != value:
                raise ValueError(f"{f.name} is {value!r}")
        return record
    except FileNotFoundError:
        raise runs.RunError(f"{run} is not a run folder: it has no run.json") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise runs.RunError(f"{run}/run.json is damaged or from another version ({e}); start the run again with --overwrite") from None


def plan_memory(model: Llama, records: list[Record], s: Settings) -> tuple[memory.MemoryPlan, list[Record], int]:
    """(what the largest micro-batch of the run takes, that micro-batch, how many blocks to recompute)."""
    epochs = math.ceil(total_steps(records, s) / math.ceil(len(records) / s.batch_size))
    largest = memory.largest_micro_batch(records, s.batch_size, s.micro_batch_size, s.seed, epochs)
    device = model.lm_head.weight.device
    model.train()  # dropout keeps its masks
    with held_adapters(model) as refresh, torch.random.fork_rng():  # the run's own random numbers stay undrawn
        refresh()
        plan = memory.plan(model, collate(largest), logit_bytes(device))
    share = 0.6 if device.type == "cpu" else 0.92  # a CPU's allocator leaves gaps between tensors: a third of a process, measured
    room = int(share * (memory.available(device) + plan.weights))
    names = {"none": 0, "all": plan.blocks, "auto": plan.fewest_recomputed(room)}
    return plan, largest, names.get(s.checkpoint_blocks, s.checkpoint_blocks)


def total_steps(records: list[Record], s: Settings) -> int:
    """The last batch of an epoch may be a partial one; it counts as a step."""
    return s.max_steps or s.epochs * math.ceil(len(records) / s.batch_size)


def fit(model: Llama, records: list[Record], held_out: list[Record], s: Settings, run: Path, record: dict,
        newest: Path | None = None, compiled: bool | None = None) -> int:
    """Say what will be done, do it, say what came of it."""
    steps = total_steps(records, s)
    print(start_line(model, label(s)))
    print(f"{s.ckpt} · {len(records):,} records, {len(held_out)} held out · {steps:,} steps of {s.batch_size} · lr {s.lr:g}, "
          f"warm-up {s.warmup} · loss on {'all tokens' if s.loss == 'all' else 'the answer'} · {s.prompt} prompt · "
          f"{s.dtype} on {model.lm_head.weight.device}", flush=True)
    if s.warmup >= steps:
        print(f"note: the warm-up of {s.warmup} steps is not over after {steps}: lr never reaches {s.lr:g}; see --warmup")
    plan, _, recomputed = plan_memory(model, records, s)
    if compiled:
        for layer in model.layers:
            layer.compile(dynamic=True)  # one compilation for all lengths
    if recomputed or model.lm_head.weight.is_cuda:
        print(memory_line(plan, recomputed, model), flush=True)
    try:
        state = train(model, records, held_out, replace(s, checkpoint_blocks=recomputed), run, record, newest)
    except runs.Stopped as e:
        program = "python" if ranks.world() == 1 else f"torchrun --nproc_per_node={ranks.world()}"
        print(f"stopped; to go on: {program} rora.py --resume {shlex.quote(str(run))}")
        return e.code
    except OutOfMemory as e:
        raise OutOfMemory(f"{e}; {memory_line(plan, recomputed, model)}") from None
    record |= {"best_step": state["best_step"], "best_loss": state["best_loss"], "finished": True, "seconds": state["seconds"]}
    if ranks.first():
        runs.write_json(run / "run.json", record)
    best = f"best validation loss {state['best_loss']:.4f} at step {state['best_step']}" if held_out else f"after step {state['step']}"
    print(f"saved {run}: the adapter with the {best}, {state['seconds']:.0f} s\nto score it: python eval.py "
          f"{shlex.quote(str(run))}")
    return 0


def memory_line(plan: memory.MemoryPlan, recomputed: int, model: nn.Module) -> str:
    free = memory.available(model.lm_head.weight.device) + plan.weights
    return (f"memory: about {plan.total(recomputed) / 1e9:.1f} GB ({plan.parts(recomputed)}) of {free / 1e9:.1f} GB; "
            f"{recomputed or 'no'} block{'s' * (recomputed != 1)} of {plan.blocks} recomputed")


def check(args: argparse.Namespace) -> int:
    """What a run would be, before hours are spent on it: the plan, then the longest micro-batch and three steps for real."""
    s, device = resolve(args, METHODS)
    idle = peak_memory(device)  # on a CPU: what Python and torch take by themselves
    model, records, held_out = prepare(s, device)
    steps, tokens = total_steps(records, s), sum(len(r.ids) for r in records)
    plan, largest, recomputed = plan_memory(model, records, s)
    print(start_line(model, label(s)))
    print(f"{len(records):,} records, {len(held_out)} held out · {tokens:,} tokens an epoch, {max(len(r.ids) for r in records)} at most in "
          f"a record · {steps:,} steps of {s.batch_size} · lr {s.lr:g}, warm-up {s.warmup} · {s.dtype} on {device}")
    print(memory_line(plan, recomputed, model), flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizer, seconds, seen = new_optimizer(model, s.lr), 0.0, 0
    model.train()
    order = epoch_order(len(records), s.seed, 0)
    batches = [[records[j] for j in order[i : i + s.batch_size]] for i in range(0, min(len(order), 3 * s.batch_size), s.batch_size)]
    largest = [r for r in largest for _ in range(ranks.world())]  # train_step takes a share of it
    with held_adapters(model) as refresh:
        for i, batch in enumerate([batches[0], *batches, largest]):  # the first warms up; the largest comes when AdamW's moments are there
            began = time.perf_counter()
            refresh()
            train_step(model, batch, optimizer, s.lr, s.micro_batch_size, recomputed)
            optimizer.zero_grad()
            if 1 <= i <= len(batches):
                seconds, seen = seconds + time.perf_counter() - began, seen + sum(len(r.ids) for r in batch)
    taken = f"{(peak_memory(device) - idle) / 1e9:.1f} GB" + (
        "" if device.type == "cuda" else f" beside the {idle / 1e9:.1f} of Python and torch, the gaps between tensors included")
    hours = steps * s.batch_size / len(records) * tokens * seconds / seen / 3600
    print(f"measured: {seen / seconds:,.0f} tokens/s over {len(batches)} steps, {taken}; the run would take about "
          f"{f'{hours:.1f} hours' if hours >= 1 else f'{60 * hours:.1f} minutes'}, validation and saving not counted")
    return 0


def find_adapter(folder: str | Path, ckpt: str | None) -> tuple[Path, str]:
    """(adapter folder, base checkpoint) for a run folder, a step folder, or any PEFT folder with --ckpt."""
    folder = Path(folder)
    if not folder.is_dir():
        raise runs.RunError(f"no such folder: {folder}")
    if ckpt is None and (run := run_of(folder)):
        ckpt = read_run(run)["settings"]["ckpt"]
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: no adapter_config.json in it" + (
            ": nothing was validated yet; try its newest checkpoints/step-*" if (folder / "run.json").is_file() else ""))
    if ((folder / runs.MANIFEST).is_file() or run_of(folder) not in (None, folder)) and (problem := runs.damage(folder)):
        raise CheckpointError(f"{folder}: {problem}; use another checkpoint of that run")
    if ckpt is None:
        ckpt = read_adapter(folder)[0].base
        if ckpt is None or ckpt not in CHECKPOINTS and not Path(ckpt).is_dir():
            raise FlagError(f"{folder} does not say where its base is; add --ckpt")
    return folder, ckpt


def run_of(folder: Path) -> Path | None:
    """The run that an adapter folder belongs to."""
    return next((run for run in (folder, folder.resolve().parent.parent) if (run / "run.json").is_file()), None)


def check_fit(folder: Path, ckpt: str) -> None:
    """Raise CheckpointError unless adapter, run and base belong together: before the base's weights are read."""
    trial, files, _ = open_llama(find_checkpoint(ckpt))
    settings = load_adapter(trial, folder)
    if run := run_of(folder):
        record = read_run(run)
        if files.fingerprint() != record["base_sha256"]:
            raise CheckpointError(f"{ckpt} is not the base that {folder} was trained on, {record['settings']['ckpt']}; to try it all the "
                                  "same, copy the two adapter files elsewhere")
        for name, ours in [("method", settings.method), ("scale", settings.scale), ("rank", settings.size), ("alpha", settings.alpha)]:
            if ours != record["settings"][name]:
                raise CheckpointError(f"{folder}: the adapter's {name} is {ours}, but {run}/run.json says {record['settings'][name]}: "
                                      "another run's adapter?")


def merge_files(args: argparse.Namespace) -> int:
    """Base + adapter as one Hugging Face folder, in the base's dtype on disk; or the adapter with a plain scale."""
    if not args.out:
        raise FlagError("--merge needs --out DIR")
    out = Path(args.out)
    runs.check_writable(out)
    if out.exists():
        raise runs.RunError(f"{out} exists; --merge writes a new folder")
    folder, ckpt = find_adapter(args.merge, args.ckpt)
    if args.export_scale:
        settings, tensors = read_adapter(folder)
        if settings.scale is None:
            raise FlagError(f"{settings.method} has no scale to export")
        s = SCALES[settings.scale](settings.alpha, settings.size)
        with runs.new_folder(out) as temporary:
            write_adapter(temporary, replace(settings, scaling=s), tensors, plain_scale=True)
        print(f"saved {out}: the adapter with lora_alpha {s * settings.size:g} and use_rslora false")
        return 0
    settings = read_adapter(folder)[0]
    if not hasattr(METHODS[settings.method].layer, "merged_weight"):
        raise FlagError(f"{settings.method} cannot be merged: what it adds is not a change of a weight matrix")
    base = find_checkpoint(ckpt)
    check_fit(folder, ckpt)
    model = load_base(ckpt, torch.device("cpu"), None)
    load_adapter(model, folder)
    merge(model)
    with runs.new_folder(out) as temporary:
        save_llama(model, temporary)
        for name in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                     "special_tokens_map.json"):
            if (base / name).is_file():
                shutil.copyfile(base / name, temporary / name)
    print(f"saved {out}: {ckpt} with {folder} merged in, {model.embed_tokens.weight.dtype}")
    return 0


def trace(args: argparse.Namespace) -> int:
    """One fixed batch through model and adapters: what another implementation must reproduce. Names in the README."""
    s, device = resolve(args, METHODS)
    out = Path(args.trace)
    runs.check_writable(out.parent)
    if out.is_dir():
        raise runs.RunError(f"{out} is a folder; --trace needs the name of a file")
    find_tokenizer(s.ckpt)
    model = load_base(s.ckpt, device, DTYPES[s.dtype])
    torch.manual_seed(s.seed)
    try:
        attach(model, s.method, s.rank, s.alpha, 0.0, s.targets, s.scale)
    except ValueError as e:
        raise FlagError(str(e)) from None
    generator = torch.Generator().manual_seed(s.seed)
    params = trainable(model)
    with torch.no_grad():  # away from the start, where lora_B = 0 hides half of the gradients
        for p in params.values():
            p.add_((0.02 * torch.randn(p.shape, generator=generator)).to(p.device))
    tokens = torch.randint(0, model.cfg.vocab_size, (2, 17), generator=generator)
    ids, targets = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
    tensors = {"ids": ids, "targets": targets} | {f"adapter.{name}": p for name, p in params.items()}
    hooks = [layer.register_forward_hook(lambda _, __, y, i=i: tensors.update({f"layers.{i}": y.view(2, 16, -1)}))
             for i, layer in enumerate(model.layers)]
    logits = model(ids)  # (B, T, V)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    loss.backward()
    for hook in hooks:
        hook.remove()
    tensors |= {"logits": logits, "loss": loss} | {f"grad.{name}": p.grad for name, p in params.items()}
    with runs.replaced_files(out.parent) as temporary:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary / out.name,
                  {"settings": json.dumps(asdict(adapter_settings(model)))})
    print(f"{start_line(model, label(s))}\nsaved {out}: {len(tensors)} tensors, loss {loss.item():.6f}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see README. Never raises SystemExit."""
    def work() -> int:
        args = training_parser(METHODS, SCALES).parse_args(argv)
        given = {name for name, value in vars(args).items() if value is not None}
        training = {f.name for f in fields(Settings)} | {"device", "compile"}
        modes = {"resume": (resume, training), "merge": (merge_files, {"out", "export_scale", "ckpt"}),
                 "check": (check, training),
                 "trace": (trace, {"ckpt", "method", "scale", "rank", "alpha", "targets", "seed", "device", "dtype"})}
        chosen = [mode for mode in modes if mode in given]
        if len(chosen) > 1:
            raise FlagError(f"--{chosen[0]} and --{chosen[1]} are different jobs: give one of them")
        run, known = modes[chosen[0]] if chosen else (start, training | {"out", "overwrite"})
        if stray := given - known - set(chosen):
            raise FlagError(f"--{min(stray).replace('_', '-')} has no effect " + (f"with --{chosen[0]}" if chosen else "here"))
        return run(args)

    return exit_code(work, "rora")


if __name__ == "__main__":
    from rora import main  # the module, not the script: eval.py and pickled classes must meet the same LoRALinear

    sys.exit(main())
