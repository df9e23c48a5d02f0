"""What `python rora.py` does around the loop of rora.py: start a run or go on with one, --check,
--merge, --trace."""

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
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
from llama import Llama, LlamaConfig, open_llama, save_llama
from plumbing import __version__, memory, processes, refuse, run_folder
from plumbing.faster import hastened, refuse_uncompilable
from plumbing.finding import (
    base_identity,
    find_adapter,
    find_tokenizer,
    load_base,
    read_run,
    refuse_not_finite,
    refuse_strangers,
    tokenizer_identity,
)
from plumbing.flags import (
    DTYPES,
    HERE,
    MAY_CHANGE,
    MAY_MOVE,
    CompileError,
    FlagError,
    OutOfMemory,
    Settings,
    exit_code,
    find_checkpoint,
    find_data,
    find_device,
    names,
    naming_memory,
    resolve,
    short_name,
    training_parser,
)
from plumbing.hf_files import (
    COMPANIONS,
    CheckpointError,
    first_line,
    has_weights,
    read_json,
    save_file,
)
from plumbing.peft_files import MOST_ALPHA, format_words, read_adapter, write_adapter
from plumbing.tokenizer_files import has_tokenizer
from plumbing.tokenizer_json import write_tokenizer_json
from plumbing.training import follow, peak_memory, team, total_steps
from rora import METHODS, SCALES, adapter_settings, attach, load_adapter, merge, trainable

# --- before the first step ------------------------------------------------------------------------


def start_line(model: Llama, method: str) -> str:
    """rora: s = 64/√128 = 5.657 · 224,395,264 of … trainable (3.22%) · PEFT: use_rslora=true"""
    adapter, added = adapter_settings(model), sum(p.numel() for p in trainable(model).values())
    total = sum(p.numel() for p in model.parameters())
    roots = {"linear": "", "sqrt": "√"}
    if adapter.scale is None:
        size = f"{METHODS[adapter.method].rank_is} {adapter.rank}"
    elif adapter.scale in roots:
        rule = f"{adapter.alpha:g}/{roots[adapter.scale]}{adapter.rank}"
        size = f"s = {rule} = {adapter.scaling:.4g}"
    else:
        size = f"s = {adapter.scaling:.4g} ({adapter.scale})"
    share = f"{added:,} of {total:,} trainable ({100 * added / total:.2f}%)"
    return f"{method}: {size} · {share} · {format_words(adapter)}"


def attach_as_set(model: Llama, settings: Settings, dropout: float | None = None) -> None:
    """Raises FlagError where the settings do not fit the model."""
    try:
        attach(
            model,
            settings.method,
            settings.rank,
            settings.alpha,
            settings.dropout if dropout is None else dropout,
            settings.targets,
            settings.scale,
        )
    except ValueError as e:
        raise FlagError(str(e)) from None


def prepare(settings: Settings, device: torch.device) -> tuple[Llama, list[Record], list[Record]]:
    """(model with adapters, training records, held-out records). What can be wrong shows before the
    weights are read."""
    tokenizer = find_tokenizer(settings.ckpt)
    trial = open_llama(find_checkpoint(settings.ckpt))[0]
    records, held_out = read_records(settings, tokenizer, trial)
    return load_with_adapters(settings, device), records, held_out


def load_with_adapters(settings: Settings, device: torch.device) -> Llama:
    model = load_base(settings.ckpt, device, DTYPES[settings.dtype])
    torch.manual_seed(settings.seed)
    attach_as_set(model, settings)
    if not processes.first():  # the same adapters at the start, other dropout
        torch.manual_seed(settings.seed + processes.index())
    return model


