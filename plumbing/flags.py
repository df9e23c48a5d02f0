"""What may be asked for on the command line, and what a checkpoint decides when it is not asked.

This file knows flags, defaults, devices and exit codes. It knows no models and does no work.
"""

import argparse
import io
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError

from data import DataError
from plumbing import processes
from plumbing.checkpoints import CHECKPOINTS, HERE, PAPER, Checkpoint
from plumbing.hf_files import CheckpointError
from plumbing.peft_files import MOST_ALPHA
from plumbing.run_folder import RunError, came_before
from rora import METHODS, SCALES, Method, NonFiniteError

# --- defaults -------------------------------------------------------------------------------------


LOSSES = ("all", "answer")
PROMPTS = ("clean", "dora")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def default_lr(method: str, row: Checkpoint) -> float:
    """The peak learning rate, a fact of method and checkpoint together."""
    return row.lr.get(method, METHODS[method].lr)


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on, as run.json keeps it. Two runs of equal settings are equal."""

    ckpt: str
    data: str
    method: str
    scale: str | None
    rank: int
    alpha: float | None
    dropout: float
    targets: tuple[str, ...]
    loss: str
    prompt: str
    max_len: int
    epochs: int
    max_steps: int | None
    batch_size: int
    lr: float
    warmup: int
    val_size: int
    eval_every: int
    save_every: int
    seed: int
    dtype: str
    micro_batch_size: int  # these two change memory, time and dropout's masks; no more
    checkpoint_blocks: int | str  # all, none, auto, or how many from the first on

    @property
    def label(self) -> str:
        """The method's name in folders and tables: dora-sqrt is DoRA with RoRA's scale."""
        usual = self.scale in (None, METHODS[self.method].layer.scale)
        return self.method if usual else f"{self.method}-{self.scale}"

    @classmethod
    def from_json(cls, saved: dict) -> "Settings":
        """Read back from run.json. Raises ValueError or TypeError for what no flags could give."""
        settings = cls(**saved | {"targets": tuple(saved["targets"])})
        for f in fields(cls):
            value = getattr(settings, f.name)
            kind = tuple if f.name == "targets" else f.type
            if type(value) is int and not isinstance(value, kind):
                value = float(value)  # JSON has 64 for 64.0
            fits = isinstance(value, kind) and not isinstance(value, bool)
            if fits and isinstance(value, (int, float)):
                least = 0 if f.name in MAY_BE_ZERO else math.nextafter(0, 1)
                fits = least <= value < 2**63
            known = value is None or value in CHOICES.get(f.name, [value])
            if not fits or not known:
                raise ValueError(f"{f.name} is {value!r}")
        if not all(isinstance(target, str) for target in settings.targets):
            raise ValueError(f"targets is {settings.targets!r}")
        return settings


MAY_CHANGE = {"micro_batch_size", "checkpoint_blocks"}
MAY_MOVE = {"ckpt", "data"}  # what they hold is known by its hash
MAY_BE_ZERO = {"dropout", "warmup", "val_size", "seed", "checkpoint_blocks"}
CHOICES = {  # the tables themselves: a row that is added later counts
    "method": METHODS,
    "scale": SCALES,
    "loss": LOSSES,
    "prompt": PROMPTS,
    "dtype": tuple(DTYPES),
}

# --- where to find things -------------------------------------------------------------------------


class FlagError(ValueError):
    """A command line that cannot be obeyed."""


class OutOfMemory(MemoryError):
    """Says what was being done."""


class CompileError(RuntimeError):
    """What torch.compile could not do here."""


class NothingLearned(Exception):
    """An adapter that is not in the model's path, or that ends as it started."""


