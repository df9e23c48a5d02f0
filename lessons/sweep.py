"""Fig. 1's experiment on the embedded default: method x rank x lr x seed, one line of results a
run.

    python lessons/sweep.py fig1     lora, dora, rora at five ranks, seeds 0 1 2, the default lr
    python lessons/sweep.py grid     the same at every lr of a grid, seed 0
    python lessons/sweep.py best     the two best lrs of that grid by val questions, over all ranks
                                     and at each rank, for each method: seeds 0 1 2
    python lessons/sweep.py row      the tiny row of flags.py, and with its alpha, warm-up or epochs
                                     changed: RoRA, seeds 0 1. Rank and lr are chosen from the grid
    python lessons/sweep.py all      fig1, grid and best, the cells that decide first and with seeds
                                     0 to 4; what takes part is planned anew as results come in
    python lessons/sweep.py try      six runs of 20 steps, to see the path; the numbers mean nothing
    python lessons/sweep.py ... --dry-run     the list, what is done, how long the rest would take

Every run is asked the test, val and strict questions, but for row's, which are asked val alone.

A run is `rora.py` and then `eval.py` as they are, called in one process: torch is imported once.
Two run side by side, a thread each (--jobs). Stopped or failed, the same command goes on: what the
results file holds is not run again, and a line counts only for the checkpoint, questions and
settings it was made with. Run folders lie under runs/lessons/ and go once their line is written.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
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
FINAL_SEEDS = [0, 1, 2, 3, 4]  # of the cells that findings.md decides by
TRY = {"max_steps": 20, "limit": 10, "ranks": [4, 32], "seeds": [0]}
GUESS = 120  # seconds a run on a core of its own, until one has been timed


def rank_axis(width: int) -> list[int]:
    """Five ranks in about equal ratios from 4 to the width. The inner ones are powers of two, as
    the paper's are; the last is the width itself, where the update of a square matrix is no longer
    low-rank at all.
    """
    inner = [2 ** round(math.log2(4) + i * math.log2(width / 4) / 4) for i in (1, 2, 3)]
    return sorted({4, *inner, width})


def world(ckpt: str) -> tuple[Checkpoint, dict[str, Path]]:
    """A checkpoint's recipe and its questions, {split: folder}. What flags.py has no row for is
    another model of tiny's world."""
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


# --- one run ------------------------------------------------------------------------------------


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
    """A run to be: rora.py's flags, what identifies it, and which questions to ask. files: the
    digests of what it reads."""
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
        *(["--device", args.device] if args.device else []),
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
    """Train and score. Writes the results line beside the run folder; returns the exit code of what
    failed, or 0.
    """
    began = time.perf_counter()
    code = rora.main([*job["flags"], "--out", str(out), "--overwrite"])
    trained = time.perf_counter()
    if code not in (0, 4):
        return code
    row = {k: job[k] for k in ("ckpt", "checkpoint", "questions", "limit", "settings")}
    homes, dtype = world(job["ckpt"])[1], ["--dtype", job["settings"]["dtype"]]
    if "--device" in job["flags"]:
        dtype += job["flags"][job["flags"].index("--device") :][:2]
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
        "cpu_seconds": round(time.process_time(), 1),  # what it takes on a core of its own
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": record["packages"]["torch"],
        "commit": record["commit"],
        "loss_every": every,
        "loss": curve,
    }
    if (now := checkpoint_digest(find_checkpoint(job["ckpt"]))) != job["checkpoint"]:
        print(
            f"{job['ckpt']} was replaced during the run ({job['checkpoint']} to {now}): again",
            file=sys.stderr,
        )
        return 3
    runs.write_json(out.with_name(out.name + ".row"), row)
    return 0


def thinned(values: list[float], most: int = 150) -> tuple[int, list[float]]:
    """(k, means of k values each), at most `most` of them."""
    k = max(1, math.ceil(len(values) / most))
    return k, [round(mean(values[i : i + k]), 4) for i in range(0, len(values), k)]