def read_records(settings: Settings, tokenizer, trial: Llama) -> tuple[list[Record], list[Record]]:
    """(training records, held-out records), once `trial`, a model on meta, has been given the
    adapters as a test of the settings. Without a tokenizer every record counts as --max-len long.
    """
    attach_as_set(trial, settings)
    blocks, given = trial.cfg.n_layers, settings.checkpoint_blocks
    if isinstance(given, int) and given > blocks:
        raise FlagError(f"--checkpoint-blocks {given}: the model has {blocks} blocks")
    path = find_data(settings.data)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path} can be read only once, and --resume reads it again: give a file")
    examples = load_examples(path)
    train, held_out = split_validation(examples, settings.val_size)  # refuses too many
    if len(held_out) > len(train):
        print(f"note: more records are held out than trained on, {len(train)}; see --val-size")
    if min(settings.batch_size, len(train)) < processes.world():
        raise FlagError(
            f"{processes.world()} processes, but a batch of {settings.batch_size} of {len(train)} "
            "records: each needs a record; see --batch-size"
        )
    if tokenizer is None:
        unknown = array("i", [0] * settings.max_len)
        records = [Record(unknown, 1, number) for number in range(1, len(examples) + 1)]
        return split_validation(records, settings.val_size)
    many = None if len(examples) > 20_000 else True
    try:
        records, cut, dropped = encode_records(
            examples,
            tokenizer,
            settings.max_len,
            settings.loss,
            settings.prompt,
            lambda x: tqdm(x, desc="tokenize", unit="record", disable=many),
        )
    except DataError as e:
        raise DataError(f"{settings.data}: {e}") from None
    if cut or dropped:
        print(
            f"note: {cut} records lost the start of their instruction to fit {settings.max_len} "
            f"tokens, {dropped} were dropped"
        )
    longest, most = max(len(r.ids) for r in records), trial.cfg.max_positions
    if longest > most:
        print(
            f"note: the longest record has {longest} tokens, but this model was made for {most} "
            "positions (max_position_embeddings); see --max-len"
        )
    return split_validation(records, settings.val_size)


def facts(settings: Settings, model: Llama) -> dict:
    """What run.json says beside the settings: enough to know later what made the numbers."""
    return {
        "effective_scale": adapter_settings(model).scaling,
        "device": str(model.lm_head.weight.device),
        "trainable": sum(p.numel() for p in trainable(model).values()),
        "processes": processes.world(),
        "base_sha256": base_identity(settings.ckpt),
        "tokenizer_sha256": tokenizer_identity(settings.ckpt),
        "data_sha256": run_folder.sha256(find_data(settings.data)),
        "version": __version__,
        "python": platform.python_version(),
        "packages": {p: version(p) for p in ("torch", "safetensors", "sentencepiece", "tqdm")},
        **source(),
    }


