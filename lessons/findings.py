"""The page a reader sees first: claim, figure, difference with its interval, verdict; in Markdown.

    python lessons/findings.py > lessons/results/findings.md

Made from the results files alone. Cells that have not been run show a dash and "not run yet".
details.py prints the numbers behind it, paired.py says what an interval is.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import mean, stdev

from paired import Difference, difference
from rows import (
    as_page,
    METHODS,
    NAMES,
    RESULTS,
    accuracy,
    axis,
    best_lr,
    chosen,
    grid,
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
SPLITS = ("test", "strict")
HEAD = ["claim", "measured", "test questions", "strict questions", "seeds", "verdict"]
VERDICTS = {"not shown": "not shown", "not run yet": "not run yet"}


def one_lr(method: str, rank: int) -> float:
    return LR


def own_lr(rows: Runs) -> RowLr:
    """The best of several, by the validation questions; None where one alone was run."""

    def best(method: str, rank: int) -> float | None:
        return best_lr(rows, method, rank) if len(grid(rows, method, rank)) > 1 else None

    return best


def runs_at(rows: Runs, method: str, rank: int, lr: float | None, split: str = "test") -> Runs:
    """The runs of a cell that were asked this split; one that diverged counts, as 0."""
    found = chosen(rows, method=method, rank=rank, lr=lr)
    return [r for r in found if r["diverged"] or r.get(split)]


def by_seed(runs: Runs, value: Value) -> dict[int, float]:
    return {r["settings"]["seed"]: value(r) for r in runs}


def over_ranks(
    rows: Runs, method: str, lr_of: RowLr, ranks: Iterable[int], split: str
) -> dict[int, float]:
    """{seed: mean over the ranks}, of the seeds that every rank has."""
    value = lambda run: accuracy(run, split)
    cells = [
        by_seed(runs_at(rows, method, rank, lr_of(method, rank), split), value) for rank in ranks
    ]
    seeds = set.intersection(*map(set, cells)) if cells else set()
    return {seed: mean(cell[seed] for cell in cells) for seed in seeds}


def without(task: str, split: str) -> Value:
    """The mean of the other seven tasks."""

    def value(run: dict) -> float:
        if not run.get(split):
            return 0.0
        return mean(y for name, y in run[split]["tasks"].items() if name != task)

    return value


def only(task: str, split: str) -> Value:
    return lambda run: run[split]["tasks"][task] if run.get(split) else 0.0


def early_loss(run: dict) -> float:
    """Mean training loss of the second tenth of the steps, where the curves part."""
    n = len(run["loss"])
    return mean(run["loss"][n // 10 : n // 5 + 1])


# --- the page -----------------------------------------------------------------------------------


def word(found: Difference, wanted: str) -> str:
    """wanted: which way would bear the claim out."""
    return (VERDICTS | {wanted: "**shown**"}).get(found.verdict, "**the opposite**")


def verdict(found: list[Difference], wanted: str = "more") -> str:
    """One word where all agree, test and strict questions; and what it would take."""
    asked = {split: each for split, each in zip(SPLITS, found) if each.values}
    words = {split: word(each, wanted) for split, each in asked.items()}
    if not asked:
        return "not run yet"
    said = "; ".join(f"{split}: {word}" for split, word in words.items())
    if len(set(words.values())) == 1:
        said = next(iter(words.values()))
    needed = [each.needed for each in asked.values() if each.verdict == "not shown"]
    return f"{said} ({' / '.join(needed)} seeds would)" if set(needed) - {DASH} else said


def claim(said: str, measured: str, values, wanted: str = "more") -> str:
    """A row. values: (split) -> RoRA's and the other's {seed: accuracy}."""
    found = [difference(*values(split)) for split in SPLITS]
    seeds = " / ".join(dict.fromkeys(str(len(each.values)) for each in found if each.values))
    return line(said, measured, *found, seeds or DASH, verdict(found, wanted))


def lead_claims(rows: Runs) -> Iterator[str]:
    """RoRA against both others, at one lr and each at its best."""
    best = own_lr(rows)

    def of(other: str, lr_of: RowLr, ranks: tuple[int, ...]):
        pair = ("rora", other)
        return lambda split: [over_ranks(rows, m, lr_of, ranks, split) for m in pair]

    for other in OTHERS:
        beats = f"RoRA beats {NAMES[other]}"
        for rank in RANKS:
            yield claim(beats, f"r = {rank}, one lr", of(other, one_lr, (rank,)))
        yield claim(beats, "mean of the ranks, one lr", of(other, one_lr, RANKS))
        scale = f"… because of its scale, over {NAMES[other]}"
        lrs = [best(m, RANK) for m in ("rora", other)]
        said = " and ".join(f"{lr:g}" if lr else DASH for lr in lrs)
        each = f"r = {RANK}, each at its best lr by val: {said}"
        yield claim(scale, each, of(other, best, (RANK,)))
        each = "mean of the ranks, each at its best lr at each rank"
        yield claim(scale, each, of(other, best, RANKS))


def rank_claims(rows: Runs) -> Iterator[str]:
    """Fig. 1's other half: who falls from the least rank to the largest?"""
    for method in METHODS:
        ends = lambda split: [
            over_ranks(rows, method, one_lr, (rank,), split) for rank in (RANKS[-1], RANKS[0])
        ]
        falls = method != "rora"
        yield claim(
            f"{NAMES[method]} {'falls' if falls else 'gains'} with the rank",
            f"r = {RANKS[-1]} less r = {RANKS[0]}, one lr",
            ends,
            "less" if falls else "more",
        )