# --- many runs ----------------------------------------------------------------------------------


def plan(args: argparse.Namespace, rows: list[dict]) -> list[dict]:
    """Every run of the mode, seeds outermost: an early stop leaves whole curves."""
    folder, (recipe, homes) = find_checkpoint(args.ckpt), world(args.ckpt)
    if args.mode not in ("fig1", "try") and "val" not in homes:
        raise FlagError(
            f"{args.mode} chooses by validation questions, which tiny's world alone has; "
            f"for {args.ckpt} there is fig1"
        )
    if args.mode == "all":
        return plan_all(args, rows)
    lr = default_lr("rora", recipe)
    files = {
        "checkpoint": checkpoint_digest(folder),
        "questions": questions_digest(homes.values()),
    }
    if args.mode == "row":
        row = {"rank": rora.METHODS["rora"].rank, "lr": lr}
        return [
            planned(args, files, ["val"], "rora", seed=seed, **row | change)
            for change in ROW
            for seed in args.seeds or [0, 1]
        ]
    ranks = args.ranks or rank_axis(json.loads((folder / "config.json").read_text())["hidden_size"])
    splits = list(homes)
    seeds = args.seeds or ([0] if args.mode == "grid" else [0, 1, 2])
    like = condition(planned(args, files, splits, "lora", ranks[0], lr, 0))
    rows = [r for r in rows if condition(r) == like]
    lrs = dict.fromkeys(args.methods, args.lrs or (LRS if args.mode == "grid" else [lr]))
    if args.mode == "best":
        whole_grid(rows, args.methods, ranks, args.lrs or LRS)
    jobs = [
        (method, rank, lr, seed)
        for seed in seeds
        for rank in ranks
        for method in args.methods
        for lr in (best_two(rows, method, rank) if args.mode == "best" else lrs[method])
    ]
    return [planned(args, files, splits, *job) for job in jobs]


def plan_all(args: argparse.Namespace, rows: list[dict]) -> list[dict]:
    """What decides first: the tiny row's cells, Fig. 1, the grid; then, as soon as the grid is
    whole, the best rates, and those of the deciding rank with more seeds.
    """
    stage = lambda mode, **given: plan(
        argparse.Namespace(**vars(args) | {"mode": mode} | given), rows
    )
    final = [rora.METHODS["rora"].rank]
    grid_jobs = stage("grid")
    jobs = stage("fig1", ranks=final, seeds=FINAL_SEEDS) + stage("fig1") + grid_jobs
    if not pending(grid_jobs, rows):
        jobs += stage("best", ranks=final, seeds=FINAL_SEEDS) + stage("best")
    once: dict[str, dict] = {}
    for job in jobs:
        once.setdefault(key(job), job)
    return list(once.values())


def best_two(rows: list[dict], method: str, rank: int) -> list[float]:
    """The two best lrs of the grid by the validation questions, over all ranks and at this one."""
    return sorted({*ranking(rows, method)[:2], *ranking(rows, method, rank)[:2]})


def whole_grid(rows: list[dict], methods: list[str], ranks: list[int], lrs: list[float]) -> None:
    """Raises SystemExit where a cell of the grid is missing."""
    for method in methods:
        for rank in ranks:
            if missing := set(lrs) - set(grid(rows, method, rank)):
                raise SystemExit(
                    f"the grid of {method} at rank {rank} has no lr {min(missing):g} yet: "
                    "python lessons/sweep.py grid"
                )


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
    """As runs of this method took of a core on this checkpoint, or of any method."""
    alike = [r for r in rows if condition(r) == condition(job)]
    same = [
        r for r in alike if all(r["settings"][k] == job["settings"][k] for k in ("method", "rank"))
    ] or alike
    return median(r.get("cpu_seconds", GUESS) for r in same) if same else GUESS


