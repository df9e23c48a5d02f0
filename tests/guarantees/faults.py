"""Break everything that can break, on purpose, and count what survived.

    python tests/guarantees/faults.py [instants] [kills] [fuzz]

instants   one run, cut short by SIGKILL at every change it makes to the file system, then by a
           full disk at every one; resumed, and compared with a run that was left alone
kills      a real `python rora.py`, killed at random times and resumed until it is done; compared
fuzz       mutated configs, weights, indexes, pickles, tokenizers, records, adapters, run folders
           and flags, through main(argv): each must end with a known exit code, at most one line of
           complaint, and, when refused, nothing written

Prints a Markdown table; exits with 1 if a run did not survive a fault. Seeded: the same inputs at
every run.
"""

import errno
import functools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from helpers import (
    ROOT,
    World,
    flags,
    go_on,
    instants,
    interrupt,
    killed,
    make_records,
    make_tokenizer,
    make_world,
    outcome,
    run,
    runs,
    score,
    tree,
    watched_disk,
)
from safetensors.torch import load_file

from plumbing import hf_files as checkpoints

SHORT = {"max_steps": 3, "epochs": None, "save_every": 1, "eval_every": 2}


# --- every instant of a run -----------------------------------------------------------------------


def every_instant(folder: Path):
    """Yields (fault, what went wrong or None)."""
    world = make_world(folder / "world", 14)
    command = lambda out: flags(world, out, **SHORT)
    old, whole = folder / "old", folder / "whole"
    run(*command(old), "--seed", 9)
    assert run(*command(whole)).code == 0
    wanted = outcome(whole)
    log = instants(*command(shutil.copytree(old, folder / "log")), "--overwrite")
    for n, (operation, path) in enumerate(log):
        case = shutil.copytree(old, folder / "case")
        killed(n, *command(case), "--overwrite")
        problem = None
        run_json = json.loads((case / "run.json").read_text())
        if run_json["settings"]["seed"] == 0:  # the old run is gone, the new one has begun
            if any(map(runs.damage, runs.checkpoints(case))):
                problem = "a listed checkpoint is damaged"
            result = go_on(case, *command(case))
            if result.code or outcome(case) != wanted:
                problem = f"resumed differently: {result}"
        elif run(*command(case), "--overwrite").code or outcome(case) != wanted:
            problem = "cannot be overwritten any more"
        yield (
            "SIGKILL at every write, sync, rename and deletion of a run",
            problem and f"{operation} {path}: {problem}",
        )
        shutil.rmtree(case)

    for n, (operation, path) in enumerate(instants(*command(folder / "log2"))):
        if operation in ("unlink", "rmdir"):
            continue
        case, left = folder / "case", [n]

        def full(operation, path, left=left):
            left[0] -= 1
            if left[0] < 0 and operation not in ("unlink", "rmdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        with watched_disk(full):
            stopped = run(*command(case))
        problem = complaint(stopped)
        if stopped.code != 1 or any(map(runs.damage, runs.checkpoints(case))):
            problem = problem or f"exit {stopped.code}, or a damaged checkpoint"
        result = (
            run(*command(case)) if not (case / "run.json").exists() else go_on(case, *command(case))
        )
        if result.code or outcome(case) != wanted:
            problem = problem or f"resumed differently: {result}"
        yield (
            "disk full at every write, sync, rename and new folder of a run",
            problem and f"{operation} {path}: {problem}",
        )
        shutil.rmtree(case)


# --- a real process -------------------------------------------------------------------------------


def real_kills(folder: Path, kills: int = 21, seed: int = 1):
    """`kills` real processes, killed wherever they are, then one that may finish.

    Yields (fault, what went wrong or None).
    """
    rng = random.Random(seed)
    world = make_world(folder / "world", 26)
    settings = {"max_steps": 400, "epochs": None, "save_every": 2, "eval_every": 7}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    start = lambda *argv: subprocess.Popen(
        [sys.executable, str(ROOT / argv[0]), *map(str, argv[1:])],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    whole, cut = folder / "whole", folder / "cut"
    alone = start("rora.py", *flags(world, whole, **settings))
    said = alone.communicate(timeout=300)[0]
    assert alone.returncode == 0, said
    fault = "SIGKILL of a real process at a random time, then --resume"
    argv, seen, metrics = flags(world, cut, **settings), 0, cut / "metrics.jsonl"
    for _ in range(kills):
        process = start("rora.py", *argv)
        size = metrics.stat().st_size if metrics.exists() else 0
        deadline = time.monotonic() + 60
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and (metrics.stat().st_size if metrics.exists() else 0) <= size
        ):
            time.sleep(
                0.002
            )  # until it has begun to train; one kill in six comes earlier than that
            if rng.random() < 1 / 6 / 500:
                break
        time.sleep(rng.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0]
        listed = runs.checkpoints(cut)
        problem = None
        if process.returncode != -signal.SIGKILL:
            problem = f"ended by itself with {process.returncode}: {said[-300:]}"
        elif any(map(runs.damage, listed)):
            problem = f"a listed checkpoint is damaged: {list(map(runs.damage, listed))}"
        elif listed and int(listed[0].name[5:]) < seen:
            problem = (
                f"the newest checkpoint is {listed[0].name}, before the kill there was step {seen}"
            )
        elif any(
            int(line.rsplit("-", 1)[1]) > int(listed[0].name[5:])
            for line in said.splitlines()
            if line.startswith("saved")
        ):
            problem = "a checkpoint that was said to be saved is not there"
        seen = int(listed[0].name[5:]) if listed else 0
        argv = ["--resume", cut] if listed else [*flags(world, cut, **settings), "--overwrite"]
        yield fault, problem
        if process.returncode == 0:
            break
    for number, code in [(signal.SIGTERM, 143), (signal.SIGINT, 130)]:
        size = metrics.stat().st_size
        process = start("rora.py", *argv)
        while process.poll() is None and metrics.stat().st_size <= size:
            time.sleep(0.002)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
        polite = (
            process.returncode == code
            and f"--resume {cut}" in said
            and not any(map(runs.damage, runs.checkpoints(cut)))
        )
        yield (
            "SIGTERM and SIGINT to a real process",
            None if polite else f"exit {process.returncode}: {said[-300:]}",
        )
    process = start("rora.py", *argv)
    said = process.communicate(timeout=300)[0]
    equal = process.returncode == 0 and outcome(cut) == outcome(whole)
    yield (
        "the survivor's adapter, optimizer and metrics against a run left alone, bit for bit",
        None if equal else f"differ: {said[-300:]}",
    )

    scoring = lambda out: ["eval.py", whole, "--data", world.tests, "--batch-size", 1, "--out", out]
    out = folder / "cut-scores"
    for questions in (1, 4, 9):
        process = start(*scoring(out))
        while (
            process.poll() is None
            and sum(len(file.read_bytes().splitlines()) for file in out.glob("*.jsonl")) < questions
        ):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        yield (
            "SIGKILL of a real scoring at a random time",
            None if process.returncode == -signal.SIGKILL else "ended by itself",
        )
    ended = [start(*scoring(o)).communicate(timeout=300) for o in (out, folder / "whole-scores")]
    equal = tree(out) == tree(folder / "whole-scores")
    yield (
        "its answers and scores against a scoring left alone, byte for byte",
        None if equal else f"differ: {ended}",
    )


# --- mutated input --------------------------------------------------------------------------------

ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    0.5,
    -0.0,
    1e-300,
    1e300,
    10**30,
    2**31,
    2**63,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    " ",
    "x",
    "../x",
    "/etc/passwd",
    "\ud800",
    "\x1b[31m",
    "a\0b",
    "a\nb",
    "ü" * 300,
    "q_proj",
    "sqrt",
    "linear",
    [],
    {},
    [[]],
    {"a": 1},
    ["q_proj"],
    [None],
]