def find_checkpoint(name: str) -> Path:
    """`tiny` (beside rora.py), a folder, or a name under checkpoints/."""
    for folder in [HERE / "tiny"] if name == "tiny" else [Path(name), Path("checkpoints") / name]:
        if folder.is_dir():
            return folder
    hint, on_hub = f"known names: {', '.join(CHECKPOINTS)}", name.rstrip("/")
    if near := get_close_matches(name, CHECKPOINTS, n=1):
        hint = f"did you mean {near[0]}?"
    if name in CHECKPOINTS:
        hint = f"./weights_download.sh {name} fetches it"
    elif Path(name).is_file():
        hint = f"{name} is a file: name the folder that it is in"
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", on_hub):
        hint = f"if that is its name on the hub, ./weights_download.sh {on_hub} fetches it"
    places = name if Path(name).is_absolute() else f"{name} or checkpoints/{name}"
    raise CheckpointError(f"no checkpoint folder {places}; {hint}")


def short_name(ckpt: str) -> str:
    """A checkpoint's name in folders: its folder's, also where that is called "." or ".."."""
    name = Path(ckpt).name
    return Path(ckpt).resolve().name if name in ("", "..") else name


def find_data(name: str) -> Path:
    """A file or folder: here, or beside rora.py, as the embedded model's data are."""
    ours = HERE / name
    return ours if not Path(name).exists() and ours.exists() else Path(name)


def row_of(ckpt: str) -> Checkpoint:
    """The checkpoint's row in the table, also where it is named by its folder; the paper's
    defaults for any other."""
    name = short_name(ckpt)
    homes = [HERE / name, Path(name).resolve(), (Path("checkpoints") / name).resolve()]
    known = ckpt == name or Path(ckpt).resolve() in homes
    return CHECKPOINTS.get(name, PAPER) if known else PAPER


def find_device(name: str | None) -> torch.device:
    """With its number where there are several: under torchrun "cuda" alone would be the first GPU
    for some, ours for others."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cuda", "cpu", "mps"):
            raise RuntimeError("choose cuda, cpu or mps")
        device = torch.empty(0, device=device).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where --graphs records is the current device
    except (RuntimeError, AssertionError) as e:
        raise FlagError(f"--device {name}: {str(e).splitlines()[0]}") from None
    return device


def find_dtype(name: str | None, ckpt: str, device: torch.device) -> str:
    row = row_of(ckpt)
    name = name or (row.cuda_dtype if device.type == "cuda" else row.cpu_dtype)
    if name == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        raise FlagError(
            f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic; use --dtype fp32"
        )
    return name


# --- the flags ------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise FlagError(message)


def at_least(least: float, kind: type = int, below: float = 2**63) -> Callable[[str], float]:
    """An argparse type: a number in [least, below)."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < below:
            whole = "whole " if kind is int else ""
            bound = f" and below {below:g}" if value >= below or below < 2**63 else ""
            above = "above 0" if 0 < least < 1e-300 else f"of at least {least:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number {above}{bound}")
        return value

    return parse


def positive(text: str) -> float:
    return at_least(math.nextafter(0, 1), float)(text)


def blocks(text: str) -> int | str:
    words = ("auto", "all", "none")
    if text in words or text.isdecimal():
        return text if text in words else at_least(0)(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither {', '.join(words)} nor a whole number")


def names(given: Iterable[str]) -> tuple[str, ...]:
    """q_proj v_proj, or q_proj,v_proj: both are typed."""
    return tuple(" ".join(given).replace(",", " ").split())


DEFAULT_SCALE = "sqrt"


def method_of_scale(scale: str) -> str:
    """The method that bears a scale's name on the command line. Raises FlagError."""
    for name, row in METHODS.items():
        if row.layer.scale == scale:
            return name
    raise FlagError(f"no row of METHODS in rora.py has the scale {scale}")


def by_method(fact: Callable[[Method], float | None]) -> str:
    """A default that methods differ in, for --help: "32; series, parallel 256; prefix 30"."""
    usual = fact(METHODS[method_of_scale(DEFAULT_SCALE)])
    others: dict[float, list[str]] = {}
    for name, row in METHODS.items():
        value = fact(row)
        if value is not None and value != usual:
            others.setdefault(value, []).append(name)
    return "; ".join([f"{usual:g}", *(f"{', '.join(who)} {x:g}" for x, who in others.items())])


def training_parser() -> Parser:
    """rora.py's flags. Defaults are None where a row decides, so that a flag without effect can be
    told and refused."""
    parser = Parser(
        prog="rora.py",
        usage="rora.py [flags]",
        allow_abbrev=False,
        # one line a flag: --help fits a screen
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=140),
        description="Fine-tune a LLaMA with RoRA, or a method it is compared with.",
        epilog="exit codes: 0 done, 1 memory or disk, 2 flags or output folder, 3 data or "
        "checkpoint, 4 not finite, 128 + a signal: stopped and saved",
    )
    add_method_flags(parser.add_argument_group("what to train"))
    add_data_flags(parser.add_argument_group("on what"))
    add_speed_flags(parser.add_argument_group("how long, how fast"))
    add_output_flags(parser.add_argument_group("where to"))
    add_jobs(parser.add_argument_group("instead of a new run"))
    return parser


