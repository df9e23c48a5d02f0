"""What `python rora.py` does around the loop of rora.py: start a run or go on with one, --check, --merge, --trace."""

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
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import fast
import rora
from data import (
    DataError,
    Record,
    collate,
    encode_records,
    epoch_order,
    load_examples,
    split_validation,
)
from llama import Llama, open_llama, save_llama
from plumbing import memory, processes, refuse
from plumbing import run_folder as runs
from plumbing.finding import find_adapter, find_tokenizer, load_base, read_run, refuse_strangers
from plumbing.flags import (
    DTYPES,
    HERE,
    MAY_CHANGE,
    FlagError,
    NothingLearned,
    OutOfMemory,
    Settings,
    exit_code,
    find_checkpoint,
    find_device,
    naming_memory,
    resolve,
    training_parser,
)
from plumbing.hf_files import COMPANIONS, TensorFiles
from plumbing.peft_files import CheckpointError, read_adapter, some, write_adapter
from rora import (
    METHODS,
    SCALES,
    NonFiniteError,
    Recipe,
    adapter_settings,
    adapter_tensors,
    attach,
    load_adapter,
    merge,
    trainable,
)


def start_line(model: Llama, method: str) -> str:
    """rora: s = 64/√128 = 5.657 · 224,395,264 of 6,962,810,880 trainable (3.22%) · PEFT: use_rslora=true"""
    a, added = adapter_settings(model), sum(p.numel() for p in trainable(model).values())
    total = sum(p.numel() for p in model.parameters())
    size = {
        "series": f"bottleneck {a.rank}",
        "parallel": f"bottleneck {a.rank}",
        "prefix": f"{a.rank} tokens a layer",
    }.get(a.method)
    if size is None:
        root = "√" if a.scale == "sqrt" else ""
        size = (
            f"s = {a.alpha:g}/{root}{a.rank} = {a.scaling:.4g}"
            if a.scale in ("linear", "sqrt")
            else f"s = {a.scaling:.4g} ({a.scale})"
        )
    peft = {
        "series": "LLM-Adapters: BOTTLENECK",
        "parallel": "LLM-Adapters: BOTTLENECK",
        "prefix": "PEFT: PREFIX_TUNING",
    }.get(a.method)
    if peft is None:
        peft = (
            "PEFT: use_dora=true, " if a.method == "dora" else "PEFT: "
        ) + f"use_rslora={str(a.scale == 'sqrt').lower()}"
    return (
        f"{method}: {size} · {added:,} of {total:,} trainable ({100 * added / total:.2f}%) · {peft}"
    )


def prepare(s: Settings, device: torch.device) -> tuple[Llama, list[Record], list[Record]]:
    """(model with adapters, training records, held-out records). What can be wrong shows before the weights are read."""
    tokenizer = find_tokenizer(s.ckpt)
    trial = open_llama(find_checkpoint(s.ckpt))[0]
    try:
        attach(trial, s.method, s.rank, s.alpha, s.dropout, s.targets, s.scale)
    except ValueError as e:
        raise FlagError(str(e)) from None
    if isinstance(s.checkpoint_blocks, int) and s.checkpoint_blocks > trial.cfg.n_layers:
        raise FlagError(
            f"--checkpoint-blocks {s.checkpoint_blocks}: the model has {trial.cfg.n_layers} blocks"
        )
    examples = load_examples(s.data)
    split_validation(examples, s.val_size)  # refuses a --val-size that is too large
    show = lambda x: tqdm(
        x, desc="tokenize", unit="record", disable=None if len(examples) > 20_000 else True
    )
    records, cut, dropped = encode_records(examples, tokenizer, s.max_len, s.loss, s.prompt, show)
    if cut or dropped:
        print(
            f"note: {cut} records lost the start of their instruction to fit {s.max_len} tokens, {dropped} were dropped"
        )
    records, held_out = split_validation(records, s.val_size)
    model = load_base(s.ckpt, device, DTYPES[s.dtype])
    torch.manual_seed(s.seed)
    attach(model, s.method, s.rank, s.alpha, s.dropout, s.targets, s.scale)
    if not processes.first():
        torch.manual_seed(
            s.seed + processes.rank()
        )  # the same adapters at the start, other dropout
    return model, records, held_out


def label(s: Settings) -> str:
    """The method's name in folders and tables: dora-sqrt is DoRA with RoRA's scale."""
    return s.method if s.scale in (None, METHODS[s.method].layer.scale) else f"{s.method}-{s.scale}"


