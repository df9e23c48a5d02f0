"""Fig. 1's experiment on the embedded default: method x rank x lr x seed, one line of results a run.

    python lessons/sweep.py fig1     lora, dora, rora at five ranks, seeds 0 1 2, the default lr; test, val and strict questions
    python lessons/sweep.py grid     the same at every lr of a grid, seed 0; test and val questions
    python lessons/sweep.py best     at the two best lrs of that grid by val, over all ranks and at each, a method's: seeds 0 1 2
    python lessons/sweep.py row      the tiny row of flags.py, and with its alpha, warm-up or epochs changed: RoRA, seeds 0 1; val
                                     questions alone. Rank and lr are chosen from the grid's val column
    python lessons/sweep.py ... --dry-run     the list, what is done, how long the rest would take

A run is `rora.py` and then `eval.py` as they are, called in one process: torch is imported once. Two run side by side, a thread
each. Stopped or failed, the same command goes on: what the results file holds is not run again, and a line counts only for the
checkpoint, questions and settings it was made with. Run folders lie under runs/lessons/ and go once their line is written.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median

from rows import (
    METHODS,
    ROOT,
    SPLITS,
    SWEEP,
    accuracy,
    append,
    at_edge,
    checkpoint_digest,
    condition,
    grid,
    key,
    line,
    questions_digest,
    ranking,
    read,
)

sys.path.insert(0, str(ROOT))
import torch

import eval as judge
import rora
from plumbing import run_folder as runs
from data import PAPER_TASKS
from plumbing.flags import (
    CHECKPOINTS,
    MAY_CHANGE,
    Checkpoint,
    FlagError,
    default_lr,
    exit_code,
    find_checkpoint,
    resolve,
    training_parser,
)

LRS = [
    5e-4,
    1e-3,
    2e-3,
    5e-3,
    1e-2,
]  # about three a decade; rows.at_edge tells where they do not reach
ROW = [
    {},
    {"alpha": 4, "lr": 8e-3},
    {"alpha": 64, "lr": 5e-4},
    {"warmup": 30},
    {"epochs": 1},
]  # alpha with an lr of the same lr · s
GUESS = 90  # seconds a run, until one has been timed


def rank_axis(width: int) -> list[int]:
    """Five ranks in about equal ratios from 4 to the width. The inner ones are powers of two, as the paper's are; the last is
    the width itself, where the update of a square matrix is no longer low-rank at all."""
    inner = [2 ** round(math.log2(4) + i * math.log2(width / 4) / 4) for i in (1, 2, 3)]
    return sorted({4, *inner, width})


def world(ckpt: str) -> tuple[Checkpoint, dict[str, Path]]:
    """A checkpoint's recipe and its questions, {split: folder}. What flags.py has no row for is another model of tiny's world."""
    recipe = CHECKPOINTS.get(Path(ckpt).name, CHECKPOINTS["tiny"])
    homes = (
        {split: ROOT / "tiny" / home for split, home in SPLITS.items()}
        if recipe is CHECKPOINTS["tiny"]
        else {"test": Path(recipe.tests)}
    )
    for home in homes.values():
        if missing := [task for task in PAPER_TASKS if not (home / task / "test.json").is_file()]:
            raise FlagError(f"no {home / missing[0] / 'test.json'}: run ./weights_download.sh data")
    return recipe, homes


# --- one run ---------------------------------------------------------------------------------------


def planned(
    args: argparse.Namespace,
    files: dict[str, str],
    splits: list[str],
    method: str,
    rank: int,
    lr: float,
    seed: int,
    **other: float,
) -> dict:
    """A run to be: rora.py's flags, what identifies it, and which questions to ask. files: the digests of what it reads."""
    other = ({"alpha": args.alpha} if args.alpha else {}) | other
    recipe = replace(world(args.ckpt)[0], **other)
    flags = [
        "--ckpt",
        args.ckpt,
        "--data",
        recipe.data,
        "--method",
        method,
        "--rank",
        rank,
        "--lr",
        lr,
        "--seed",
        seed,
        "--alpha",
        recipe.alpha,
        "--warmup",
        recipe.warmup,
        "--val-size",
        recipe.val_size,
        "--loss",
        recipe.loss,
        "--dtype",
        recipe.cuda_dtype,
        *(["--max-steps", args.max_steps] if args.max_steps else ["--epochs", recipe.epochs]),
    ]
    flags = [str(f) for f in flags]
    s = asdict(resolve(training_parser().parse_args(flags))[0])
    settings = {k: v for k, v in s.items() if k not in MAY_CHANGE | {"ckpt", "data", "save_every"}}
    name = f"{method}-r{rank}-lr{lr:g}-s{seed}" + "".join(
        f"-{setting}{value:g}" for setting, value in other.items()
    )
    return {
        "name": name,
        "ckpt": args.ckpt,
        **files,
        "limit": args.limit,
        "settings": settings | {"targets": list(settings["targets"])},
        "splits": splits,
        "flags": flags,
    }