def add_method_flags(group) -> None:
    tiny = CHECKPOINTS["tiny"]
    group.add_argument(
        "--ckpt",
        metavar="NAME",
        help=f"{', '.join(CHECKPOINTS)}, or a Hugging Face folder (default: tiny)",
    )
    default = method_of_scale(DEFAULT_SCALE)
    group.add_argument("--method", choices=METHODS, help=f"default: {default}")
    short = {"linear": "α/r", "sqrt": "α/√r"}
    meanings = [f"{scale}: {short.get(scale, 'see SCALES')}" for scale in SCALES]
    free = [name for name, row in METHODS.items() if row.other_scales]
    group.add_argument(
        "--scale",
        choices=SCALES,
        help=f"{', '.join(meanings)}: the method of that scale, or {' or '.join(free)}'s own",
    )
    group.add_argument(
        "--rank",
        type=at_least(1, below=1_000_000),
        metavar="N",
        help="rank, a bottleneck's width, or a prefix's tokens "
        f"(default {by_method(lambda row: row.rank)})",
    )
    group.add_argument(
        "--alpha",
        type=at_least(math.nextafter(0, 1), float, below=MOST_ALPHA),
        metavar="X",
        help=f"numerator of the scale (default {PAPER.alpha:g}; tiny {tiny.alpha:g})",
    )
    group.add_argument(
        "--dropout",
        type=at_least(0, float, 1),
        metavar="P",
        help=f"on the adapter's input (default {by_method(lambda row: row.dropout)})",
    )
    group.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help=f"layers to adapt (default: {' '.join(METHODS[default].layer.targets)})",
    )


def add_data_flags(group) -> None:
    tiny = CHECKPOINTS["tiny"]
    group.add_argument(
        "--data",
        metavar="FILE",
        help=f"records as in commonsense_170k.json (default: {PAPER.data}; tiny: its own)",
    )
    group.add_argument(
        "--loss",
        choices=LOSSES,
        help=f"tokens that are learned (default: {PAPER.loss}, the paper's protocol; "
        f"tiny {tiny.loss})",
    )
    group.add_argument(
        "--prompt", choices=PROMPTS, help="dora: the bytes of DoRA's scripts (default: clean)"
    )
    group.add_argument(
        "--max-len",
        type=at_least(8),
        metavar="N",
        help="tokens a record, BOS and EOS included (default 256)",
    )
    group.add_argument(
        "--val-size",
        type=at_least(0),
        metavar="N",
        help="records held out to choose the best adapter "
        f"(default {PAPER.val_size}; tiny {tiny.val_size})",
    )


