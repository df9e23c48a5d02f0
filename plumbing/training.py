"""Going along with rora.train: log every step, validate, keep the best adapter, save, stop in time.

This file knows a run folder's files and what in a run they stand for. It knows no flags.
"""

import json
import math
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import rora
from data import Record
from llama import Llama
from plumbing import processes, refuse, run_folder
from plumbing.faster import as_it_stands
from plumbing.flags import NothingLearned, Settings, naming_memory
from plumbing.hf_files import CheckpointError, save_file, some
from plumbing.peft_files import read_adapter, write_adapter
from rora import METHODS, NonFiniteError, Recipe, adapter_settings, adapter_tensors, trainable


EVERY = 60  # seconds between two lines in a log, at most


def total_steps(records: list[Record], settings: Settings) -> int:
    """The last batch of an epoch may be a partial one; it counts as a step."""
    per_epoch = math.ceil(len(records) / settings.batch_size)
    return settings.max_steps or settings.epochs * per_epoch


def team():
    """The other processes, where there are any."""
    return processes if processes.world() > 1 else None


def follow(
    model: Llama,
    records: list[Record],
    held_out: list[Record],
    settings: Settings,
    recomputed: int,
    folder: Path,
    run_json: dict,
    resume: Path | None,
    backward: Callable = rora.backward,
) -> dict:
    """Train, and do after every step what is due. Returns the final state.

    Raises NonFiniteError, or run_folder.Stopped once the state is saved after a signal.
    """
    steps = total_steps(records, settings)
    with (
        run_folder.stop_signals(alone=processes.world() == 1) as stop,
        Run(model, held_out, settings, steps, folder, run_json, resume) as run,
    ):
        recipe = Recipe(
            steps=steps,
            batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch_size,
            lr=settings.lr,
            warmup=settings.warmup,
            seed=settings.seed,
            recomputed=recomputed,
        )
        done = run.state["step"]
        updates = rora.train(model, records, recipe, run.optimizer, done, team(), backward)
        while run.state["step"] < steps:
            step = next_step(updates, run.state["step"] + 1, settings)
            run.log(step)
            last = step.number == steps
            # asked once a step: a later signal is the next step's
            stopping = processes.anyone(bool(stop), run.device)
            run.refuse_idle(step.number, last)
            if held_out and (step.number % settings.eval_every == 0 or last):
                run.validate()
            if last and not held_out:
                run.keep_best()
            if last or stopping or step.number % settings.save_every == 0:
                run.save()
            if stopping and not last:
                raise run_folder.Stopped(stop[0] if stop else 143)
        return run.state


def may_help(settings: Settings) -> str:
    fp32 = "" if settings.dtype == "fp32" else ", or --dtype fp32,"
    return f"A smaller --lr or --alpha{fp32} may help"


def next_step(updates, number: int, settings: Settings) -> rora.Step:
    """The next of rora.train's updates; what goes wrong in it is told with its number."""
    try:
        with naming_memory(f"in step {number}"):
            return next(updates)
    except NonFiniteError as e:
        raise NonFiniteError(
            f"step {number}: {e} of {settings.data}; the weights are untouched. "
            + may_help(settings)
        ) from None