def odd_bytes(rng: random.Random, content: bytes, focus: int = 4000) -> bytes:
    """A file as a bad disk, an editor or an aborted download leaves it.

    focus: how many of the first bytes, where the headers are, may be changed.
    """
    where = lambda: rng.randrange(max(1, min(len(content), focus)))
    kind = rng.randrange(9)
    if kind == 0:
        return content[: where()]
    if kind == 1:
        return b""
    if kind == 2:
        return rng.randbytes(rng.choice([1, 8, 9, 100, 5000]))
    if kind == 3:
        return rng.choice([b"\xef\xbb\xbf", b"\0", b"\xff", b"\n", rng.randbytes(8)]) + content
    if kind == 4:
        a = where()
        return content[:a] + content[a + rng.randrange(1, 40) :]
    if kind == 5:
        a = where()
        return content[:a] + rng.randbytes(rng.randrange(1, 40)) + content[a:]
    if kind == 6:
        return (
            rng.choice(
                [0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1, len(content), len(content) + 8]
            ).to_bytes(8, "little")
            + content[8:]
        )
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 20])):
        a = where()
        content[a : a + 1] = (
            rng.randbytes(1)
            if kind == 7
            else bytes([content[a] ^ 1 << rng.randrange(8)])
            if content
            else b""
        )
    return bytes(content)


