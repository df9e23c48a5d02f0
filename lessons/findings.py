"""The page a reader sees first: claim, figure, difference with its interval, verdict; in Markdown.

    python lessons/findings.py > lessons/results/findings.md

Made from the results files alone. Cells that have not been run show a dash and "not run yet".
details.py prints the numbers behind it, paired.py says what an interval is.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import mean, stdev

from paired import Difference, difference
from rows import (
    METHODS,
    NAMES,
    RESULTS,
    accuracy,
    axis,
    best_lr,
    chosen,
    line,
    load,
)

Runs = list[dict]
RANKS = (4, 8, 32, 64, 192)  # sweep.py's five; the last is the model's width
Value = Callable[[dict], float]  # what is read off a run
RowLr = Callable[[str, int], float | None]  # the lr of a method at a rank

LR = 2e-3  # of the tiny row, at which "one lr" compares
RANK = 32
DASH = "–"
OTHERS = ("lora", "dora")
HEAD = ["claim", "measured", "difference [95% interval]", "seeds", "verdict", "seeds needed"]


def one_lr(method: str, rank: int) -> float:
    return LR


def runs_at(rows: Runs, method: str, rank: int, lr: float | None, split: str = "test") -> Runs:
    """The runs of a cell that were asked this split; one that diverged counts, as 0."""
    found = chosen(rows, method=method, rank=rank, lr=lr)
    return [r for r in found if r["diverged"] or r.get(split)]


def by_seed(runs: Runs, value: Value = accuracy) -> dict[int, float]:
    return {r["settings"]["seed"]: value(r) for r in runs}


def over_ranks(rows: Runs, method: str, lr_of: RowLr, ranks: Iterable[int]) -> dict[int, float]:
    """{seed: mean over the ranks}, of the seeds that every rank has."""
    cells = [by_seed(runs_at(rows, method, rank, lr_of(method, rank))) for rank in ranks]
    seeds = set.intersection(*map(set, cells)) if cells else set()
    return {seed: mean(cell[seed] for cell in cells) for seed in seeds}


def without(task: str) -> Value:
    """The mean of the other seven tasks."""

    def value(run: dict) -> float:
        if not run.get("test"):
            return 0.0
        return mean(y for name, y in run["test"]["tasks"].items() if name != task)

    return value


def only(task: str) -> Value:
    return lambda run: run["test"]["tasks"][task] if run.get("test") else 0.0


def early_loss(run: dict) -> float:
    """Mean training loss of the second tenth of the steps, where the curves part."""
    n = len(run["loss"])
    return mean(run["loss"][n // 10 : n // 5])


# --- the page -----------------------------------------------------------------------------------


def claim(said: str, measured: str, found: Difference, wanted: str = "more") -> str:
    """A row. `wanted`: which verdict would bear the claim out."""
    said_of = {wanted: "**shown**", "not shown": "not shown", "not run yet": "not run yet"}
    verdict = said_of.get(found.verdict, "**the opposite**")
    needed = found.needed if found.verdict == "not shown" else DASH
    return line(said, measured, found, len(found.values) or DASH, verdict, needed)


def lead_claims(rows: Runs) -> Iterator[str]:
    """RoRA against both others, at one lr and each at its best."""
    for other in OTHERS:
        for rank in RANKS:
            pair = [by_seed(runs_at(rows, m, rank, LR)) for m in ("rora", other)]
            yield claim(f"RoRA beats {NAMES[other]}", f"r = {rank}, one lr", difference(*pair))
        pair = [over_ranks(rows, m, one_lr, RANKS) for m in ("rora", other)]
        yield claim(f"RoRA beats {NAMES[other]}", "mean of the ranks, one lr", difference(*pair))
        own = {m: best_lr(rows, m, RANK) for m in ("rora", other)}
        pair = [by_seed(runs_at(rows, m, RANK, own[m])) for m in ("rora", other)]
        lrs = " and ".join(f"{lr:g}" if lr else DASH for lr in own.values())
        yield claim(
            f"… because of its scale, over {NAMES[other]}",
            f"r = {RANK}, each at its best lr by val: {lrs}",
            difference(*pair),
        )
        pair = [
            over_ranks(rows, m, lambda m, r: best_lr(rows, m, r), RANKS) for m in ("rora", other)
        ]
        yield claim(
            f"… because of its scale, over {NAMES[other]}",
            "mean of the ranks, each at its best lr at each rank",
            difference(*pair),
        )


def rank_claims(rows: Runs) -> Iterator[str]:
    """Fig. 1's other half: who falls from the least rank to the largest?"""
    for method in METHODS:
        ends = [by_seed(runs_at(rows, method, rank, LR)) for rank in (RANKS[-1], RANKS[0])]
        falls = method != "rora"
        yield claim(
            f"{NAMES[method]} {'falls' if falls else 'gains'} with the rank",
            f"r = {RANKS[-1]} less r = {RANKS[0]}, one lr",
            difference(*ends),
            "less" if falls else "more",
        )


