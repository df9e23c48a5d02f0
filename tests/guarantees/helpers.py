"""A small world on disk: a checkpoint in Hugging Face's format, a tokenizer, records, test sets.

And main(), called in this process, killed in another, or cut short at any instant.
"""

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for faults.py, which runs without pytest
import eval as judge
import rora
from data import format_prompt
from llama import Llama, LlamaConfig, save_llama
from plumbing import hf_files as checkpoints
from plumbing import jobs, peft_files, training
from plumbing import run_folder as runs

torch.set_num_threads(1)  # tensors this small are slower on two busy cores than on one

SUBJECTS = ("cats", "dogs", "fish", "birds", "trees", "stones", "rivers", "clouds")
VERBS = ("sing", "swim", "fly", "sleep", "fall", "grow")
CONFIG = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=320)


def make_records(n: int) -> list[dict]:
    records = []
    for i in range(n):
        answer = ("false", "true")[(i * i + i // 3) % 2]
        question = f"Can {SUBJECTS[i % 8]} {VERBS[i // 8 % 6]}{' well' * (i % 3)}?"
        records.append(
            {
                "instruction": f"{question}\n\nAnswer format: true/false",
                "input": "",
                "output": f"the correct answer is {answer}",
                "answer": answer,
            }
        )
    return records


def make_tokenizer(records: list[dict], vocab_size: int = 320) -> bytes:
    """A SentencePiece model as LLaMA's is made: BPE, byte fallback, nothing normalised."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([format_prompt(r) + r["output"] for r in records]),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


class World(NamedTuple):
    base: Path  # a Hugging Face folder
    data: Path  # records to train on
    tests: Path  # boolq.json and piqa/test.json


def make_world(folder: Path, n: int = 26) -> World:
    world = World(folder / "base", folder / "train.json", folder / "tests")
    records = make_records(n)
    (world.tests / "piqa").mkdir(parents=True)
    world.data.write_text(json.dumps(records))
    (world.tests / "boolq.json").write_text(json.dumps(make_records(11)))
    piqa = [
        r
        | {
            "instruction": r["instruction"][:-10] + "solution1/solution2",
            "answer": f"solution{1 + i % 2}",
        }
        for i, r in enumerate(make_records(5))
    ]
    (world.tests / "piqa" / "test.json").write_text(json.dumps(piqa))
    torch.manual_seed(1)
    save_llama(Llama(CONFIG), world.base)
    (world.base / "tokenizer.model").write_bytes(make_tokenizer(records))
    return world


def flags(world: World, out: Path | str, **changed) -> list[str]:
    """A command line for rora.main: 12 steps in 2 epochs, with dropout, micro-batches, validation
    and three saves. `changed`: other values, None to leave a flag out."""
    settings = {
        "ckpt": world.base,
        "data": world.data,
        "out": out,
        "rank": 4,
        "alpha": 8,
        "dropout": 0.1,
        "epochs": 2,
        "batch_size": 4,
        "micro_batch_size": 3,
        "lr": 1e-2,
        "warmup": 2,
        "val_size": 4,
        "eval_every": 3,
        "save_every": 5,
        "device": "cpu",
    } | changed
    return [
        str(word)
        for key, value in settings.items()
        if value is not None
        for word in (f"--{key.replace('_', '-')}", *(value if isinstance(value, list) else [value]))
    ]


class Result(NamedTuple):
    code: int
    out: str
    err: str


@contextlib.contextmanager
def caught(fd: int):
    """What is written to a file descriptor, by Python or by a library below it."""
    stream = {1: sys.stdout, 2: sys.stderr}[fd]
    stream.flush()
    with tempfile.TemporaryFile() as file:
        saved = os.dup(fd)
        os.dup2(file.fileno(), fd)
        text: list[str] = []
        redirect = contextlib.redirect_stdout if fd == 1 else contextlib.redirect_stderr
        try:
            with redirect(
                open(fd, "w", encoding="utf-8", closefd=False, errors="backslashreplace")
            ) as mine:
                yield text
                mine.flush()
        finally:
            os.dup2(saved, fd)
            os.close(saved)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def run(*argv, program=rora) -> Result:
    """program.main(argv) in this process, with all it says."""
    with caught(1) as out, caught(2) as err:
        code = program.main([str(word) for word in argv])
    return Result(code, out[0], err[0])


def score(*argv) -> Result:
    return run(*argv, program=judge)


def refused(result: Result, code: int, *said: str) -> None:
    """A clean refusal: the right exit code, one line on stderr that says these things."""
    lines = result.err.splitlines()
    assert result.code == code and len(lines) == 1, result
    for text in said:
        assert text in lines[0], f"{text!r} is not in {lines[0]!r}"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to show that nothing was written."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def rows(run_folder: Path) -> list[dict]:
    """metrics.jsonl without what differs from run to run: wall-clock time and memory."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("tok_per_s", "mem_gb", "seconds")}
        for line in lines
    ]


def outcome(run_folder: Path) -> dict:
    """All that two equal runs share, byte for byte: adapters, optimizer, random numbers, position,
    metrics, facts."""
    last = runs.checkpoints(run_folder)[0]
    run_json, state = (
        json.loads(path.read_text()) for path in (run_folder / "run.json", last / "state.json")
    )
    files = [
        run_folder / "adapter_model.safetensors",
        last / "adapter_model.safetensors",
        last / "optimizer.safetensors",
    ]
    return {
        "best, last, optimizer": [file.read_bytes() for file in files],
        "step": last.name,
        "metrics": rows(run_folder),
        "run.json": run_json | {"seconds": None, "commit": None, "changed": None},
        "state": state | {"seconds": None},
    }


# --- faults ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def at_step(step: int, act):
    """Call act() once, when the metrics row of this step has just been written."""
    write = runs.Metrics.write

    def watched(self, **row):
        write(self, **row)
        if row["step"] == step and "loss" in row:
            act()

    runs.Metrics.write = watched
    try:
        yield
    finally:
        runs.Metrics.write = write


def interrupt(step: int, *argv, with_signal: int = signal.SIGINT) -> Result:
    """run(), with a signal sent during this step."""
    with at_step(step, lambda: signal.raise_signal(with_signal)):
        return run(*argv)


@contextlib.contextmanager
def watched_disk(on):
    """Call on(operation, path) at every instant at which a run can be cut short: before each change
    of the file system, and when a write is half done ("torn"). `on` may raise, or kill the process.
    """

    def before(owner, name, path_of, writes=False):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            path = path_of(*args)
            on(name, path)
            result = original(*args, **kwargs)
            if writes:
                whole = Path(path).read_bytes()
                Path(path).write_bytes(whole[: len(whole) - max(1, min(40, len(whole) // 2))])
                on("torn", path)
                Path(path).write_bytes(whole)
            return result

        setattr(owner, name, watched)
        stack.callback(setattr, owner, name, original)

    with contextlib.ExitStack() as stack:
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            before(os, name, lambda path, *_: path)
        before(
            os,
            "fsync",
            lambda fd: os.readlink(f"/proc/self/fd/{fd}") if os.path.isdir("/proc/self/fd") else fd,
        )
        before(Path, "write_text", lambda path, *_: path, writes=True)
        before(runs.Metrics, "write", lambda metrics, **row: metrics.file.name, writes=True)
        for module in (checkpoints, peft_files, jobs, training):
            before(module, "save_file", lambda tensors, path, *_: path, writes=True)
        yield


def instants(*argv) -> list[tuple[str, str]]:
    """Every (operation, path) of a run, in order."""
    log: list[tuple[str, str]] = []
    with watched_disk(lambda operation, path: log.append((operation, str(path)))):
        assert run(*argv).code == 0
    return log


def in_child(work) -> int:
    """Run work() in a forked process that may die of it.

    Returns its exit code, or minus the signal that ended it.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work())
        finally:  # an exception must not bring a second pytest to life
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(n: int, *argv) -> int:
    """A real process that runs main(argv) and gets SIGKILL at the n-th instant."""

    def on(operation, path, count=[n]):  # noqa: B006, a counter
        count[0] -= 1
        if count[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        with watched_disk(on):
            return run(*argv).code

    return in_child(work)


def go_on(folder: Path, *argv) -> Result:
    """What a user does after a crash: --resume; where there is no checkpoint yet, the same command
    with --overwrite."""
    result = run("--resume", folder)
    if result.code == 2 and not runs.checkpoints(folder):
        result = run(*argv, "--overwrite")
    return result