def run_one(job: dict, out: Path) -> int:
    """Train and score. Writes the results line beside the run folder; returns the exit code of what failed, or 0."""
    began = time.perf_counter()
    code = rora.main([*job["flags"], "--out", str(out), "--overwrite"])
    trained = time.perf_counter()
    if code not in (0, 4):
        return code
    row = {k: job[k] for k in ("ckpt", "checkpoint", "questions", "limit", "settings")}
    homes, dtype = world(job["ckpt"])[1], ["--dtype", job["settings"]["dtype"]]
    for split in job["splits"] if code == 0 else ():
        limit = ["--limit", str(job["limit"])] if job["limit"] else []
        if code := judge.main(
            [
                str(out),
                "--data",
                str(homes[split]),
                "--out",
                str(out / f"eval-{split}"),
                *dtype,
                *limit,
            ]
        ):
            return code
        results = json.loads((out / f"eval-{split}" / "results.json").read_text())
        tasks = results["tasks"]
        row[split] = {
            "mean": round(results["mean"], 4),
            "n": sum(t["n"] for t in tasks.values()),
            "unanswered": sum(t["unanswered"] for t in tasks.values()),
            "tasks": {name: round(t["accuracy"], 4) for name, t in tasks.items()},
        }
    record = json.loads((out / "run.json").read_text())
    steps = [
        m
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if "loss" in (m := json.loads(line))
    ]
    every, curve = thinned([m["loss"] for m in steps])
    cuda = record["device"].startswith("cuda")
    row |= {
        "diverged": code == 4,
        "scale": record["effective_scale"],
        "val_loss": record.get("best_loss"),
        "trainable": record["trainable"],
        "tokens": sum(m["tokens"] for m in steps),
        "seconds": round(trained - began, 1),
        "score_seconds": round(time.perf_counter() - trained, 1),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": record["packages"]["torch"],
        "commit": record["commit"],
        "loss_every": every,
        "loss": curve,
    }
    if (now := checkpoint_digest(find_checkpoint(job["ckpt"]))) != job["checkpoint"]:
        print(
            f"{job['ckpt']} was replaced during the run ({job['checkpoint']} to {now}); run it again",
            file=sys.stderr,
        )
        return 3
    runs.write_json(out.with_name(out.name + ".row"), row)
    return 0


def thinned(values: list[float], most: int = 150) -> tuple[int, list[float]]:
    """(k, means of k values each), at most `most` of them."""
    k = max(1, math.ceil(len(values) / most))
    return k, [round(mean(values[i : i + k]), 4) for i in range(0, len(values), k)]


# --- many runs -------------------------------------------------------------------------------------