def loss_claims(rows: Runs) -> Iterator[str]:
    """Fig. 3."""
    for other in OTHERS:
        pair = [by_seed(runs_at(rows, m, RANKS[-1], LR), early_loss) for m in ("rora", other)]
        yield claim(
            f"RoRA's loss falls faster than {NAMES[other]}'s",
            f"training loss, second tenth of the steps, r = {RANKS[-1]}, one lr",
            difference(*pair),
            "less",
        )


def task_table(rows: Runs, title: str, lr_of: RowLr) -> str:
    """Where the lead at one rank comes from, and what is left of it without any one task."""
    tasks = list(next(r["test"]["tasks"] for r in rows if r.get("test")))
    cells = {m: runs_at(rows, m, RANK, lr_of(m, RANK)) for m in METHODS}
    lines = [
        f"### {title}\n",
        line("task", *(f"RoRA − {NAMES[m]}, {w}" for m in OTHERS for w in ("alone", "without it"))),
        "|---|" + "--:|" * 4,
    ]
    for task in tasks:
        pairs = []
        for other in OTHERS:
            for value in (only(task), without(task)):
                found = difference(by_seed(cells["rora"], value), by_seed(cells[other], value))
                clear = found.verdict in ("more", "less")
                pairs.append(f"**{found}**" if clear else str(found))
        lines.append(line(task, *pairs))
    return "\n".join(lines)


def row_table(rows: Runs) -> str:
    """The demo's own row: how steady it is from seed to seed."""
    runs = chosen(rows, method="rora", rank=RANK, lr=LR)
    tests, stricts = ([r for r in runs if r.get(split)] for split in ("test", "strict"))
    lines = [line("", "mean", "sd", "least seed", "seeds"), "|---|--:|--:|--:|--:|"]

    def add(name: str, values: list[float]) -> None:
        if not values:
            lines.append(line(name, DASH, DASH, DASH, "not run yet"))
            return
        sd = f"{stdev(values):.1f}" if len(values) > 1 else DASH
        lines.append(line(name, f"{mean(values):.1f}", sd, f"{min(values):.1f}", len(values)))

    add("**test, mean of the eight tasks**", [accuracy(r) for r in tests])
    for task in tests[0]["test"]["tasks"] if tests else ():
        add(task, [r["test"]["tasks"][task] for r in tests])
    add("**strict, mean of the eight tasks**", [accuracy(r, "strict") for r in stricts])
    return "\n".join(lines)


def pruned_claims(rows: Runs, name: str) -> Iterator[str]:
    """Table II, on a model with a fifth of tiny's parameters."""
    for other in OTHERS:
        pair = [over_ranks(rows, m, one_lr, axis(rows, "rank")) for m in ("rora", other)]
        found = difference(*pair)
        yield claim(f"RoRA beats {NAMES[other]}, {name}", "mean of the ranks, one lr", found)


def read_or_nothing(path: Path) -> Runs:
    return load(path) if path.exists() else []


def page(folder: Path) -> str:
    rows = load(folder / "sweep.jsonl")
    scored = [r for r in rows if r.get("test")]
    if not scored:
        raise SystemExit("every run diverged")
    best = lambda method, rank: best_lr(rows, method, rank)
    machines = sorted({f"{r['device']} ({r.get('machine', 'not noted')})" for r in rows})
    table = [line(*HEAD), "|---|---|--:|--:|---|--:|"]
    table += [*lead_claims(scored), *rank_claims(scored), *loss_claims(scored)]
    table += pruned_claims(
        read_or_nothing(folder / "sweep-tiny-healed.jsonl"), "pruned and trained on"
    )
    table += pruned_claims(read_or_nothing(folder / "sweep-tiny-pruned.jsonl"), "pruned")
    return "\n".join(
        [
            "# What was found, and how surely\n",
            "All of this is about a small closed world (tiny/README.md), not about the paper's "
            "models. Differences are in points of accuracy, of runs with the same seed; the "
            "bracket is the 95% interval over seeds. **Shown** means that the interval leaves 0 "
            "out on the claim's side, *not shown* that it holds 0; the last column then says with "
            "how many seeds a difference of this size and spread would show. One claim in twenty "
            "that is not true would show by chance. “One lr” is 2e-3, which was chosen for RoRA at "
            "r = 32; the best lrs are chosen by the validation questions.\n",
            "\n".join(table),
            f"\n## Where the lead comes from, r = {RANK}\n",
            "Bold: the interval leaves 0 out.\n",
            task_table(scored, "One lr for all", one_lr),
            "",
            task_table(scored, "Each at its best lr", best),
            f"\n## How steady the demo's row is: RoRA, r = {RANK}, lr {LR:g}\n",
            row_table(rows),
            f"\nMade by `python lessons/findings.py` from {len(rows)} runs on "
            f"{', '.join(machines)}, checkpoint {rows[0]['checkpoint']}; "
            "all numbers in [details.md](details.md).",
        ]
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="of sweep.jsonl and sweep-CKPT.jsonl",
    )
    print(page(parser.parse_args(argv).results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