def odd_json(rng: random.Random, content: bytes) -> bytes:
    """Still JSON, mostly: one value anywhere in it replaced, removed, or put under another key."""
    value = json.loads(content)
    if rng.random() < 0.1:
        return rng.choice(
            [
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"null",
                b"[]",
                b"{}",
                b"1",
                b'"x"',
                content[:-3],
                b"\xef\xbb\xbf" + content,
                content.replace(b"\n", b"\r\n"),
                b"9" * 5000,
                content + content,
            ]
        )
    place = value
    while isinstance(place, (dict, list)) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = rng.choice(keys)
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.15:
            if rng.random() < 0.2:
                del place[key]
            elif isinstance(place, dict) and rng.random() < 0.15:
                place[
                    rng.choice(
                        ["x", "", "\ud800", key + "_", "rope_scaling", "use_dora", "rank_pattern"]
                    )
                ] = rng.choice(ODD)
            else:
                place[key] = rng.choice(ODD)
            break
        place = place[key]
    return json.dumps(value).encode(errors="surrogatepass")


def odd_header(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file whose header says something else, with the length that goes with it."""
    length = int.from_bytes(content[:8], "little")
    header = odd_json(rng, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


class Evil:
    """What a pickle can do: this one would leave a file behind."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def odd_pickle(rng: random.Random, content: bytes) -> bytes:
    return rng.choice(
        [
            pickle.dumps(Evil()),
            pickle.dumps({"model.norm.weight": Evil()}),
            pickle.dumps([1]),
            pickle.dumps({"a": 1}),
            odd_bytes(rng, content),
            odd_bytes(rng, content),
        ]
    )


def odd_flags(rng: random.Random) -> list[str]:
    """One or two flags with values that are wrong, or unusual and right; no run of days."""
    names = [
        "--ckpt",
        "--data",
        "--method",
        "--scale",
        "--rank",
        "--alpha",
        "--dropout",
        "--targets",
        "--loss",
        "--prompt",
        "--max-len",
        "--val-size",
        "--max-steps",
        "--batch-size",
        "--micro-batch-size",
        "--lr",
        "--warmup",
        "--seed",
        "--device",
        "--dtype",
        "--checkpoint-blocks",
        "--eval-every",
        "--save-every",
        "--resume",
        "--merge",
        "--export-scale",
        "--trace",
        "--out",
        "--epochs",
        "--nonsense",
        "--ra",
        "--overwrite",
    ]
    values = [
        "-1",
        "0",
        "1",
        "2",
        "0.5",
        "1.0",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e-400",
        "9" * 30,
        "9" * 5000,
        str(2**63),
        "",
        " ",
        "x",
        "../x",
        "base",
        "train.json",
        "tests",
        "lora",
        "dora",
        "prefix",
        "series",
        "sqrt",
        "linear",
        "q_proj",
        "self_attn",
        "lm_head",
        "cuda",
        "meta",
        "cpu:9",
        "fp32",
        "bf16",
        "all",
        "none",
        "plain",
        "answer",
        "١",
        "1_0",
        "a\0b",
        "\ud800",
        "x" * 300,
    ]
    words = []
    for _ in range(rng.choice([1, 1, 2])):
        words += [rng.choice(names), rng.choice(values)]
    return words


def whole_world(folder: Path, inside: World, small: dict) -> None:
    """A base in three layouts, records, questions, a run cut short, two adapters and scores."""
    world = make_world(folder, 14)
    shutil.copytree(world.base, folder / "shards")
    (folder / "shards" / "model.safetensors").unlink()
    state = load_file(world.base / "model.safetensors")
    ours = {name.removeprefix("model."): t for name, t in state.items()}
    checkpoints.write_tensors(folder / "shards", ours, shard_bytes=60_000)
    shutil.copytree(folder / "shards", folder / "bin")
    for file in (folder / "bin").glob("model*"):
        file.unlink()
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    os.chdir(folder)
    assert interrupt(3, *flags(inside, "half", **SHORT | {"max_steps": 4})).code == 130
    prefix = small | {"dropout": None, "alpha": None, "method": "prefix"}
    for out, how in [
        ("done", small),
        ("dora", small | {"method": "dora", "scale": "sqrt"}),
        ("prefix", prefix),
    ]:
        assert run(*flags(inside, out, **how)).code == 0
    assert score("done", "--data", "tests").code == 0


def fuzz(folder: Path, count: int, seed: int = 0):
    """Yields (kind of fault, what went wrong or None), `count` times."""
    template, here, cwd = folder / "template", folder / "case", os.getcwd()
    inside = World(Path("base"), Path("train.json"), Path("tests"))
    small = {**SHORT, "max_steps": 2, "device": "cpu"}
    try:
        whole_world(here, inside, small)  # where the cases will lie: their run.json says so
    finally:
        os.chdir(cwd)
    here.rename(template)

    train = lambda base="base": (run, flags(inside, "out", **small | {"ckpt": base}))
    judge = lambda what: (score, [what, "--data", "tests", "--limit", "2"])
    step = "half/checkpoints/step-000003"
    kinds = [  # (fault, file, mutation, command)
        ("config.json", "base/config.json", odd_json, train()),
        ("config.json, bytes", "base/config.json", odd_bytes, train()),
        ("safetensors header", "base/model.safetensors", odd_header, train()),
        ("safetensors, bytes", "base/model.safetensors", odd_bytes, train()),
        ("shard index", "shards/model.safetensors.index.json", odd_json, train("shards")),
        ("shard", "shards/model-00002-of-00003.safetensors", odd_bytes, train("shards")),
        ("pytorch_model.bin", "bin/pytorch_model.bin", odd_pickle, train("bin")),
        ("tokenizer.model", "base/tokenizer.model", odd_bytes, train()),
        (
            "tokenizer of another size",
            "base/tokenizer.model",
            lambda rng, _: tokenizer_of_size(rng.choice([300, 310, 330, 500])),
            train(),
        ),
        ("training records", "train.json", odd_json, train()),
        (
            "training records, bytes",
            "train.json",
            lambda rng, content: odd_bytes(rng, content, 10**9),
            train(),
        ),
        ("test questions", "tests/boolq.json", odd_json, judge("done")),
        ("test questions, bytes", "tests/piqa/test.json", odd_bytes, judge("done")),
        ("adapter_config.json", "done/adapter_config.json", odd_json, judge("done")),
        (
            "adapter_config.json of another method",
            "prefix/adapter_config.json",
            odd_json,
            judge("prefix"),
        ),
        ("adapter tensors", "done/adapter_model.safetensors", odd_bytes, judge("done")),
        ("adapter header", "dora/adapter_model.safetensors", odd_header, judge("dora")),
        (
            "adapter to merge",
            "dora/adapter_model.safetensors",
            odd_bytes,
            (run, ["--merge", "dora", "--out", "out"]),
        ),
        ("run.json, resumed", "half/run.json", odd_json, (run, ["--resume", "half"])),
        ("run.json, scored", "done/run.json", odd_json, judge("done")),
        ("metrics.jsonl", "half/metrics.jsonl", odd_bytes, (run, ["--resume", "half"])),
        (
            "checkpoint: optimizer",
            f"{step}/optimizer.safetensors",
            odd_bytes,
            (run, ["--resume", "half"]),
        ),
        (
            "checkpoint: adapter",
            f"{step}/adapter_model.safetensors",
            odd_bytes,
            (run, ["--resume", "half"]),
        ),
        ("checkpoint: state", f"{step}/state.json", odd_json, (run, ["--resume", "half"])),
        ("checkpoint: manifest", f"{step}/MANIFEST.json", odd_json, (run, ["--resume", "half"])),
        ("checkpoint: manifest, scored", f"{step}/MANIFEST.json", odd_bytes, judge(step)),
        ("answers", "done/eval/boolq.jsonl", odd_bytes, judge("done")),
        ("scores", "done/eval/results.json", odd_json, (score, ["--table", "done"])),
        ("scoring settings", "done/eval/settings.json", odd_json, judge("done")),
        ("flags", None, None, None),
        ("flags of eval.py", None, None, None),
    ]
    signal.signal(signal.SIGALRM, took_a_minute)
    rng = random.Random(seed)
    for i in range(count):
        fault, file, mutate, command = kinds[i % len(kinds)]
        here.mkdir()
        used = {"base", "train.json", "tests", "done", Path(file or "done").parts[0]}
        for name in used:
            copy = shutil.copytree if (template / name).is_dir() else shutil.copy
            copy(template / name, here / name)
        os.chdir(here)
        signal.alarm(60)
        try:
            if file:
                Path(file).write_bytes(mutate(rng, Path(file).read_bytes()))
            elif fault == "flags":
                command = run, [*flags(inside, "out", **small), *odd_flags(rng)]
            else:
                words = odd_flags(rng)
                what = rng.choice([["done"], ["--ckpt", "base"], []])
                command = score, [*what, "--data", "tests", "--limit", "3", *words]
            problem = what_went_wrong(command, here)
        except Exception:
            problem = "escaped: " + traceback.format_exc().strip().replace("\n", " | ")[-700:]
        finally:
            signal.alarm(0)
            os.chdir(cwd)
        yield fault, problem and f"input {i} of seed {seed} ({command[1][-2:]}): {problem}"
        shutil.rmtree(here)


def what_went_wrong(command: tuple, here: Path) -> str | None:
    """Run (program, arguments) on what lies here."""
    before = tree(here)
    result = command[0](*command[1])
    if Path("executed").exists():
        return "a pickle was executed"
    changed = {name for name, _ in tree(here).items() ^ before.items() if name[-5:] != ".lock"}
    if problem := complaint(result):
        return problem
    if changed and result.code in (2, 3):
        return f"refused, but wrote {sorted(changed)}"
    return None


def took_a_minute(*_) -> None:
    raise TimeoutError("a minute")


@functools.cache
def tokenizer_of_size(size: int) -> bytes:
    return make_tokenizer(
        [r | {"instruction": f"{i} {i * i} {i**3}"} for i, r in enumerate(make_records(200))], size
    )


def complaint(result) -> str | None:
    """What is not clean about how a program ended."""
    lines = [line for line in result.err.splitlines() if not line.startswith("note: ")]
    if result.code not in (0, 1, 2, 3, 4):  # no signal was sent
        return f"exit code {result.code}"
    one = len(lines) == 1 and lines[0].startswith(("rora: ", "eval: ")) and len(lines[0]) < 2100
    if lines and not result.code or result.code and not one:
        return f"exit {result.code} with {len(lines)} lines on stderr: {result.err[:500]!r}"
    return None


def main(parts: list[str]) -> int:
    jobs = {
        "instants": every_instant,
        "kills": real_kills,
        "fuzz": lambda folder: fuzz(folder, 1054),
    }
    counts: dict[str, list[int]] = {}
    began = time.monotonic()
    for part in parts or jobs:
        with tempfile.TemporaryDirectory() as folder:
            for fault, problem in jobs[part](Path(folder).resolve()):
                row = counts.setdefault(f"{part}: {fault}", [0, 0])
                row[0] += 1
                row[1] += problem is None
                if problem:
                    print(f"FAULT {fault}: {problem}", file=sys.stderr)
    total = [sum(column) for column in zip(*counts.values())]
    print("| fault | injected | survived |\n|---|--:|--:|")
    for fault, (injected, survived) in [*counts.items(), ("**total**", total)]:
        print(f"| {fault} | {injected:,} | {survived:,} |")
    print(f"\n{time.monotonic() - began:.0f} s, torch {torch.__version__}")
    return int(total[0] != total[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