def plan(args: argparse.Namespace, rows: list[dict]) -> list[dict]:
    """Every run of the mode, seeds outermost: an early stop leaves whole curves."""
    folder, (recipe, homes) = find_checkpoint(args.ckpt), world(args.ckpt)
    if args.mode != "fig1" and "val" not in homes:
        raise FlagError(
            f"{args.mode} chooses by validation questions, which tiny's world alone has; for {args.ckpt} there is fig1"
        )
    files, lr = (
        {"checkpoint": checkpoint_digest(folder), "questions": questions_digest(homes.values())},
        default_lr("rora", recipe),
    )
    if args.mode == "row":
        row = {"rank": rora.METHODS["rora"].rank, "lr": lr}
        return [
            planned(args, files, ["val"], "rora", seed=seed, **row | change)
            for change in ROW
            for seed in args.seeds or [0, 1]
        ]
    ranks = args.ranks or rank_axis(json.loads((folder / "config.json").read_text())["hidden_size"])
    splits = list(homes) if args.mode == "fig1" else ["test", "val"]
    seeds = args.seeds or ([0] if args.mode == "grid" else [0, 1, 2])
    rows = [
        r
        for r in rows
        if condition(r) == condition(planned(args, files, splits, "lora", ranks[0], lr, 0))
    ]
    given = args.lrs or (LRS if args.mode == "grid" else [lr])
    lrs = lambda m, rank: (
        sorted({*ranking(rows, m)[:2], *ranking(rows, m, rank)[:2]})
        if args.mode == "best"
        else given
    )
    for m, rank in ((m, rank) for m in args.methods for rank in ranks if args.mode == "best"):
        if missing := set(args.lrs or LRS) - set(grid(rows, m, rank)):
            raise SystemExit(
                f"the grid of {m} at rank {rank} has no lr {min(missing):g} yet: python lessons/sweep.py grid"
            )
    jobs = [
        (m, rank, lr, seed)
        for seed in seeds
        for rank in ranks
        for m in args.methods
        for lr in lrs(m, rank)
    ]
    return [planned(args, files, splits, *job) for job in jobs]


def pending(jobs: list[dict], rows: list[dict]) -> list[dict]:
    """What the results do not hold yet, or not with all the questions asked."""
    done = {key(r): r for r in rows}
    return [
        j
        for j in jobs
        if not (
            (r := done.get(key(j)))
            and (r["diverged"] or all(r.get(split) for split in j["splits"]))
        )
    ]


def seconds(job: dict, rows: list[dict]) -> float:
    """As runs of this method took on this checkpoint, or of any method."""
    alike = [r for r in rows if condition(r) == condition(job)]
    same = [
        r for r in alike if all(r["settings"][k] == job["settings"][k] for k in ("method", "rank"))
    ] or alike
    return median(r["seconds"] + r["score_seconds"] for r in same) if same else GUESS


def work(todo: list[dict], jobs: int, results: Path, keep: bool) -> int:
    """Run what is to do, `jobs` at a time, a process each. Returns the exit code."""
    folder, running, failed, total = ROOT / "runs" / "lessons" / results.stem, {}, 0, len(todo)
    todo, began, ended = list(todo), time.perf_counter(), 0
    with runs.lock(folder), runs.stop_signals() as stop:
        while (todo or running) and not stop:
            while todo and len(running) < jobs:
                job = todo.pop(0)
                with (folder / f"{job['name']}.log").open("w") as log:
                    process = subprocess.Popen(
                        [sys.executable, __file__, "one", json.dumps(job), folder / job["name"]],
                        stdout=log,
                        stderr=log,
                        env=os.environ | {"OMP_NUM_THREADS": "1"},
                    )
                running[process] = job
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                name, ended = running.pop(process)["name"], ended + 1
                out, log, line = folder / name, folder / f"{name}.log", folder / f"{name}.row"
                left = (time.perf_counter() - began) / ended * (total - ended) / 60
                if process.returncode or not line.exists():
                    failed += 1
                    said = [
                        text
                        for text in log.read_text(errors="replace").splitlines()
                        if text.strip()
                    ] or ["it said nothing"]
                    print(
                        f"{name} failed with exit code {process.returncode}: {said[-1]} (all of it: {log})",
                        file=sys.stderr,
                        flush=True,
                    )
                    continue
                row = json.loads(line.read_text())
                append(results, row)
                line.unlink()
                if not keep:
                    log.unlink()
                    shutil.rmtree(out)
                what = (
                    "diverged"
                    if row["diverged"]
                    else ", ".join(
                        f"{split} {row[split]['mean']:.1f}" for split in SPLITS if row.get(split)
                    )
                )
                print(
                    f"{ended}/{total}  {name}  s {row['scale']:.3g}  {what}  {row['seconds'] + row['score_seconds']:.0f} s, "
                    f"about {left:.0f} min left",
                    flush=True,
                )
        for process in running:
            process.terminate()
            process.wait()
        if stop:
            print("stopped; the same command goes on", file=sys.stderr)
    return stop[0] if stop else int(failed > 0)