def work(
    jobs_of: Callable[[list[dict]], list[dict]],
    jobs: int,
    results: Path,
    keep: bool = False,
    minutes: float = math.inf,
) -> int:
    """Run what `jobs_of` the results still asks for, `jobs` at a time, a process each; begin none
    after `minutes`. Returns the exit code."""
    folder, began = ROOT / "runs" / "lessons" / results.stem, time.perf_counter()
    running: dict[subprocess.Popen, dict] = {}
    tried: set[str] = set()  # those that failed are not tried again
    failed = ended = 0
    with runs.lock(folder), runs.stop_signals() as stop:
        while not stop:
            rows = read(results)
            todo = [j for j in pending(jobs_of(rows), rows) if j["name"] not in tried]
            if time.perf_counter() - began > 60 * minutes:
                todo = []
            for job in todo[: jobs - len(running)]:
                running[start(job, folder)] = job
                tried.add(job["name"])
            if not running:
                break
            while not stop and all(process.poll() is None for process in running):
                time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                job, ended = running.pop(process), ended + 1
                spent = (time.perf_counter() - began) / 60
                left = spent / ended * (len(todo) + len(running))
                clock = f"{ended} in {spent:.0f} min, about {left:.0f} min left"
                failed += not finish(job, process.returncode, folder, results, keep, clock)
        for process in running:
            process.terminate()
            process.wait()
        if stop:
            print("stopped; the same command goes on", file=sys.stderr)
    return stop[0] if stop else int(failed > 0)


def start(job: dict, folder: Path) -> subprocess.Popen:
    with (folder / f"{job['name']}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "one", json.dumps(job), folder / job["name"]],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def finish(
    job: dict, code: int | None, folder: Path, results: Path, keep: bool, clock: str
) -> bool:
    """A run has ended: its line goes into the results file, or what went wrong to stderr."""
    name = job["name"]
    out, log, line = folder / name, folder / f"{name}.log", folder / f"{name}.row"
    if code or not line.exists():
        said = [text for text in log.read_text(errors="replace").splitlines() if text.strip()]
        what = said[-1] if said else "it said nothing"
        print(
            f"{name} failed with exit code {code}: {what} (all of it: {log})",
            file=sys.stderr,
            flush=True,
        )
        return False
    row = json.loads(line.read_text())
    append(results, row)
    line.unlink()
    if not keep:
        log.unlink()
        shutil.rmtree(out)
    scores = [f"{split} {row[split]['mean']:.1f}" for split in SPLITS if row.get(split)]
    what = "diverged" if row["diverged"] else ", ".join(scores)
    took = row["seconds"] + row["score_seconds"]
    print(f"{name}  s {row['scale']:.3g}  {what}  {took:.0f} s  ({clock})", flush=True)
    return True