class Run:
    """A run folder while it is written: metrics, the best adapter, checkpoints. Process 0 alone
    writes."""

    def __init__(
        self,
        model: Llama,
        held_out: list[Record],
        settings: Settings,
        steps: int,
        folder: Path,
        run_json: dict,
        resume: Path | None,
    ):
        self.model, self.held_out, self.settings = model, held_out, settings
        self.steps, self.folder, self.run_json = steps, folder, run_json
        self.params, self.device = trainable(model), model.lm_head.weight.device
        self.optimizer = rora.new_optimizer(model, settings.lr)
        self.start = checksums(self.params)
        self.state: dict = {
            "step": 0,
            "steps": steps,
            "best_step": None,
            "best_loss": None,
            "seconds": 0.0,
        }
        if resume:
            self.state = load_state(resume, model, self.params, self.optimizer)
        self.metrics = None
        if processes.first():
            self.metrics = run_folder.Metrics(folder / "metrics.jsonl", self.state["step"])
        self.first, self.started = self.state["step"], time.perf_counter()
        self.began, self.printed = self.started - self.state["seconds"], self.started
        self.bar = tqdm(
            total=steps,
            initial=self.state["step"],
            desc="train",
            unit="step",
            disable=None if processes.first() else True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
        if self.metrics:
            self.metrics.close()

    def log(self, step: rora.Step) -> None:
        self.state["step"] = step.number
        tokens = sum(len(r.ids) for r in step.batch)
        speed = tokens / step.seconds
        if self.metrics:
            self.metrics.write(
                step=step.number,
                epoch=round(step.epoch, 4),
                loss=step.loss,
                lr=step.lr,
                grad_norm=step.grad_norm,
                tokens=tokens,
                tok_per_s=round(speed, 1),
                mem_gb=round(peak_memory(self.device) / 1e9, 3),
                seconds=round(time.perf_counter() - self.began, 3),
            )
        self.bar.update()
        self.bar.set_postfix_str(f"loss {step.loss:.3f}, {speed:,.0f} tok/s", refresh=False)
        self.last = step
        every = max(1, self.steps // 10)
        due = step.number == self.steps or (step.number - 1) % every == 0
        if due or time.perf_counter() - self.printed >= EVERY:
            self.print_line(f"{speed:,.0f} tok/s  {self.to_go(step.number)}")

    def print_line(self, what: str) -> None:
        """In a log or a pipe, where no bar is shown."""
        if self.bar.disable and processes.first():
            step, self.printed = self.last, time.perf_counter()
            numbers = f"loss {step.loss:.3f}  lr {step.lr:.2e}"
            print(f"step {step.number}/{self.steps}  {numbers}  {what}", flush=True)

    def to_go(self, number: int) -> str:
        """By the steps of this start, validation and saving included."""
        made = number - self.first
        seconds = (time.perf_counter() - self.started) / made * (self.steps - number)
        if seconds >= 5400:
            return f"{seconds / 3600:.1f} hours to go"
        return f"{seconds / 60:.0f} min to go" if seconds >= 90 else f"{seconds:.0f} s to go"

    def refuse_idle(self, number: int, last: bool) -> None:
        """An adapter that is not in the model's path, or that is at the end what it was at the
        start, must not pass for a result."""
        if number == 1:
            idle = set(rora.wrappers(self.model))
            for name, p in self.params.items():
                if p in self.optimizer.state and self.optimizer.state[p]["exp_avg"].any():
                    idle.discard(name.rpartition(".")[0])  # AdamW has seen a gradient there
            if idle:
                raise NothingLearned(
                    f"no gradient reached {some(idle)}: the adapter there is not in the model's "
                    "path; other --targets may be"
                )
        if last and not self.learned():
            raise NothingLearned(
                f"the adapter is after {self.steps} steps what it was at the start; a larger --lr "
                "may help"
            )

    def learned(self) -> bool:
        """Whether anything trained has changed since the start, as it must after step 1, whose lr
        is 0."""
        return self.steps == 1 or not torch.equal(checksums(self.params), self.start)

    def validate(self) -> None:
        number = self.state["step"]
        with naming_memory(f"in the validation after step {number}"), as_it_stands(self.run_json):
            value = rora.validation_loss(
                self.model, self.held_out, self.settings.micro_batch_size, team()
            )
        if not math.isfinite(value):
            raise NonFiniteError(
                f"step {number}: validation loss {value}; this step was not saved. "
                + may_help(self.settings)
            )
        if self.metrics:
            self.metrics.write(step=number, val_loss=value)
        self.print_line(f"validation loss {value:.4f}")
        best = self.state["best_loss"]
        if (best is None or value < best) and self.learned():
            self.state["best_loss"] = value
            self.keep_best()

    def keep_best(self) -> None:
        self.state["best_step"] = self.state["step"]
        if processes.first():
            rora.save_adapter(self.model, self.folder)
            best = {key: self.state[key] for key in ("best_step", "best_loss")}
            run_folder.write_json(self.folder / "run.json", self.run_json | best)

    def save(self) -> None:
        mine = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(self.device)
        generators = processes.gathered(mine)
        if not self.metrics:
            return
        self.metrics.sync()
        self.state["seconds"] = round(time.perf_counter() - self.began, 3)
        with run_folder.new_checkpoint(self.folder, self.state["step"]) as folder:
            save_state(folder, self.model, self.params, self.optimizer, self.state, generators)
        self.bar.write(f"saved {self.folder}/checkpoints/step-{self.state['step']:06}")


def checksums(params: dict[str, nn.Parameter]) -> Tensor:
    """One number for the bits of each tensor: any change shows, and nothing is copied."""
    return torch.stack([p.detach().float().view(torch.int32).sum() for p in params.values()])


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's tensors, or of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save_state(
    folder: Path,
    model: nn.Module,
    params: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict,
    generators: list[dict[str, Tensor]],
) -> None:
    """All that the rest of the run depends on: adapter, AdamW's moments, every process's random
    numbers, position."""
    refuse.not_finite(adapter_tensors(model))
    write_adapter(folder, adapter_settings(model), adapter_tensors(model))
    tensors = {}
    for i, states in enumerate(generators):
        tensors |= {f"{kind}_rng.{i}": generator for kind, generator in states.items()}
    for name, p in params.items():
        for key, value in optimizer.state[p].items():
            tensors[f"{name}.{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state) + "\n")


def load_state(
    folder: Path,
    model: nn.Module,
    params: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> dict:
    """Fill parameters, optimizer and generators; return the position."""
    settings, tensors = read_adapter(folder, METHODS)
    now = replace(adapter_settings(model), base=None, scaling=None)
    if replace(settings, base=None, scaling=None) != now:
        raise CheckpointError(f"{folder}: holds {settings}, but run.json describes {now}")
    saved = load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, p in adapter_tensors(model).items():
            p.copy_(tensors[name])
        for name, p in params.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[p] = {key: saved[f"{name}.{key}"].to(p.device) for key in keys}
    index = processes.index()
    torch.set_rng_state(saved[f"cpu_rng.{index}"])
    if p.is_cuda and f"cuda_rng.{index}" in saved:
        torch.cuda.set_rng_state(saved[f"cuda_rng.{index}"], p.device)
    return json.loads((folder / "state.json").read_text())