def row_table(jobs: list[dict], rows: list[dict]) -> str:
    """The runs of mode `row` in Markdown: what was set, and accuracy on the validation questions."""
    found, settings = {key(r): r for r in rows}, ("rank", "alpha", "lr", "warmup", "epochs")
    groups: dict[tuple, list[dict]] = {}
    for job in jobs:
        if run := found.get(key(job)):
            groups.setdefault(tuple(job["settings"][s] for s in settings), []).append(run)
    lines = [line(*settings, "val, each seed", "mean", "least task"), "|--:" * 8 + "|"]
    for values, group in groups.items():
        means = [accuracy(r, "val") for r in group]
        least = min(min(r["val"]["tasks"].values()) if r.get("val") else 0 for r in group)
        lines.append(
            line(
                *(f"{v:g}" for v in values),
                " ".join(f"{m:.1f}" for m in means),
                f"{mean(means):.1f}",
                f"{least:.0f}",
            )
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if argv[:1] == ["one"]:
        return run_one(json.loads(argv[1]), Path(argv[2]))
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("mode", choices=["fig1", "grid", "best", "row"])
    parser.add_argument(
        "--ckpt",
        default="tiny",
        metavar="NAME",
        help="another model of tiny's world, trained by the same recipe; or one of the paper's, on its own data (fig1)",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--ranks",
        nargs="+",
        type=int,
        metavar="R",
        help="default: five from 4 to the model's width",
    )
    parser.add_argument(
        "--lrs",
        nargs="+",
        type=float,
        metavar="X",
        help=f"default: fig1 {CHECKPOINTS['tiny'].lr['rora']:g}; grid {' '.join(f'{lr:g}' for lr in LRS)}",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="S", help="default: 0 1 2; grid 0; row 0 1"
    )
    parser.add_argument("--alpha", type=float, metavar="X", help="default: the tiny checkpoint's")
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="runs side by side (default 2)"
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="in place of the recipe's epochs: to try the path",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N questions a task: to try the path"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="default: lessons/results/sweep.jsonl, sweep-CKPT.jsonl, or row.jsonl",
    )
    parser.add_argument("--keep", action="store_true", help="keep the run folders")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    ending = "" if args.ckpt == "tiny" else f"-{Path(args.ckpt).name}"
    if (args.max_steps or args.limit or args.alpha) and not args.results:
        raise FlagError(
            "with --alpha, --max-steps or --limit the runs are of another kind: give them a file of their own, --results FILE"
        )
    if args.mode == "row" and (args.methods != METHODS or args.ranks or args.lrs):
        raise FlagError(
            "row has its own list (ROW in this file): leave out --methods, --ranks and --lrs"
        )
    results = args.results or SWEEP.with_name(
        f"{'row' if args.mode == 'row' else 'sweep'}{ending}.jsonl"
    )
    rows = read(results)
    jobs = plan(args, rows)
    todo = pending(jobs, rows)
    left = sum(seconds(j, rows) for j in todo) / args.jobs / 60
    timed = {condition(r) for r in rows} & {condition(j) for j in jobs}
    if args.dry_run:
        print("\n".join(f"{'to do' if j in todo else 'done '}  {j['name']}" for j in jobs))
    print(
        f"{args.mode} on {args.ckpt} ({jobs[0]['checkpoint']}): {len(jobs)} runs, {len(jobs) - len(todo)} done; the other {len(todo)} take about "
        f"{left:.0f} min, {args.jobs} at a time"
        + ("" if timed or not todo else f" (a guess of {GUESS} s each: none timed yet)"),
        flush=True,
    )
    code = 0 if args.dry_run else work(todo, args.jobs, results, args.keep)
    if args.mode == "row":
        print(row_table(jobs, read(results)))
    for method, rank, lr in (
        at_edge([r for r in read(results) if condition(r) == condition(jobs[0])])
        if args.mode == "grid"
        else ()
    ):
        print(
            f"note: the best lr of {method} at rank {rank}, {lr:g}, is the last on its side: add one beyond it, --lrs X"
        )
    return code


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:]), "sweep"))