def source(home: Path = HERE) -> dict:
    """The commit of this project's own repository, and whether the tree is another than its. Not of
    a repository that merely contains the project, nor of one that the environment names."""
    unknown = {"commit": None, "changed": None}
    if not shutil.which("git"):
        return unknown
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(home), *words]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=own)
        return None if done.returncode else done.stdout.strip()

    top, commit = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != home.resolve():
        return unknown
    return {"commit": commit, "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}


# --- a run ----------------------------------------------------------------------------------------


def new_run(args: argparse.Namespace, settings: Settings) -> Path:
    """Where the run will be. Raises RunError if it could not be there."""
    name = f"{short_name(settings.ckpt)}-{settings.label}-r{settings.rank}-s{settings.seed}"
    folder = Path(args.out or f"runs/{name}")
    run_folder.check_writable(folder)
    refuse_existing(folder, args.overwrite)
    return folder


def start(args: argparse.Namespace) -> int:
    """Train from the beginning."""
    settings, device = resolve(args)
    folder = new_run(args, settings)
    how = how_fast(args, device)
    model, records, held_out = prepare(settings, device)
    processes.wait()  # all have looked at the folder before the first fills it
    run_json = {
        "settings": asdict(settings),
        **facts(settings, model),
        "steps": total_steps(records, settings),
        **how,
        "best_step": None,
        "finished": False,
    }
    with run_folder.lock(folder) if processes.first() else nullcontext():
        if processes.first():
            refuse_existing(folder, args.overwrite)  # another run may have come and gone since
            clear(folder, run_json)
        with leaving_nothing(folder):
            return fit(model, records, held_out, settings, folder, run_json)


def how_fast(args: argparse.Namespace, device: torch.device, before: dict | None = None) -> dict:
    """What run.json says of --compile and --graphs; a resumed run goes on as it was."""
    how = {name: bool(getattr(args, name) or (before or {}).get(name)) for name in FASTER}
    if how["compile"]:
        refuse_uncompilable(device)
    return how


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """A start that fails before its first step must not be in the way of the next try."""
    try:
        yield
    except BaseException:
        metrics = folder / "metrics.jsonl"
        begun = metrics.exists() and metrics.stat().st_size > 0
        if processes.first() and not begun and not run_folder.checkpoints(folder):
            run_folder.remove_debris(folder)
            for name in ("run.json", "metrics.jsonl", ".lock"):
                (folder / name).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
        raise


def clear(folder: Path, run_json: dict) -> None:
    """Make the folder this run's, of which nothing is there yet but run.json."""
    run_folder.remove_debris(folder)
    if (folder / "checkpoints").exists():  # first of all: they must not be taken for the new run's
        run_folder.discard(folder / "checkpoints")
    run_folder.write_json(folder / "run.json", run_json)
    for old in folder.iterdir():
        if old.name not in (".lock", "run.json"):
            run_folder.discard(old)


def refuse_existing(folder: Path, overwrite: bool | None) -> None:
    """Raise RunError if something is there that --overwrite does not cover; what a crash before the
    start left does not count."""
    if not folder.is_dir():
        return
    if all(p.name == ".lock" or p.name.startswith(".tmp-") for p in folder.iterdir()):
        return
    if not (folder / "run.json").is_file():
        raise run_folder.RunError(f"{folder} exists and is not a run; choose another --out")
    if not overwrite:
        raise run_folder.RunError(
            f"{folder} exists: --resume {folder} goes on with it as it was started, --overwrite "
            "starts anew, --out DIR goes elsewhere"
        )


def resume(args: argparse.Namespace) -> int:
    """Go on with a run, exactly as if it had never stopped."""
    folder = Path(args.resume)
    run_json = read_run(folder)
    settings = changed(folder, Settings.from_json(run_json["settings"]), args)
    run_folder.check_writable(folder)
    refuse_other_team(folder, run_json.get("processes", 1))
    with run_folder.lock(folder) if processes.first() else nullcontext():
        if processes.first():
            run_folder.remove_debris(folder)
            run_folder.remove_debris(folder / "checkpoints")
        newest, complaints = run_folder.newest_intact(folder)
        if run_json["finished"]:
            score = f"{command('eval.py')} {shlex.quote(str(folder))}"
            print(f"{folder} is finished; to score it: {score}")
            return 0
        if newest is None:
            refuse_without_checkpoint(folder, complaints)
        for complaint in complaints:
            print(f"note: {complaint}; using the older {newest}", file=sys.stderr)
        device = find_device(args.device)
        run_json |= how_fast(args, device, run_json)
        model, records, held_out = prepare(settings, device)
        now = facts(settings, model)
        for key, what, flag in [
            ("data_sha256", settings.data, "--data"),
            ("base_sha256", settings.ckpt, "--ckpt"),
            ("tokenizer_sha256", f"the tokenizer of {settings.ckpt}", "--ckpt"),
        ]:
            if now[key] != run_json[key]:
                raise DataError(
                    f"{what} is not what {folder} was started with; put the original back, say "
                    f"with {flag} where it is now, or start a new run"
                )
        now_set = {name: getattr(settings, name) for name in sorted(MAY_MOVE | MAY_CHANGE)}
        run_json["settings"] |= now_set  # where things are now, for scoring and merging
        print(f"resuming {newest}")
        processes.wait()
        if processes.first():  # the places of the damaged are needed: these steps come again
            for damaged in run_folder.checkpoints(folder)[: len(complaints)]:
                run_folder.discard(damaged)
        return fit(model, records, held_out, settings, folder, run_json, newest)


def changed(folder: Path, settings: Settings, args: argparse.Namespace) -> Settings:
    """The run's settings with what flags may change. Raises FlagError for what they may not."""
    changes = {}
    was = lambda x: "not given" if x is None else " ".join(x) if isinstance(x, tuple) else x
    for f in fields(Settings):
        value = getattr(args, f.name, None)
        value = names(value) if isinstance(value, list) else value
        if value is not None and value != getattr(settings, f.name):
            changes[f.name] = value
    if refused := {
        name: value for name, value in changes.items() if name not in MAY_CHANGE | MAY_MOVE
    }:
        other = ", ".join(
            f"--{name.replace('_', '-')} {was(getattr(settings, name))} (now {was(value)})"
            for name, value in refused.items()
        )
        raise FlagError(
            f"{folder} was made with other settings: {other}; resume without them, or start a new "
            "run"
        )
    return replace(settings, **changes)


def refuse_other_team(folder: Path, trained_by: int) -> None:
    if trained_by != processes.world():
        raise FlagError(
            f"{folder} was trained by {trained_by} processes, this is {processes.world()}: their "
            f"shares would differ; {command(together=trained_by)} --resume {folder}"
        )


def refuse_without_checkpoint(folder: Path, complaints: list[str]) -> None:
    again = "start it again with --overwrite"
    if complaints:
        raise CheckpointError(f"no checkpoint of {folder} is intact ({complaints[0]}); {again}")
    raise run_folder.RunError(f"{folder} has no checkpoint yet to resume from; {again}")


def plan_memory(
    model: Llama, records: list[Record], settings: Settings, loaded: bool = True
) -> tuple[memory.MemoryPlan, list[Record], int]:
    """(what the largest micro-batch of the run takes, that micro-batch, how many blocks to
    recompute). loaded: whether the model's weights are in memory already."""
    per_epoch = math.ceil(len(records) / settings.batch_size)
    largest = memory.largest_micro_batch(
        records,
        settings.batch_size,
        settings.micro_batch_size,
        settings.seed,
        epochs=math.ceil(total_steps(records, settings) / per_epoch),
    )
    device = model.lm_head.weight.device
    model.train()  # dropout keeps its masks
    # the first block stands for all; the run's own random numbers stay undrawn
    with fast.held(model.layers[0]), torch.random.fork_rng():
        plan = memory.plan(model, collate(largest), fast.logit_bytes(device))
    # a CPU's allocator leaves gaps between tensors: a third of a process, measured
    share = 0.6 if device.type == "cpu" else 0.92
    room = int(share * (memory.available(device) + plan.weights * loaded))
    names = {"none": 0, "all": plan.blocks, "auto": plan.fewest_recomputed(room)}
    recomputed = names.get(settings.checkpoint_blocks, settings.checkpoint_blocks)
    return plan, largest, recomputed


def memory_line(plan: memory.MemoryPlan, recomputed: int, free: int) -> str:
    plural = "" if recomputed == 1 else "s"
    return (
        f"memory: about {plan.total(recomputed) / 1e9:.1f} GB ({plan.parts(recomputed)}) of "
        f"{free / 1e9:.1f} GB; {recomputed or 'no'} block{plural} of {plan.blocks} recomputed"
    )


def schedule_words(settings: Settings, steps: int) -> str:
    return (
        f"{steps:,} steps of {settings.batch_size} · lr {settings.lr:g}, warm-up {settings.warmup}"
    )


def note_warmup(settings: Settings, steps: int) -> None:
    if settings.warmup >= steps:
        print(
            f"note: the warm-up of {settings.warmup} steps is not over after {steps}: lr never "
            f"reaches {settings.lr:g}; see --warmup"
        )


def fit(
    model: Llama,
    records: list[Record],
    held_out: list[Record],
    settings: Settings,
    folder: Path,
    run_json: dict,
    newest: Path | None = None,
) -> int:
    """Say what will be done, do it, say what came of it."""
    steps = total_steps(records, settings)
    print(start_line(model, settings.label))
    learned = "all tokens" if settings.loss == "all" else "the answer"
    print(
        f"{settings.ckpt} · {len(records):,} records, {len(held_out)} held out · "
        f"{schedule_words(settings, steps)} · loss on {learned} · {settings.prompt} prompt · "
        f"{settings.dtype} on {model.lm_head.weight.device}",
        flush=True,
    )
    note_warmup(settings, steps)
    plan, largest, recomputed = plan_memory(model, records, settings)
    free = memory.available(model.lm_head.weight.device) + plan.weights
    if recomputed or model.lm_head.weight.is_cuda or plan.total(recomputed) > free:
        print(memory_line(plan, recomputed, free), flush=True)
    try:
        backward = hastened(model, settings, recomputed, largest, run_json)
        state = follow(
            model, records, held_out, settings, recomputed, folder, run_json, newest, backward
        )
    except run_folder.Stopped as e:
        again = command(together=processes.world())
        print(f"stopped; to go on: {again} --resume {shlex.quote(str(folder))}")
        return e.code
    except OutOfMemory as e:
        raise OutOfMemory(f"{e}; {memory_line(plan, recomputed, free)}") from None
    except RuntimeError as e:
        if run_json.get("compile") and type(e).__module__.startswith(
            ("torch._dynamo", "torch._inductor")
        ):
            raise CompileError(f"--compile failed ({first_line(e)}); leave it out") from None
        raise
    end = {key: state[key] for key in ("best_step", "best_loss")}
    run_json |= {**end, "finished": True, "seconds": state["seconds"]}
    if processes.first():
        run_folder.write_json(folder / "run.json", run_json)
    which = f"after step {state['step']}"
    if held_out:
        which = (
            f"with the best validation loss {state['best_loss']:.4f} at step {state['best_step']}"
        )
    print(
        f"saved {folder}: the adapter {which}, {state['seconds']:.0f} s\n"
        f"to score it: {command('eval.py')} {shlex.quote(str(folder))}"
    )
    return 0


def command(program: str = "rora.py", together: int = 1) -> str:
    """How to start a program again: with the interpreter in use, which may not be `python`."""
    python = sys.executable or "python"
    if (found := shutil.which("python")) and os.path.samefile(found, python):
        python = "python"
    place = Path(program) if Path(program).resolve() == HERE / program else HERE / program
    many = f"-m torch.distributed.run --nproc_per_node={together} " if together > 1 else ""
    return f"{shlex.quote(python)} {many}{shlex.quote(str(place))}"


# --- in place of a run ----------------------------------------------------------------------------


def check(args: argparse.Namespace) -> int:
    """What a run would be, before hours are spent on it: the plan, made on one block and from
    config.json alone; then, if it fits and the weights are there, the longest micro-batch and three
    steps for real."""
    settings, device = resolve(args)
    if args.out:
        new_run(args, settings)
    how = how_fast(args, device)
    idle = peak_memory(device)  # on a CPU: what Python and torch take by themselves
    folder = find_checkpoint(settings.ckpt)
    weights, tokenizer = has_weights(folder), None
    if has_tokenizer(folder):
        tokenizer = find_tokenizer(settings.ckpt)
    else:
        print(f"note: {folder} has no tokenizer: records count as {settings.max_len} tokens each")
    if weights:
        trial = open_llama(folder)[0]
    else:
        with torch.device("meta"):
            trial = Llama(LlamaConfig.from_json(folder / CONFIG))
    records, held_out = read_records(settings, tokenizer, trial)
    print(start_line(trial, settings.label))
    steps, tokens = total_steps(records, settings), sum(len(r.ids) for r in records)
    print(
        f"{len(records):,} records, {len(held_out)} held out · {tokens:,} tokens an epoch, "
        f"{max(len(r.ids) for r in records)} at most in a record · "
        f"{schedule_words(settings, steps)} · {settings.dtype} on {device}"
    )
    note_warmup(settings, steps)
    free = memory.available(device)
    with naming_memory("making one block to plan with"):
        sample = skeleton(trial.cfg, settings, device)
        plan, largest, recomputed = plan_memory(sample, records, settings, loaded=False)
    print(memory_line(plan, recomputed, free), flush=True)
    if plan.total(recomputed) > free:
        raise OutOfMemory(
            f"this run takes about {plan.total(recomputed) / 1e9:.1f} GB of {free / 1e9:.1f} GB"
        )
    if not weights:
        print(f"{folder} has no weights: planned from {CONFIG} alone, nothing was measured")
        return 0
    del sample
    model = load_with_adapters(settings, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    order = epoch_order(len(records), settings.seed, 0)
    batches = []
    for i in range(0, min(len(order), 3 * settings.batch_size), settings.batch_size):
        batches.append([records[j] for j in order[i : i + settings.batch_size]])
    model.train()
    backward = hastened(model, settings, recomputed, largest, how)
    speed = measure(model, settings, recomputed, batches, largest, backward)
    taken = f"{(peak_memory(device) - idle) / 1e9:.1f} GB"
    if device.type != "cuda":
        own = f"{idle / 1e9:.1f} of Python and torch"
        taken += f" beside the {own}, the gaps between tensors included"
    hours = steps / math.ceil(len(records) / settings.batch_size) * tokens / speed / 3600
    long = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    print(
        f"measured: {speed:,.0f} tokens/s over {len(batches)} steps, {taken}; the run would take "
        f"about {long}, validation and saving not counted"
    )
    return 0


CONFIG = "config.json"


def skeleton(cfg: LlamaConfig, settings: Settings, device: torch.device) -> Llama:
    """A model of which all but one block is without memory, to plan with."""
    with torch.device("meta"):
        model = Llama(cfg).to(DTYPES[settings.dtype])
    attach_as_set(model, settings)
    for part in (model.embed_tokens, model.layers[0], model.norm, model.lm_head):
        part.to_empty(device=device)
        for p in part.parameters():
            nn.init.normal_(p, 0.0, 0.02)
    if cfg.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def measure(
    model: Llama,
    settings: Settings,
    recomputed: int,
    batches: list[list[Record]],
    largest: list[Record],
    backward: Callable,
) -> float:
    """Tokens per second over real steps on `batches`. The largest micro-batch comes last, when
    AdamW's moments are there."""
    optimizer, seconds, seen = rora.new_optimizer(model, settings.lr), 0.0, 0
    model.train()
    shared = [r for r in largest for _ in range(processes.world())]  # train_step takes a share
    timed = [False, *(True for _ in batches), False]  # the first warms up
    for batch, counts in zip([batches[0], *batches, shared], timed):
        began = time.perf_counter()
        rora.train_step(
            model,
            batch,
            optimizer,
            settings.lr,
            settings.micro_batch_size,
            recomputed,
            team=team(),
            backward=backward,
        )
        optimizer.zero_grad()
        if counts:
            seconds += time.perf_counter() - began
            seen += sum(len(r.ids) for r in batch)
    return seen / seconds


def merge_files(args: argparse.Namespace) -> int:
    """Base + adapter as one Hugging Face folder, in the base's dtype on disk if not told otherwise;
    or the adapter with a plain scale."""
    if not args.out:
        raise FlagError("--merge needs --out DIR")
    out = Path(args.out)
    run_folder.check_writable(out)
    if out.exists():
        raise run_folder.RunError(f"{out} exists; --merge writes a new folder")
    folder, ckpt = find_adapter(args.merge, args.ckpt)
    if args.export_scale:
        if args.dtype:
            raise FlagError("--dtype has no effect with --export-scale")
        return export_plain(folder, out)
    method = read_adapter(folder, METHODS)[0].method
    try:
        refuse.unmergeable(METHODS, method)
    except ValueError as e:
        raise FlagError(str(e)) from None
    base = find_checkpoint(ckpt)
    refuse_strangers(folder, ckpt)
    model = load_base(ckpt, torch.device("cpu"), DTYPES[args.dtype] if args.dtype else None)
    load_adapter(model, folder)
    merge(model)
    kind = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    advice = f" once the adapter is in: more than {kind} can hold; nothing was written"
    refuse_not_finite(model, "", advice)
    with run_folder.new_folder(out) as temporary:
        save_llama(model, temporary)
        for name in COMPANIONS:
            if (base / name).is_file():
                (temporary / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(base / name, temporary / name)
        set_straight(temporary / "config.json", model.cfg.tie_embeddings, args.dtype and kind)
        lacking = write_tokenizer_json(base, temporary)
    if lacking:
        print(f"note: {lacking}")
    print(f"saved {out}: {ckpt} with {folder} merged in, {model.embed_tokens.weight.dtype}")
    return 0


def set_straight(path: Path, tied: bool, dtype: str | None) -> None:
    """What the base's config.json says and the merged tensors do not: heads that differ from the
    embedding are not tied, biases that were all zero are not written, the dtype may be another."""
    config = read_json(path)
    right = {"tie_word_embeddings": tied, "attention_bias": False, "mlp_bias": False}
    wrong: dict = {key: value for key, value in right.items() if bool(config.get(key)) != value}
    if dtype:
        wrong |= {key: dtype for key in ("torch_dtype", "dtype") if key in config}
    if wrong:
        run_folder.write_json(path, config | wrong)


def export_plain(folder: Path, out: Path) -> int:
    settings, tensors = read_adapter(folder, METHODS)
    if settings.scale is None:
        raise FlagError(f"{settings.method} has no scale to export")
    if {name.rpartition(".")[2] for name in tensors} - {"lora_A", "lora_B", "magnitude"}:
        raise FlagError(f"{settings.method} is not LoRA with another scale: nothing to export")
    s = SCALES[settings.scale](settings.alpha, settings.rank)
    if s * settings.rank >= MOST_ALPHA:
        raise FlagError(f"lora_alpha would be {s * settings.rank:g}, beyond {MOST_ALPHA:g}")
    with run_folder.new_folder(out) as temporary:
        write_adapter(temporary, replace(settings, scaling=s), tensors, plain_scale=True)
    alpha = f"lora_alpha {s * settings.rank:g} and use_rslora false"
    print(f"saved {out}: the adapter with {alpha}")
    return 0


def trace(args: argparse.Namespace) -> int:
    """One fixed batch through model and adapters: what another implementation must reproduce. Names
    as in tools/CONFORM.md."""
    settings, device = resolve(args)
    out = Path(args.trace)
    run_folder.check_writable(out.parent)
    if out.exists() and not out.is_file():  # a device would be replaced by a file
        kind = "a folder" if out.is_dir() else "not a file"
        raise run_folder.RunError(f"{out} is {kind}; --trace needs the name of a file")
    find_tokenizer(settings.ckpt)
    model = load_base(settings.ckpt, device, DTYPES[settings.dtype])
    torch.manual_seed(settings.seed)
    attach_as_set(model, settings, dropout=0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    params = trainable(model)
    with torch.no_grad():  # away from the start, where lora_B = 0 hides half of the gradients
        for p in params.values():
            p.add_((0.02 * torch.randn(p.shape, generator=generator)).to(p.device))
    tokens = torch.randint(0, model.cfg.vocab_size, (2, 17), generator=generator)
    tensors = traced(model, tokens[:, :-1].to(device), tokens[:, 1:].to(device))
    with run_folder.replaced_files(out.parent) as temporary:
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in tensors.items()},
            temporary / out.name,
            {"settings": json.dumps(asdict(adapter_settings(model)))},
        )
    loss = tensors["loss"].item()
    print(start_line(model, settings.label))
    print(f"saved {out}: {len(tensors)} tensors, loss {loss:.6f}")
    return 0


def traced(
    model: Llama, ids: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:  # (B, T), (B, T)
    """Every block's output, the logits, the loss, the adapters and their gradients."""
    B, T = ids.shape
    params = trainable(model)
    tensors = {"ids": ids, "targets": targets}
    tensors |= {f"adapter.{name}": p for name, p in params.items()}

    def keep(name: str):
        return lambda module, inputs, y: tensors.update({name: y.view(B, T, -1)})

    hooks = []
    for i, layer in enumerate(model.layers):
        hooks.append(layer.register_forward_hook(keep(f"layers.{i}")))
    logits = model(ids)  # (B, T, V)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    loss.backward()
    for hook in hooks:
        hook.remove()
    tensors |= {"logits": logits, "loss": loss}
    return tensors | {f"grad.{name}": p.grad for name, p in params.items()}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see README. Never raises SystemExit."""

    def work() -> int:
        args = training_parser().parse_args(argv)
        job, name = chosen_job(args)
        refuse_stray(args, name)
        with processes.joined():
            return job(args)

    return exit_code(work, "rora")


FASTER = ("compile", "graphs")
TRAINING = {f.name for f in fields(Settings)} | {"device", *FASTER}
TRACED = {"ckpt", "method", "scale", "rank", "alpha", "targets", "seed", "device", "dtype"}
JOBS = {  # the flag that asks for it: (what does it, the flags that it takes)
    None: (start, TRAINING | {"out", "overwrite"}),
    "resume": (resume, TRAINING),
    "merge": (merge_files, {"out", "export_scale", "ckpt", "dtype"}),
    "check": (check, TRAINING | {"out", "overwrite"}),
    "trace": (trace, TRACED),
}


def chosen_job(args: argparse.Namespace):
    """(function, flag that asked for it or None)."""
    chosen = [name for name in JOBS if name and getattr(args, name) is not None]
    if len(chosen) > 1:
        raise FlagError(f"--{chosen[0]} and --{chosen[1]} are different jobs: give one of them")
    name = chosen[0] if chosen else None
    return JOBS[name][0], name


def refuse_stray(args: argparse.Namespace, name: str | None) -> None:
    given = {flag for flag, value in vars(args).items() if value is not None}
    if stray := given - JOBS[name][1] - {name}:
        where = f"with --{name}" if name else "here"
        raise FlagError(f"--{min(stray).replace('_', '-')} has no effect {where}")