def loss_table(rows: Runs) -> str:
    """Fig. 3."""
    head = ["claim", "training loss, second tenth of the steps", "seeds", "verdict"]
    lines = [line(*head), "|---|--:|--:|---|"]
    for other in OTHERS:
        for rank in (RANK, RANKS[-1]):
            pair = [by_seed(runs_at(rows, m, rank, LR), early_loss) for m in ("rora", other)]
            found = difference(*pair)
            said = f"RoRA's loss falls faster than {NAMES[other]}'s, r = {rank}, one lr"
            shown = found.with_digits(3)
            lines.append(line(said, shown, len(found.values) or DASH, verdict([found], "less")))
    return "\n".join(lines)


def task_table(rows: Runs, title: str, lr_of: RowLr, split: str) -> str:
    """Where the lead at one rank comes from, and what is left of it without any one task."""
    tasks = list(next(r["test"]["tasks"] for r in rows if r.get("test")))
    cells = {m: runs_at(rows, m, RANK, lr_of(m, RANK), split) for m in METHODS}
    lines = [
        f"### {title}\n",
        line("task", *(f"RoRA − {NAMES[m]}, {w}" for m in OTHERS for w in ("alone", "without it"))),
        "|---|" + "--:|" * 4,
    ]
    for task in tasks:
        pairs = []
        for other in OTHERS:
            for value in (only(task, split), without(task, split)):
                found = difference(by_seed(cells["rora"], value), by_seed(cells[other], value))
                clear = found.verdict in ("more", "less")
                pairs.append(f"**{found}**" if clear else str(found))
        lines.append(line(task, *pairs))
    return "\n".join(lines)


def row_table(rows: Runs) -> str:
    """The demo's own row: how steady it is from seed to seed."""
    runs = chosen(rows, method="rora", rank=RANK, lr=LR)
    tests, stricts = ([r for r in runs if r.get(split)] for split in SPLITS)
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
    ranks = axis(rows, "rank")
    for other in OTHERS:
        pair = ("rora", other)
        of = lambda split: [over_ranks(rows, m, one_lr, ranks, split) for m in pair]
        yield claim(f"RoRA beats {NAMES[other]}, {name}", "mean of the ranks, one lr", of)


def read_or_nothing(path: Path) -> Runs:
    return load(path) if path.exists() else []


def page(folder: Path) -> str:
    rows = load(folder / "sweep.jsonl")
    scored = [r for r in rows if r.get("test")]
    if not scored:
        raise SystemExit("every run diverged")
    best = own_lr(scored)
    machines = sorted({f"{r['device']} ({r.get('machine', 'not noted')})" for r in rows})
    table = [line(*HEAD), "|---|---|--:|--:|--:|---|"]
    table += [*lead_claims(scored), *rank_claims(scored)]
    healed = read_or_nothing(folder / "sweep-tiny-healed.jsonl")
    table += pruned_claims(healed, "pruned and trained on")
    table += pruned_claims(read_or_nothing(folder / "sweep-tiny-pruned.jsonl"), "pruned")
    return "\n".join(
        [
            "# What was found, and how surely\n",
            "All of this is about a small closed world (tiny/README.md), not about the paper's "
            "models. Test questions rest on facts that pretraining asked about in other words; "
            "strict ones on facts that it only stated. The test questions are nearly all answered "
            "by every method, so the strict ones tell more.\n",
            "A difference is in points of accuracy, of runs with the same seed. The bracket is its "
            "95% interval over seeds. **Shown** means that the interval leaves 0 out on the "
            "claim's side. *Not shown* means that it holds 0; in brackets stands with how many "
            "seeds a difference of this size and spread would show, first for test, then for "
            "strict questions. Of forty claims with nothing behind them, one would show by "
            "chance, and one the opposite. “One lr” is 2e-3, which was chosen for RoRA at r = 32. "
            "The best lrs are chosen by the validation questions.\n",
            "\n".join(table),
            "\n## Whose loss falls faster\n",
            loss_table(scored),
            f"\n## Where the lead comes from, r = {RANK}, strict questions\n",
            "Bold: the interval leaves 0 out.\n",
            task_table(scored, "One lr for all", one_lr, "strict"),
            "",
            task_table(scored, "Each at its best lr", best, "strict"),
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
    as_page(main)