def facts(s: Settings, model: Llama) -> dict:
    """What run.json says beside the settings: enough to know later what made the numbers."""
    commit = (
        subprocess.run(
            ["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True
        )
        if shutil.which("git")
        else None
    )
    a = adapter_settings(model)
    return {
        "effective_scale": a.scaling,
        "device": str(model.lm_head.weight.device),
        "trainable": sum(p.numel() for p in trainable(model).values()),
        "processes": processes.world(),
        "base_sha256": TensorFiles(find_checkpoint(s.ckpt)).fingerprint(),
        "data_sha256": runs.sha256(Path(s.data)),
        "python": platform.python_version(),
        "packages": {p: version(p) for p in ("torch", "safetensors", "sentencepiece", "tqdm")},
        "commit": commit.stdout.strip() or None if commit else None,
    }


def start(args: argparse.Namespace) -> int:
    """Train from the beginning."""
    s, device = resolve(args)
    run = Path(args.out or f"runs/{Path(s.ckpt).name}-{label(s)}-r{s.rank}-s{s.seed}")
    runs.check_writable(run)
    refuse_existing(run, args.overwrite)
    model, records, held_out = prepare(s, device)
    processes.wait()  # all have looked at the folder before the first fills it
    record = {"settings": asdict(s), **facts(s, model), "best_step": None, "finished": False}
    with runs.lock(run) if processes.first() else nullcontext():
        if processes.first():
            refuse_existing(
                run, args.overwrite
            )  # once more: another run may have come and gone since
            runs.sweep(run)
            if (
                run / "checkpoints"
            ).exists():  # first of all: they must not be taken for the new run's
                runs.discard(run / "checkpoints")
            runs.write_json(run / "run.json", record)
            for old in run.iterdir():
                if old.name not in (".lock", "run.json"):
                    runs.discard(old)
        return fit(model, records, held_out, s, run, record, compiled=args.compile)


def refuse_existing(run: Path, overwrite: bool | None) -> None:
    """Raise RunError if something is in the folder that --overwrite does not cover; what a crash before the start left does not count."""
    if not run.is_dir() or all(
        p.name == ".lock" or p.name.startswith(".tmp-") for p in run.iterdir()
    ):
        return
    if not (run / "run.json").is_file():
        raise runs.RunError(f"{run} exists and is not a run; choose another --out")
    if not overwrite:
        raise runs.RunError(
            f"{run} exists: --resume {run} goes on with it, --overwrite starts anew, --out DIR goes elsewhere"
        )


def resume(args: argparse.Namespace) -> int:
    """Go on with a run, exactly as if it had never stopped."""
    run = Path(args.resume)
    record = read_run(run)
    s = Settings(**{**record["settings"], "targets": tuple(record["settings"]["targets"])})
    changes = {
        f.name: tuple(v) if f.name == "targets" else v
        for f in fields(Settings)
        if (v := getattr(args, f.name, None)) is not None
        and (tuple(v) if f.name == "targets" else v) != getattr(s, f.name)
    }
    if refused := {k: v for k, v in changes.items() if k not in MAY_CHANGE}:
        raise FlagError(
            f"{run} was made with other settings: "
            + ", ".join(
                f"--{k.replace('_', '-')} {getattr(s, k)} (now {v})" for k, v in refused.items()
            )
            + "; resume without them, or start a new run"
        )
    s = Settings(**{**asdict(s), **changes, "targets": s.targets})
    runs.check_writable(run)
    if record.get("processes", 1) != processes.world():
        raise FlagError(
            f"{run} was trained by {record.get('processes', 1)} processes, this is {processes.world()}: their shares would differ; "
            f"torchrun --nproc_per_node={record.get('processes', 1)} rora.py --resume {run}"
        )
    with runs.lock(run) if processes.first() else nullcontext():
        for folder in (run, run / "checkpoints") if processes.first() else ():
            runs.sweep(folder)
        newest, complaints = runs.newest_intact(run)
        if record["finished"]:
            print(f"{run} is finished; to score it: python eval.py {run}")
            return 0
        if newest is None and complaints:
            raise CheckpointError(
                f"no checkpoint of {run} is intact ({complaints[0]}); start it again with --overwrite"
            )
        if newest is None:
            raise runs.RunError(
                f"{run} has no checkpoint yet to resume from; start it again with --overwrite"
            )
        for complaint in complaints:
            print(f"note: {complaint}; using the older {newest}", file=sys.stderr)
        model, records, held_out = prepare(s, find_device(args.device))
        now = facts(s, model)
        for key, what in [("data_sha256", s.data), ("base_sha256", s.ckpt)]:
            if now[key] != record[key]:
                raise DataError(
                    f"{what} is not what {run} was started with; put the original back, or start a new run"
                )
        print(f"resuming {newest}")
        processes.wait()
        for damaged in (
            runs.checkpoints(run)[: len(complaints)] if processes.first() else ()
        ):  # their places are needed: these steps come again
            runs.discard(damaged)
        return fit(model, records, held_out, s, run, record, newest, args.compile)


def plan_memory(
    model: Llama, records: list[Record], s: Settings
) -> tuple[memory.MemoryPlan, list[Record], int]:
    """(what the largest micro-batch of the run takes, that micro-batch, how many blocks to recompute)."""
    epochs = math.ceil(total_steps(records, s) / math.ceil(len(records) / s.batch_size))
    largest = memory.largest_micro_batch(records, s.batch_size, s.micro_batch_size, s.seed, epochs)
    device = model.lm_head.weight.device
    model.train()  # dropout keeps its masks
    with fast.held(model), torch.random.fork_rng():  # the run's own random numbers stay undrawn
        plan = memory.plan(model, collate(largest), fast.logit_bytes(device))
    share = (
        0.6 if device.type == "cpu" else 0.92
    )  # a CPU's allocator leaves gaps between tensors: a third of a process, measured
    room = int(share * (memory.available(device) + plan.weights))
    names = {"none": 0, "all": plan.blocks, "auto": plan.fewest_recomputed(room)}
    return plan, largest, names.get(s.checkpoint_blocks, s.checkpoint_blocks)


def total_steps(records: list[Record], s: Settings) -> int:
    """The last batch of an epoch may be a partial one; it counts as a step."""
    return s.max_steps or s.epochs * math.ceil(len(records) / s.batch_size)


def fit(
    model: Llama,
    records: list[Record],
    held_out: list[Record],
    s: Settings,
    run: Path,
    record: dict,
    newest: Path | None = None,
    compiled: bool | None = None,
) -> int:
    """Say what will be done, do it, say what came of it."""
    steps = total_steps(records, s)
    print(start_line(model, label(s)))
    print(
        f"{s.ckpt} · {len(records):,} records, {len(held_out)} held out · {steps:,} steps of {s.batch_size} · lr {s.lr:g}, "
        f"warm-up {s.warmup} · loss on {'all tokens' if s.loss == 'all' else 'the answer'} · {s.prompt} prompt · "
        f"{s.dtype} on {model.lm_head.weight.device}",
        flush=True,
    )
    if s.warmup >= steps:
        print(
            f"note: the warm-up of {s.warmup} steps is not over after {steps}: lr never reaches {s.lr:g}; see --warmup"
        )
    plan, _, recomputed = plan_memory(model, records, s)
    if compiled:
        for layer in model.layers:
            layer.compile(dynamic=True)  # one compilation for all lengths
    if recomputed or model.lm_head.weight.is_cuda:
        print(memory_line(plan, recomputed, model), flush=True)
    try:
        state = follow(model, records, held_out, s, recomputed, run, record, newest)
    except runs.Stopped as e:
        program = (
            "python" if processes.world() == 1 else f"torchrun --nproc_per_node={processes.world()}"
        )
        print(f"stopped; to go on: {program} rora.py --resume {shlex.quote(str(run))}")
        return e.code
    except OutOfMemory as e:
        raise OutOfMemory(f"{e}; {memory_line(plan, recomputed, model)}") from None
    record |= {
        "best_step": state["best_step"],
        "best_loss": state["best_loss"],
        "finished": True,
        "seconds": state["seconds"],
    }
    if processes.first():
        runs.write_json(run / "run.json", record)
    best = (
        f"best validation loss {state['best_loss']:.4f} at step {state['best_step']}"
        if held_out
        else f"after step {state['step']}"
    )
    print(
        f"saved {run}: the adapter with the {best}, {state['seconds']:.0f} s\nto score it: python eval.py "
        f"{shlex.quote(str(run))}"
    )
    return 0


def memory_line(plan: memory.MemoryPlan, recomputed: int, model: nn.Module) -> str:
    free = memory.available(model.lm_head.weight.device) + plan.weights
    return (
        f"memory: about {plan.total(recomputed) / 1e9:.1f} GB ({plan.parts(recomputed)}) of {free / 1e9:.1f} GB; "
        f"{recomputed or 'no'} block{'s' * (recomputed != 1)} of {plan.blocks} recomputed"
    )


def check(args: argparse.Namespace) -> int:
    """What a run would be, before hours are spent on it: the plan, then the longest micro-batch and three steps for real."""
    s, device = resolve(args)
    idle = peak_memory(device)  # on a CPU: what Python and torch take by themselves
    model, records, held_out = prepare(s, device)
    steps, tokens = total_steps(records, s), sum(len(r.ids) for r in records)
    plan, largest, recomputed = plan_memory(model, records, s)
    print(start_line(model, label(s)))
    print(
        f"{len(records):,} records, {len(held_out)} held out · {tokens:,} tokens an epoch, {max(len(r.ids) for r in records)} at most in "
        f"a record · {steps:,} steps of {s.batch_size} · lr {s.lr:g}, warm-up {s.warmup} · {s.dtype} on {device}"
    )
    print(memory_line(plan, recomputed, model), flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizer, seconds, seen = rora.new_optimizer(model, s.lr), 0.0, 0
    model.train()
    order = epoch_order(len(records), s.seed, 0)
    batches = [
        [records[j] for j in order[i : i + s.batch_size]]
        for i in range(0, min(len(order), 3 * s.batch_size), s.batch_size)
    ]
    largest = [
        r for r in largest for _ in range(processes.world())
    ]  # train_step takes a share of it
    for i, batch in enumerate(
        [batches[0], *batches, largest]
    ):  # the first warms up; the largest comes when AdamW's moments are there
        began = time.perf_counter()
        rora.train_step(model, batch, optimizer, s.lr, s.micro_batch_size, recomputed, team=team())
        optimizer.zero_grad()
        if 1 <= i <= len(batches):
            seconds, seen = (
                seconds + time.perf_counter() - began,
                seen + sum(len(r.ids) for r in batch),
            )
    taken = f"{(peak_memory(device) - idle) / 1e9:.1f} GB" + (
        ""
        if device.type == "cuda"
        else f" beside the {idle / 1e9:.1f} of Python and torch, the gaps between tensors included"
    )
    hours = steps * s.batch_size / len(records) * tokens * seconds / seen / 3600
    print(
        f"measured: {seen / seconds:,.0f} tokens/s over {len(batches)} steps, {taken}; the run would take about "
        f"{f'{hours:.1f} hours' if hours >= 1 else f'{60 * hours:.1f} minutes'}, validation and saving not counted"
    )
    return 0


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
        s = SCALES[settings.scale](settings.alpha, settings.rank)
        with runs.new_folder(out) as temporary:
            write_adapter(temporary, replace(settings, scaling=s), tensors, plain_scale=True)
        print(
            f"saved {out}: the adapter with lora_alpha {s * settings.rank:g} and use_rslora false"
        )
        return 0
    settings = read_adapter(folder)[0]
    if not hasattr(METHODS[settings.method].layer, "merged_weight"):
        raise FlagError(
            f"{settings.method} cannot be merged: what it adds is not a change of a weight matrix"
        )
    base = find_checkpoint(ckpt)
    refuse_strangers(folder, ckpt)
    model = load_base(ckpt, torch.device("cpu"), None)
    load_adapter(model, folder)
    merge(model)
    with runs.new_folder(out) as temporary:
        save_llama(model, temporary)
        for name in COMPANIONS:
            if (base / name).is_file():
                (temporary / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(base / name, temporary / name)
    print(f"saved {out}: {ckpt} with {folder} merged in, {model.embed_tokens.weight.dtype}")
    return 0


def trace(args: argparse.Namespace) -> int:
    """One fixed batch through model and adapters: what another implementation must reproduce. Names in the README."""
    s, device = resolve(args)
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
    tensors = {"ids": ids, "targets": targets} | {
        f"adapter.{name}": p for name, p in params.items()
    }
    hooks = [
        layer.register_forward_hook(
            lambda _, __, y, i=i: tensors.update({f"layers.{i}": y.view(2, 16, -1)})
        )
        for i, layer in enumerate(model.layers)
    ]
    logits = model(ids)  # (B, T, V)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    loss.backward()
    for hook in hooks:
        hook.remove()
    tensors |= {"logits": logits, "loss": loss} | {
        f"grad.{name}": p.grad for name, p in params.items()
    }
    with runs.replaced_files(out.parent) as temporary:
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in tensors.items()},
            temporary / out.name,
            {"settings": json.dumps(asdict(adapter_settings(model)))},
        )
    print(
        f"{start_line(model, label(s))}\nsaved {out}: {len(tensors)} tensors, loss {loss.item():.6f}"
    )
    return 0


def team():
    """The other processes, where there are any."""
    return processes if processes.world() > 1 else None


def follow(
    model: Llama,
    records: list[Record],
    held_out: list[Record],
    s: Settings,
    recomputed: int,
    run: Path,
    record: dict,
    resume: Path | None,
) -> dict:
    """Go along with rora.train: log every update, validate, keep the best adapter, save, stop when asked. Returns the final state.

    Raises NonFiniteError, or runs.Stopped once the state is saved after SIGINT or SIGTERM.
    """
    with (
        runs.stop_signals() as stop,
        Run(model, held_out, s, total_steps(records, s), run, record, resume) as here,
    ):
        recipe = Recipe(
            here.steps, s.batch_size, s.micro_batch_size, s.lr, s.warmup, s.seed, recomputed
        )
        steps = rora.train(model, records, recipe, here.optimizer, here.state["step"], team())
        while here.state["step"] < here.steps:
            try:
                with naming_memory(f"in step {here.state['step'] + 1}"):
                    step = next(steps)
            except NonFiniteError as e:
                raise NonFiniteError(
                    f"step {here.state['step'] + 1}: {e} of {s.data}; the weights are untouched. A smaller --lr or --alpha, "
                    "or --dtype fp32, may help"
                ) from None
            here.log(step)
            last, stopping = (
                step.number == here.steps,
                processes.anyone(bool(stop), here.device),
            )  # asked once: a later signal is the next step's
            here.refuse_idle(step, last)
            if held_out and (step.number % s.eval_every == 0 or last):
                here.validate()
            if last and not held_out:
                here.keep_best()
            if last or stopping or step.number % s.save_every == 0:
                here.save()
            if stopping and not last:
                raise runs.Stopped(stop[0] if stop else 143)
        return here.state


class Run:
    """A run folder while it is written: metrics, the best adapter, checkpoints. Process 0 alone writes."""

    def __init__(
        self,
        model,
        held_out,
        s: Settings,
        steps: int,
        folder: Path,
        record: dict,
        resume: Path | None,
    ):
        self.model, self.held_out, self.s, self.steps, self.folder, self.record = (
            model,
            held_out,
            s,
            steps,
            folder,
            record,
        )
        self.params, self.optimizer, self.device = (
            trainable(model),
            rora.new_optimizer(model, s.lr),
            model.lm_head.weight.device,
        )
        self.state = {
            "step": 0,
            "steps": steps,
            "best_step": None,
            "best_loss": None,
            "seconds": 0.0,
        }
        if resume:
            self.state = load_state(resume, model, self.params, self.optimizer)
        self.metrics = (
            runs.Metrics(folder / "metrics.jsonl", self.state["step"])
            if processes.first()
            else None
        )
        self.began = time.perf_counter() - self.state["seconds"]
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
        every = max(1, self.steps // 10)
        if self.bar.disable and (
            step.number == self.steps or (step.number - 1) % every == 0
        ):  # a log or a pipe: a few lines, no bar
            print(
                f"step {step.number}/{self.steps}  loss {step.loss:.3f}  lr {step.lr:.2e}  {speed:,.0f} tok/s",
                flush=True,
            )

    def refuse_idle(self, step: rora.Step, last: bool) -> None:
        """An adapter that is not in the model's path, or that is still zero at the end, must not pass for a result."""
        moved = lambda p: (
            p in self.optimizer.state and self.optimizer.state[p]["exp_avg"].any()
        )  # AdamW has seen a gradient
        idle = [name for name, p in self.params.items() if name.endswith("lora_B") and not moved(p)]
        if idle and step.number == 1:
            raise NothingLearned(
                f"no gradient reached {some(idle)}: the adapter there is not in the model's path; other --targets may be"
            )
        if last and self.steps > 1 and all_zero(self.params):
            raise NothingLearned(
                f"the adapter is still zero after {self.steps} steps; a larger --lr may help"
            )

    def validate(self) -> None:
        number = self.state["step"]
        with naming_memory(f"in the validation after step {number}"):
            value = rora.validation_loss(self.model, self.held_out, self.s.micro_batch_size, team())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"step {number}: validation loss {value}; this step was not saved. A smaller --lr or --alpha, or --dtype fp32, "
                "may help"
            )
        if self.metrics:
            self.metrics.write(step=number, val_loss=value)
        if (self.state["best_loss"] is None or value < self.state["best_loss"]) and not (
            self.steps > 1 and all_zero(self.params)
        ):
            self.state["best_loss"] = value
            self.keep_best()

    def keep_best(self) -> None:
        self.state["best_step"] = self.state["step"]
        if processes.first():
            rora.save_adapter(self.model, self.folder)
            runs.write_json(
                self.folder / "run.json",
                self.record | {k: self.state[k] for k in ("best_step", "best_loss")},
            )

    def save(self) -> None:
        generators = processes.gathered(
            {"cpu": torch.get_rng_state()}
            | (
                {"cuda": torch.cuda.get_rng_state(self.device)}
                if self.device.type == "cuda"
                else {}
            )
        )
        if not self.metrics:
            return
        self.metrics.sync()
        self.state["seconds"] = round(time.perf_counter() - self.began, 3)
        with runs.new_checkpoint(self.folder, self.state["step"]) as folder:
            save_state(folder, self.model, self.params, self.optimizer, self.state, generators)
        self.bar.write(f"saved {self.folder}/checkpoints/step-{self.state['step']:06}")


def all_zero(params: dict[str, nn.Parameter]) -> bool:
    """Whether the adapter still does nothing: every lora_B is zero, as after step 1, whose lr is 0."""
    lora_B = [p for name, p in params.items() if name.endswith("lora_B")]
    return bool(lora_B) and not any(p.any() for p in lora_B)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's tensors, or of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if platform.system() == "Darwin" else 1024
    )