def row_table(jobs: list[dict], rows: list[dict]) -> str:
    """The runs of mode `row` in Markdown: what was set, and accuracy on validation questions."""
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


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    add = parser.add_argument
    add("mode", choices=["fig1", "grid", "best", "row", "all", "try"])
    add(
        "--ckpt",
        default="tiny",
        metavar="NAME",
        help="another model of tiny's world, trained by the same recipe; or one of the paper's, "
        "on its own data (fig1)",
    )
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--ranks", nargs="+", type=int, metavar="R", help="default: five, from 4 to the width")
    one = CHECKPOINTS["tiny"].lr["rora"]
    lrs = f"default: fig1 {one:g}; grid {' '.join(f'{lr:g}' for lr in LRS)}"
    add("--lrs", nargs="+", type=float, metavar="X", help=lrs)
    add("--seeds", nargs="+", type=int, metavar="S", help="default: 0 1 2; grid 0; row 0 1")
    add("--alpha", type=float, metavar="X", help="default: the tiny checkpoint's")
    add("--device", metavar="D", help="cpu or cuda (default: as rora.py chooses)")
    add("--jobs", type=int, default=2, metavar="N", help="runs side by side (default 2)")
    add("--minutes", type=float, default=math.inf, metavar="M", help="begin no run after that")
    add("--max-steps", type=int, metavar="N", help="in place of the recipe's epochs")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task")
    add(
        "--results",
        type=Path,
        metavar="FILE",
        help="default: lessons/results/sweep.jsonl, sweep-CKPT.jsonl, or row.jsonl",
    )
    add("--keep", action="store_true", help="keep the run folders")
    add("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    if args.mode == "try":
        for name, value in TRY.items():
            setattr(args, name, value)
        args.results = args.results or ROOT / "runs" / "try.jsonl"
    if (args.max_steps or args.limit or args.alpha) and not args.results:
        raise FlagError(
            "with --alpha, --max-steps or --limit the runs are of another kind: "
            "give them a file of their own, --results FILE"
        )
    if args.mode in ("row", "all") and (args.methods != METHODS or args.ranks or args.lrs):
        raise FlagError(f"{args.mode} has its own list: leave out --methods, --ranks and --lrs")
    ending = "" if args.ckpt == "tiny" else f"-{Path(args.ckpt).name}"
    stem = "row" if args.mode == "row" else "sweep"
    args.results = args.results or SWEEP.with_name(f"{stem}{ending}.jsonl")
    return args


def summary(args: argparse.Namespace, jobs: list[dict], rows: list[dict]) -> str:
    """How much is done, and how long the rest would take; where nothing is left, how to run it all
    the same."""
    todo = pending(jobs, rows)
    told = f"{args.mode} on {args.ckpt} (checkpoint {jobs[0]['checkpoint']}): {len(jobs)} runs"
    took = lambda these: sum(seconds(j, rows) for j in these) / args.jobs / 60
    if not todo:
        again = "runs/mine.jsonl"
        return (
            f"{told}, all of them in {args.results} already. To run them yourself, in about "
            f"{took(jobs):.0f} min:\n    python lessons/sweep.py {args.mode} --results {again}\n"
            f"    python lessons/plot.py --results {again} --out runs/mine"
        )
    timed = {condition(r) for r in rows} & {condition(j) for j in jobs}
    guess = "" if timed else f" (a guess of {GUESS} s each: none timed yet)"
    return (
        f"{told}, {len(jobs) - len(todo)} done, {len(todo)} missing; these take about "
        f"{took(todo):.0f} min, {args.jobs} at a time{guess}"
    )


def main(argv: list[str]) -> int:
    if argv[:1] == ["one"]:
        return run_one(json.loads(argv[1]), Path(argv[2]))
    args = parsed(argv)
    jobs_of = lambda rows: plan(args, rows)
    rows = read(args.results)
    jobs = jobs_of(rows)
    if args.dry_run:
        todo = pending(jobs, rows)
        print("\n".join(f"{'to do' if j in todo else 'done '}  {j['name']}" for j in jobs))
    print(summary(args, jobs, rows), flush=True)
    if args.dry_run or not pending(jobs, rows):
        code = 0
    else:
        code = work(jobs_of, args.jobs, args.results, args.keep, args.minutes)
        rows = read(args.results)
        left = len(pending(jobs_of(rows), rows))
        print(f"{len(jobs_of(rows)) - left} done, {left} missing, in {args.results}")
    if args.mode == "try":
        print("these were trial runs: their numbers mean nothing, and nothing is drawn of them")
    if args.mode == "row":
        print(row_table(jobs, rows))
    if args.mode in ("grid", "all") and not pending(jobs_of(rows), rows):
        for method, rank, lr in at_edge([r for r in rows if condition(r) == condition(jobs[0])]):
            print(
                f"note: the best lr of {method} at rank {rank}, {lr:g}, is the last on its side: "
                "add one beyond it, grid --lrs X"
            )
    return code


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:]), "sweep"))
