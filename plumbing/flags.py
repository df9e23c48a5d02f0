"""What may be asked for on the command line, and what a checkpoint decides when it is not asked.

This file knows flags, defaults, devices and exit codes. It knows no models and does no work.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from data import DataError
from plumbing import processes
from plumbing.hf_files import CheckpointError
from plumbing.run_folder import RunError
from rora import METHODS, SCALES, NonFiniteError

HERE = Path(__file__).resolve().parent.parent

# --- defaults --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What a base model decides. lr is DoRA's scripts' for the paper's models."""

    lr: float = 2e-4
    loss: str = "all"
    warmup: int = 100
    alpha: float = 64
    epochs: int = 3
    val_size: int = 120
    data: str = "data/commonsense_170k.json"
    tests: str = "data"  # folder of <task>/test.json
    cuda_dtype: str = "bf16"
    cpu_dtype: str = "fp32"


PAPER = Checkpoint()  # also for folders that have no row
CHECKPOINTS = {
    "tiny": Checkpoint(
        lr=2e-3,
        loss="answer",
        warmup=10,
        alpha=16,
        epochs=2,
        val_size=40,
        data=str(HERE / "tiny/data/train.json"),
        tests=str(HERE / "tiny/data"),
        cuda_dtype="fp32",
    ),
    "llama-7b": PAPER,
    "llama-13b": PAPER,
    "llama2-7b": PAPER,
    "llama3-8b": Checkpoint(lr=1e-4),
    "sheared-llama-1.3b": PAPER,
}


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
    micro_batch_size: int  # these two change memory and time, not the result beyond rounding
    checkpoint_blocks: int | str  # all, none, auto, or how many from the first on


MAY_CHANGE = {"micro_batch_size", "checkpoint_blocks"}


# --- where to find things --------------------------------------------------------------------------


class FlagError(ValueError):
    """A command line that cannot be obeyed."""


class OutOfMemory(MemoryError):
    """Says what was being done."""


class NothingLearned(Exception):
    """An adapter that is not in the model's path, or that is still zero at the end."""


def find_checkpoint(name: str) -> Path:
    """`tiny` (beside this file), a folder, or a name under checkpoints/."""
    for folder in [HERE / "tiny"] if name == "tiny" else [Path(name), Path("checkpoints") / name]:
        if folder.is_dir():
            return folder
    hint = (
        f"./weights_download.sh {name} fetches it"
        if name in CHECKPOINTS
        else f"known names: {', '.join(CHECKPOINTS)}"
    )
    raise CheckpointError(f"no checkpoint folder {name} or checkpoints/{name}; {hint}")


def row_of(ckpt: str) -> Checkpoint:
    """The checkpoint's row in the table, also where it is named by its folder; the paper's defaults for any other."""
    name = Path(ckpt).name
    known = name in CHECKPOINTS and (
        ckpt == name or Path(ckpt).resolve() in (find_checkpoint(name).resolve(), HERE / name)
    )
    return CHECKPOINTS[name] if known else PAPER