def save_state(
    folder: Path,
    model: nn.Module,
    params: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict,
    generators: list[dict[str, Tensor]],
) -> None:
    """All that the rest of the run depends on: adapter, AdamW's moments, every process's random numbers, position."""
    refuse.not_finite(adapter_tensors(model))
    write_adapter(folder, adapter_settings(model), adapter_tensors(model))
    tensors = {
        f"{kind}_rng.{i}": state
        for i, states in enumerate(generators)
        for kind, state in states.items()
    }
    for name, p in params.items():
        tensors |= {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for key, value in optimizer.state[p].items()
        }
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state) + "\n")


def load_state(
    folder: Path,
    model: nn.Module,
    params: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> dict:
    """Fill parameters, optimizer and generators; return the position."""
    settings, tensors = read_adapter(folder)
    if replace(settings, base=None) != replace(adapter_settings(model), base=None, scaling=None):
        raise CheckpointError(
            f"{folder}: holds {settings}, but run.json describes {adapter_settings(model)}"
        )
    saved = load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, p in adapter_tensors(model).items():
            p.copy_(tensors[name])
        for name, p in params.items():
            optimizer.state[p] = {
                key: saved[f"{name}.{key}"].to(p.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    torch.set_rng_state(saved[f"cpu_rng.{processes.rank()}"])
    if p.is_cuda and f"cuda_rng.{processes.rank()}" in saved:
        torch.cuda.set_rng_state(saved[f"cuda_rng.{processes.rank()}"], p.device)
    return json.loads((folder / "state.json").read_text())


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see README. Never raises SystemExit."""

    def work() -> int:
        args = training_parser().parse_args(argv)
        given = {name for name, value in vars(args).items() if value is not None}
        training = {f.name for f in fields(Settings)} | {"device", "compile"}
        modes = {
            "resume": (resume, training),
            "merge": (merge_files, {"out", "export_scale", "ckpt"}),
            "check": (check, training),
            "trace": (
                trace,
                {"ckpt", "method", "scale", "rank", "alpha", "targets", "seed", "device", "dtype"},
            ),
        }
        chosen = [mode for mode in modes if mode in given]
        if len(chosen) > 1:
            raise FlagError(f"--{chosen[0]} and --{chosen[1]} are different jobs: give one of them")
        run, known = modes[chosen[0]] if chosen else (start, training | {"out", "overwrite"})
        if stray := given - known - set(chosen):
            raise FlagError(
                f"--{min(stray).replace('_', '-')} has no effect "
                + (f"with --{chosen[0]}" if chosen else "here")
            )
        return run(args)

    return exit_code(work, "rora")