def add_speed_flags(group) -> None:
    tiny = CHECKPOINTS["tiny"]
    count = at_least(1)
    group.add_argument(
        "--epochs", type=count, metavar="N", help=f"default {PAPER.epochs}; tiny {tiny.epochs}"
    )
    group.add_argument(
        "--max-steps", type=count, metavar="N", help="optimizer steps, in place of --epochs"
    )
    group.add_argument(
        "--batch-size", type=count, metavar="N", help="records an optimizer step (default 16)"
    )
    group.add_argument(
        "--micro-batch-size",
        type=count,
        metavar="N",
        help="records in memory at once (default: the batch)",
    )
    group.add_argument(
        "--lr",
        type=positive,
        metavar="X",
        help=f"peak of AdamW's rate (default {by_method(lambda row: row.lr)}; "
        "some models have their own)",
    )
    group.add_argument(
        "--warmup",
        type=at_least(0),
        metavar="N",
        help=f"steps of linear warm-up (default {PAPER.warmup}; tiny {tiny.warmup})",
    )
    group.add_argument(
        "--seed",
        type=at_least(0),
        metavar="N",
        help="of initialisation, order and dropout (default 0)",
    )
    group.add_argument(
        "--device", metavar="NAME", help="cuda, cpu, mps (default: cuda if there is one)"
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the base model, or of what --merge writes (default: "
        "bf16 on cuda, fp32 on cpu; the base file's)",
    )
    group.add_argument(
        "--checkpoint-blocks",
        type=blocks,
        metavar="K",
        help="blocks recomputed in backward: all, none, a number, or auto, as few as memory "
        "allows (default)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="torch.compile each block: a minute at the start, then faster steps on a GPU",
    )
    group.add_argument(
        "--graphs",
        action="store_true",
        default=None,
        help="record steps as CUDA graphs and replay them: faster where a GPU waits for its host",
    )


def add_output_flags(group) -> None:
    group.add_argument("--out", metavar="DIR", help="default: runs/<ckpt>-<method>-r<rank>-s<seed>")
    group.add_argument(
        "--overwrite",
        action="store_true",
        default=None,
        help="delete an existing run in that folder first",
    )
    group.add_argument(
        "--eval-every", type=at_least(1), metavar="N", help="steps between validations (default 80)"
    )
    group.add_argument(
        "--save-every",
        type=at_least(1),
        metavar="N",
        help="steps between checkpoints (default 800)",
    )


def add_jobs(group) -> None:
    group.add_argument("--resume", metavar="RUN", help="go on from the newest intact checkpoint")
    group.add_argument(
        "--merge", metavar="RUN", help="write base + adapter as one plain checkpoint into --out"
    )
    group.add_argument(
        "--export-scale",
        choices=["plain"],
        help="with --merge: write the adapter alone, its scale as alpha/r (for tools "
        "that ignore use_rslora)",
    )
    group.add_argument(
        "--check",
        action="store_true",
        default=None,
        help="print the plan, memory and time of this run, and stop",
    )
    group.add_argument(
        "--trace",
        metavar="FILE",
        help="write one fixed batch's activations, loss and gradients, to compare with",
    )


def resolve(args: argparse.Namespace) -> tuple[Settings, torch.device]:
    """Fill in what the flags left open: from the checkpoint's row, the method's row, then the
    protocol."""
    method = args.method or method_of_scale(args.scale or DEFAULT_SCALE)
    named = METHODS[method]
    refuse_without_effect(args, method)
    ckpt = args.ckpt or "tiny"
    if short_name(ckpt) != Path(ckpt).name:  # "." is another folder elsewhere
        ckpt = str(Path(ckpt).resolve())
    row, device = row_of(ckpt), find_device(args.device)

    def given(flag: str, default):
        value = getattr(args, flag)
        return default if value is None else value

    scaled = named.layer.scale is not None
    batch_size = given("batch_size", 16)
    settings = Settings(
        ckpt=ckpt,
        data=given("data", row.data),
        method=method,
        scale=(args.scale or named.layer.scale) if scaled else None,
        rank=given("rank", named.rank),
        alpha=given("alpha", row.alpha) if scaled else None,
        dropout=given("dropout", named.dropout or 0.0),
        targets=names(given("targets", named.layer.targets)),
        loss=given("loss", row.loss),
        prompt=given("prompt", "clean"),
        max_len=given("max_len", 256),
        epochs=given("epochs", row.epochs),
        max_steps=args.max_steps,
        batch_size=batch_size,
        lr=given("lr", default_lr(method, row)),
        warmup=given("warmup", row.warmup),
        val_size=given("val_size", row.val_size),
        eval_every=given("eval_every", 80),
        save_every=given("save_every", 800),
        seed=given("seed", 0),
        dtype=find_dtype(args.dtype, ckpt, device),
        micro_batch_size=min(batch_size, given("micro_batch_size", batch_size)),
        checkpoint_blocks=given("checkpoint_blocks", "auto"),
    )
    return settings, device


def refuse_without_effect(args: argparse.Namespace, method: str) -> None:
    """Raise FlagError for a flag that the method, or another flag, makes void."""
    row = METHODS[method]
    own = row.layer.scale
    if args.scale and args.scale not in (own, *row.other_scales):
        hint = f"; --method {method_of_scale(args.scale)} is that" if own else ""
        raise FlagError(f"--scale {args.scale} does not go with --method {method}{hint}")
    takes = {
        "alpha": own is not None,
        "dropout": row.dropout is not None,
        "targets": row.layer.any_target,
    }
    for flag, has_effect in takes.items():
        if getattr(args, flag) is not None and not has_effect:
            raise FlagError(f"--{flag} has no effect with --method {method}")
    if args.epochs and args.max_steps:
        raise FlagError("--max-steps replaces --epochs: give one of them")


# --- failures -------------------------------------------------------------------------------------


@contextmanager
def naming_memory(doing: str) -> Iterator[None]:
    """A lack of memory, which Python, a CPU and a GPU each report in their own way, becomes
    OutOfMemory(`doing`)."""
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError) as e:
        what = (str(e).splitlines() or ["host memory"])[0]
        if (
            isinstance(e, torch.OutOfMemoryError)
            or "can't allocate memory" in what
            or "_ALLOC_FAILED" in what
            or type(e) is MemoryError
        ):
            raise OutOfMemory(f"out of memory {doing} ({what})") from None
        raise