def find_device(name: str | None) -> torch.device:
    """With its number where there are several: under torchrun "cuda" alone would be the first GPU for some, ours for others."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cuda", "cpu", "mps"):
            raise RuntimeError("choose cuda, cpu or mps")
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise FlagError(f"--device {name}: {str(e).splitlines()[0]}") from None
    return device


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def find_dtype(name: str | None, ckpt: str, device: torch.device) -> str:
    row = row_of(ckpt)
    name = name or (row.cuda_dtype if device.type == "cuda" else row.cpu_dtype)
    if name == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        raise FlagError(
            f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic; use --dtype fp32"
        )
    return name


# --- the flags -------------------------------------------------------------------------------------


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
            bound = f" and below {below:g}" if value >= below or below < 2**63 else ""
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a{' whole' if kind is int else ''} number of at least {least:g}{bound}"
            )
        return value

    return parse


def positive(text: str) -> float:
    return at_least(math.nextafter(0, 1), float)(text)


def blocks(text: str) -> int | str:
    return text if text in ("auto", "all", "none") else at_least(0)(text)


def training_parser() -> Parser:
    """rora.py's flags. Defaults are None where a row decides, so that a flag without effect can be told and refused."""
    tiny = CHECKPOINTS["tiny"]
    wide = lambda prog: argparse.HelpFormatter(
        prog, max_help_position=30, width=140
    )  # one line a flag: --help fits a screen
    parser = Parser(
        prog="rora.py",
        usage="rora.py [flags]",
        allow_abbrev=False,
        formatter_class=wide,
        description="Fine-tune a LLaMA with RoRA, or a method it is compared with.",
        epilog="exit codes: 0 done, 1 memory or disk, 2 flags or output folder, 3 data or checkpoint, 4 loss not finite, "
        "130/143 stopped and saved",
    )
    g = parser.add_argument_group("what to train")
    g.add_argument(
        "--ckpt",
        metavar="NAME",
        help=f"{', '.join(CHECKPOINTS)}, or a Hugging Face folder (default: tiny)",
    )
    g.add_argument("--method", choices=METHODS, help="default: rora")
    g.add_argument(
        "--scale",
        choices=SCALES,
        help="linear: α/r, i.e. lora; sqrt: α/√r, i.e. rora; either, with --method dora",
    )
    g.add_argument(
        "--rank",
        type=at_least(1, below=1_000_000),
        metavar="N",
        help=f"rank (default {METHODS['rora'].rank}); series, parallel: width ({METHODS['series'].rank}); prefix: tokens "
        f"({METHODS['prefix'].rank})",
    )
    g.add_argument(
        "--alpha",
        type=positive,
        metavar="X",
        help=f"numerator of the scale (default {PAPER.alpha:g}; tiny {tiny.alpha:g})",
    )
    g.add_argument(
        "--dropout",
        type=at_least(0, float, 1),
        metavar="P",
        help=f"on the adapter's input (default {METHODS['rora'].dropout:g}; series, parallel {METHODS['series'].dropout:g})",
    )
    g.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help=f"layers to adapt (default: {' '.join(METHODS['rora'].layer.targets)})",
    )
    g = parser.add_argument_group("on what")
    g.add_argument(
        "--data",
        metavar="FILE",
        help=f"records as in commonsense_170k.json (default: {PAPER.data}; tiny: its own)",
    )
    g.add_argument(
        "--loss",
        choices=["all", "answer"],
        help=f"tokens that are learned (default: {PAPER.loss}, the paper's protocol; tiny {tiny.loss})",
    )
    g.add_argument(
        "--prompt",
        choices=["clean", "dora"],
        help="dora: the bytes of DoRA's scripts (default: clean)",
    )
    g.add_argument(
        "--max-len",
        type=at_least(8),
        metavar="N",
        help="tokens a record, BOS and EOS included (default 256)",
    )
    g.add_argument(
        "--val-size",
        type=at_least(0),
        metavar="N",
        help=f"records held out to choose the best adapter (default {PAPER.val_size}; tiny {tiny.val_size})",
    )
    g = parser.add_argument_group("how long, how fast")
    g.add_argument(
        "--epochs",
        type=at_least(1),
        metavar="N",
        help=f"default {PAPER.epochs}; tiny {tiny.epochs}",
    )
    g.add_argument(
        "--max-steps", type=at_least(1), metavar="N", help="optimizer steps, in place of --epochs"
    )
    g.add_argument(
        "--batch-size", type=at_least(1), metavar="N", help="records an optimizer step (default 16)"
    )
    g.add_argument(
        "--micro-batch-size",
        type=at_least(1),
        metavar="N",
        help="records in memory at once (default: the batch)",
    )
    g.add_argument(
        "--lr",
        type=positive,
        metavar="X",
        help=f"peak of AdamW's rate (default {PAPER.lr:g}; llama3-8b {CHECKPOINTS['llama3-8b'].lr:g}; tiny {tiny.lr:g}; "
        f"series, parallel {METHODS['series'].lr:g}; prefix {METHODS['prefix'].lr:g})",
    )
    g.add_argument(
        "--warmup",
        type=at_least(0),
        metavar="N",
        help=f"steps of linear warm-up (default {PAPER.warmup}; tiny {tiny.warmup})",
    )
    g.add_argument(
        "--seed",
        type=at_least(0),
        metavar="N",
        help="of initialisation, order and dropout (default 0)",
    )
    g.add_argument(
        "--device", metavar="NAME", help="cuda, cpu, mps (default: cuda if there is one)"
    )
    g.add_argument(
        "--dtype", choices=DTYPES, help="of the base model (default: bf16 on cuda, fp32 on cpu)"
    )
    g.add_argument(
        "--checkpoint-blocks",
        type=blocks,
        metavar="K",
        help="blocks recomputed in backward: all, none, a number, or "
        "auto, as few as memory allows (default)",
    )
    g.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="torch.compile each block: a minute at the start, then faster steps on a GPU",
    )
    g = parser.add_argument_group("where to")
    g.add_argument("--out", metavar="DIR", help="default: runs/<ckpt>-<method>-r<rank>-s<seed>")
    g.add_argument(
        "--overwrite",
        action="store_true",
        default=None,
        help="delete an existing run in that folder first",
    )
    g.add_argument(
        "--eval-every", type=at_least(1), metavar="N", help="steps between validations (default 80)"
    )
    g.add_argument(
        "--save-every",
        type=at_least(1),
        metavar="N",
        help="steps between checkpoints (default 800)",
    )
    g = parser.add_argument_group("instead of a new run")
    g.add_argument("--resume", metavar="RUN", help="go on from the newest intact checkpoint")
    g.add_argument(
        "--merge", metavar="RUN", help="write base + adapter as one plain checkpoint into --out"
    )
    g.add_argument(
        "--export-scale",
        choices=["plain"],
        help="with --merge: write the adapter alone, its scale as alpha/r (for tools "
        "that ignore use_rslora)",
    )
    g.add_argument(
        "--check",
        action="store_true",
        default=None,
        help="print the plan, memory and time of this run, and stop",
    )
    g.add_argument(
        "--trace",
        metavar="FILE",
        help="write one fixed batch's activations, loss and gradients, to compare with",
    )
    return parser


def resolve(args: argparse.Namespace) -> tuple[Settings, torch.device]:
    """Fill in what the flags left open: from the checkpoint's row, the method's row, then the protocol."""
    method = args.method or next(
        name for name, row in METHODS.items() if row.layer.scale == (args.scale or "sqrt")
    )
    named = METHODS[method]
    scaled = named.layer.scale is not None
    if args.scale and method != "dora" and args.scale != named.layer.scale:
        raise FlagError(
            f"--scale {args.scale} does not go with --method {method}"
            + (
                f"; --method {'lora' if args.scale == 'linear' else 'rora'} is that"
                if scaled
                else ""
            )
        )
    for flag in (
        ("alpha",) * (not scaled)
        + ("dropout",) * (method == "prefix")
        + ("targets",) * (method in ("prefix", "series"))
    ):
        if getattr(args, flag) is not None:
            raise FlagError(f"--{flag} has no effect with --method {method}")
    if args.epochs and args.max_steps:
        raise FlagError("--max-steps replaces --epochs: give one of them")
    ckpt = args.ckpt or "tiny"
    row, device = row_of(ckpt), find_device(args.device)
    given = lambda flag, default: default if getattr(args, flag) is None else getattr(args, flag)
    batch_size = given("batch_size", 16)
    settings = Settings(
        ckpt=ckpt,
        data=given("data", row.data),
        method=method,
        scale=(args.scale or named.layer.scale) if scaled else None,
        rank=given("rank", named.rank),
        alpha=given("alpha", row.alpha) if scaled else None,
        dropout=given("dropout", named.dropout or 0.0),
        targets=tuple(given("targets", named.layer.targets)),
        loss=given("loss", row.loss),
        prompt=given("prompt", "clean"),
        max_len=given("max_len", 256),
        epochs=given("epochs", row.epochs),
        max_steps=args.max_steps,
        batch_size=batch_size,
        lr=given("lr", named.lr or row.lr),
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


@contextmanager
def naming_memory(doing: str) -> Iterator[None]:
    """A lack of memory, which Python, a CPU and a GPU each report in their own way, becomes MemoryError(`doing`)."""
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


def exit_code(
    work: Callable[[], int],
    program: str,
    smaller: str = "a smaller --micro-batch-size, --checkpoint-blocks all, or a smaller --rank",
) -> int:
    """Run `work`; foreseeable failures become one line on stderr and the exit code that README lists.

    smaller: the flags that save memory.
    """

    def fail(code: int, message: object) -> int:
        line = " ".join(str(message).split())[:2000]
        line = "".join(
            c if c.isprintable() else "?" for c in line
        )  # a name from a file may hold anything, a terminal's colours included
        print(
            f"{program}{'' if processes.first() else f' (process {processes.rank()})'}: {line}",
            file=sys.stderr,
        )
        return code

    if torch.__version__ < (2, 6):
        return fail(
            1,
            f"torch {torch.__version__} is too old: before 2.6 a .bin file could run code in spite of weights_only=True "
            "(CVE-2025-32434); pip install -r requirements.txt",
        )
    try:
        with processes.joined(), naming_memory("while reading the model"):
            return work()
    except SystemExit as e:  # argparse, after --help
        return e.code if isinstance(e.code, int) else 0 if e.code is None else fail(2, e.code)
    except (FlagError, RunError) as e:
        return fail(2, e)
    except (DataError, CheckpointError) as e:
        return fail(3, e)
    except NonFiniteError as e:
        return fail(4, e)
    except NothingLearned as e:
        return fail(1, e)
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    except OutOfMemory as e:
        return fail(1, f"{e}; try {smaller}; what was saved before is intact")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, SafetensorError) as e:
        return fail(
            1,
            f"{e}; what was saved before is intact: mend that, then go on with --resume or the same command",
        )