class Ended(BaseException):
    """Somebody wants the program to end; what it was writing is removed on the way out."""

    def __init__(self, number: int):
        self.number = number


@contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP become Ended. While it trains and scores, run_folder.stop_signals listens
    in its place. It is told what has come: Python swallows what is raised inside a finalizer."""
    came_before.clear()

    def end(number, frame):
        came_before.append(128 + number)
        raise Ended(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # which alone may listen
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(
    work: Callable[[], int],
    program: str,
    smaller: str = "a smaller --micro-batch-size, --checkpoint-blocks all, a smaller --rank, or "
    "--dtype bf16",
) -> int:
    """Run `work`; foreseeable failures become one line on stderr and the exit code that README
    lists.

    smaller: the flags that save memory.
    """

    def fail(code: int, message: object) -> int:
        line = " ".join(str(message).split())[:2000]
        # a name from a file may hold anything, a terminal's colours included
        line = "".join(c if c.isprintable() else "?" for c in line)
        who = "" if processes.first() else f" (process {processes.index()})"
        print(f"{program}{who}: {line}", file=sys.stderr)
        return code

    if torch.__version__ < (2, 6):
        return fail(
            1,
            f"torch {torch.__version__} is too old: before 2.6 a .bin file could run code in spite "
            "of weights_only=True (CVE-2025-32434); pip install -r requirements.txt",
        )
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # never die of what a terminal cannot show
        with suppress(io.UnsupportedOperation):  # half-read already
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
    try:
        with ended_in_order(), naming_memory("while reading the model"):
            return work()
    except Ended as e:
        return fail(128 + e.number, f"ended by {signal.Signals(e.number).name}")
    except SystemExit as e:  # argparse, after --help
        return e.code if isinstance(e.code, int) else 0 if e.code is None else fail(2, e.code)
    except (FlagError, RunError, processes.ProcessError) as e:
        return fail(2, e)
    except (DataError, CheckpointError) as e:
        return fail(3, e)
    except NonFiniteError as e:
        return fail(4, e)
    except (NothingLearned, CompileError) as e:
        return fail(1, e)
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    except OutOfMemory as e:
        return fail(1, f"{e}; try {smaller}; what was saved before is intact")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, SafetensorError) as e:
        hint = "mend that, then go on with --resume or the same command"
        return fail(1, f"{e}; what was saved before is intact: {hint}")
