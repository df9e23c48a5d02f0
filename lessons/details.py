"""The numbers behind "What we found", computed from the sweep's results, in Markdown. Each with its
seeds and n.

    python lessons/details.py > lessons/results/details.md

± is the standard deviation over seeds; of a difference, over the differences of runs with the same
seed (the same records in the same order). One seed has no ±: of a difference that is smaller than
the sampling error of the questions, make nothing.
"""

import argparse
import math
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

from rows import (
    as_page,
    ABSCISSAS,
    METHODS,
    NAMES,
    SWEEP,
    accuracy,
    at_edge,
    axis,
    best_lr,
    chosen,
    common_lr,
    grid,
    line,
    load,
    three_ways,
)
from tables import pm

Runs = list[dict]


def by_seed(rows: Runs, method: str, rank: int, lr: float, split: str = "test") -> dict[int, float]:
    """{seed: accuracy} of one cell."""
    runs = chosen(rows, method=method, rank=rank, lr=lr)
    return {
        r["settings"]["seed"]: accuracy(r, split) for r in runs if r["diverged"] or r.get(split)
    }


def difference(one: dict[int, float], two: dict[int, float]) -> list[float]:
    """One cell minus another, seed by seed, in points."""
    return [one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())]


def signed(values: list[float]) -> str:
    if not values:
        return "–"
    return (
        f"{mean(values):+.1f}"
        + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
        + f" ({len(values)})"
    )


def sampling_error(row: dict) -> float:
    """One standard error of the mean of the tasks, from the finite number of questions."""
    per_task = row["test"]["n"] / len(row["test"]["tasks"])
    return (
        100
        * math.sqrt(sum(p / 100 * (1 - p / 100) / per_task for p in row["test"]["tasks"].values()))
        / len(row["test"]["tasks"])
    )


def comparison(rows: Runs, title: str, lr_of, split: str = "test") -> str:
    """A line a rank: the three accuracies, and RoRA's lead; then their means over the ranks."""
    lines = [
        f"### {title}, {split} questions\n",
        line("rank", *NAMES.values(), "RoRA - LoRA (seeds)", "RoRA - DoRA (seeds)", "lr of each"),
        "|--:|--:|--:|--:|--:|--:|---|",
    ]
    ranks = axis(rows, "rank")
    cells = {
        rank: {m: by_seed(rows, m, rank, lr_of(m, rank), split) for m in METHODS} for rank in ranks
    }
    everywhere = {m: set.intersection(*(set(cells[rank][m]) for rank in ranks)) for m in METHODS}
    cells["mean"] = {
        m: {seed: mean(cells[rank][m][seed] for rank in ranks) for seed in everywhere[m]}
        for m in METHODS
    }
    for rank, found in cells.items():
        lrs = "" if rank == "mean" else ", ".join(f"{lr_of(m, rank) or 0:g}" for m in METHODS)
        lines.append(
            line(
                rank,
                *(pm(list(c.values())) if c else "–" for c in found.values()),
                *(signed(difference(found["rora"], found[m])) for m in ("lora", "dora")),
                lrs,
            )
        )
    return "\n".join(lines)


def by_task(rows: Runs, title: str, lr_of) -> str:
    """Where the differences are: a line a method, each task's test accuracy, mean over ranks and
    seeds; and RoRA's lead without the task that makes most of it.
    """
    tasks = list(next(r["test"]["tasks"] for r in rows if r.get("test")))
    lines = [
        f"### By task, {title}: mean over ranks and seeds\n",
        line("method", *tasks, "no legal answer, %"),
        "|---|" + "--:|" * (len(tasks) + 1),
    ]
    found = {}
    for m in METHODS:
        runs = [
            r
            for rank in axis(rows, "rank")
            for r in chosen(rows, method=m, rank=rank, lr=lr_of(m, rank))
            if r.get("test")
        ]
        if not runs:
            return f"### By task, {title}\n\n{NAMES[m]} is not run yet."
        found[m] = {t: mean(r["test"]["tasks"][t] for r in runs) for t in tasks}
        silent = mean(100 * r["test"]["unanswered"] / r["test"]["n"] for r in runs)
        lines.append(line(NAMES[m], *(f"{y:.1f}" for y in found[m].values()), f"{silent:.1f}"))
    most = max(tasks, key=lambda t: found["rora"][t] - found["lora"][t])
    without = {
        m: mean(found["rora"][t] - found[m][t] for t in tasks if t != most)
        for m in ("lora", "dora")
    }
    lines.append(
        f"\nWithout {most} RoRA's lead over LoRA is {without['lora']:+.1f} points, "
        f"over DoRA {without['dora']:+.1f}."
    )
    return "\n".join(lines)


def interpolated(curve: list[tuple[float, float]], x: float) -> float | None:
    """Accuracy at lr x on a curve of (lr, accuracy), straight between neighbours in log lr; None
    outside of it.
    """
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)
    return None


def swapped(rows: Runs) -> str:
    """RoRA at lr against LoRA at lr·√r: the same lr·s. If the scale is all there is to RoRA, they
    agree to the noise between seeds.
    """
    lines = [
        line(
            "rank",
            "cells",
            "mean distance at the same lr",
            "mean distance at the same lr · s (LoRA at lr·√r)",
            "two seeds of one cell (cells)",
        ),
        "|--:|--:|--:|--:|--:|",
    ]
    for rank in axis(rows, "rank"):
        curves = {
            m: [
                (lr, mean(map(accuracy, found)))
                for lr, found in sorted(grid(rows, m, rank).items())
            ]
            for m in ("lora", "rora")
        }
        at, pairs = dict(curves["lora"]), []
        for lr, y in curves["rora"]:
            other = interpolated(curves["lora"], lr * math.sqrt(rank))
            if other is not None and lr in at:
                pairs.append((abs(y - at[lr]), abs(y - other)))
        same, swap = (f"{mean(p):.1f}" for p in zip(*pairs)) if pairs else ("–", "–")
        seeds = [
            list(by_seed(rows, m, rank, lr).values())
            for m in curves
            for lr in axis(chosen(rows, method=m, rank=rank), "lr")
        ]
        noise = [
            mean(abs(a - b) for a, b in combinations(values, 2))
            for values in seeds
            if len(values) > 1
        ]
        lines.append(
            line(
                rank, len(pairs), same, swap, f"{mean(noise):.1f} ({len(noise)})" if noise else "–"
            )
        )
    return "\n".join(lines)


def explained(points: list[tuple[float, float]], neighbours: int = 4) -> float:
    """Share of the variance of y that its nearest neighbours in x predict (ties in x all count), in
    percent, at least 0.
    """

    def guess(i: int) -> float:
        others = sorted((abs(x - points[i][0]), y) for j, (x, y) in enumerate(points) if j != i)
        reach = others[min(neighbours, len(others)) - 1][0] + 1e-9
        return mean(y for d, y in others if d <= reach)

    middle = mean(y for _, y in points)
    total = sum((y - middle) ** 2 for _, y in points) or 1.0
    return 100 * max(0.0, 1 - sum((y - guess(i)) ** 2 for i, (_, y) in enumerate(points)) / total)


def axes(rows: Runs) -> str:
    """On which axis are LoRA and RoRA, at all ranks, one curve?"""
    cells = [
        found
        for m in ("lora", "rora")
        for rank in axis(rows, "rank")
        for found in grid(rows, m, rank).values()
    ]
    lines = [
        line("axis x", "cells", "variance predicted by the nearest cells on x"),
        "|---|--:|--:|",
    ]
    for name, x in ABSCISSAS.items():
        points = [(math.log10(x(found[0])), mean(map(accuracy, found))) for found in cells]
        lines.append(line(name, len(points), f"{explained(points):.0f}%"))
    return "\n".join(lines)


def val_and_test(found: Runs) -> str:
    if not found:
        return "–"
    val = mean(accuracy(r, "val") for r in found)
    return f"{val:.1f} / {mean(map(accuracy, found)):.1f} ({len(found)})"


def cells(rows: Runs) -> str:
    """The whole grid: accuracy on the validation questions, by which the best are chosen, and on
    the test questions.
    """
    lrs = axis(rows, "lr")
    lines = [line("method", "rank", *(f"lr {lr:g}" for lr in lrs)), "|---|--:|" + "--:|" * len(lrs)]
    for m in METHODS:
        for rank in axis(chosen(rows, method=m), "rank"):
            runs = [chosen(rows, method=m, rank=rank, lr=lr) for lr in lrs]
            lines.append(line(NAMES[m], rank, *map(val_and_test, runs)))
    return "\n".join(lines)


def edges(rows: Runs) -> str:
    """Where learning sets in and where it breaks down: the range of accuracy over all methods and
    ranks, on two axes.
    """
    cells = [
        chosen(rows, method=m, rank=rank, lr=lr)
        for m in METHODS
        for rank in axis(rows, "rank")
        for lr in axis(rows, "lr")
    ]
    points = [
        (*(ABSCISSAS[name](found[0]) for name in ("lr · s · r", "lr")), mean(map(accuracy, found)))
        for found in cells
        if found
    ]
    lines = [line("", "cells", "least", "most"), "|---|--:|--:|--:|"]
    bounds = [0, 0.015, 0.025, 0.04, 0.06]
    for low, high in zip(bounds, bounds[1:]):
        if values := [y for x, _, y in points if low < x <= high]:
            lines.append(
                line(
                    f"lr · s · r from {low:g} to {high:g}",
                    len(values),
                    f"{min(values):.1f}",
                    f"{max(values):.1f}",
                )
            )
    for lr in axis(rows, "lr"):
        if values := [y for x, at, y in points if at == lr and x > bounds[-1]]:
            lines.append(
                line(f"above, lr {lr:g}", len(values), f"{min(values):.1f}", f"{max(values):.1f}")
            )
    return "\n".join(lines)


def best_rates(rows: Runs) -> str:
    """Where each method's best lr lies; were RoRA LoRA at lr·√r, the ratio would be √r."""
    edge = {(m, rank) for m, rank, _ in at_edge(rows)}
    lines = [
        line(
            "rank",
            *(f"{NAMES[m]}: best lr, test accuracy there" for m in METHODS),
            "LoRA's best / RoRA's best",
            "√r",
        ),
        "|--:|" + "--:|" * 5,
    ]
    for rank in axis(rows, "rank"):
        best = {m: best_lr(rows, m, rank) for m in METHODS}
        if None in best.values():
            continue
        cells = [
            f"{best[m]:g}{' (edge)' if (m, rank) in edge else ''}, "
            + pm(list(by_seed(rows, m, rank, best[m]).values()))
            for m in METHODS
        ]
        lines.append(
            line(rank, *cells, f"{best['lora'] / best['rora']:.1f}", f"{math.sqrt(rank):.1f}")
        )
    return "\n".join(lines)


def losses(rows: Runs) -> str:
    """Fig. 3 in numbers: the mean loss of a stretch of steps, at the largest rank and one lr."""
    rank, lr = axis(rows, "rank")[-1], common_lr(rows)
    stretches = {"10-20% of the steps": (0.1, 0.2), "40-50%": (0.4, 0.5), "last 10%": (0.9, 1.0)}
    lines = [
        line(f"rank {rank}, lr {lr:g}", *stretches, "best validation loss", "seeds"),
        "|---|--:|--:|--:|--:|--:|",
    ]
    for m in METHODS:
        runs = [r for r in chosen(rows, method=m, rank=rank, lr=lr) if not r["diverged"]]
        if runs:
            part = lambda r, a, b: mean(
                r["loss"][int(a * len(r["loss"])) : math.ceil(b * len(r["loss"]))]
            )
            two = lambda v: f"{mean(v):.3f}" + (f" ± {stdev(v):.3f}" if len(v) > 1 else "")
            lines.append(
                line(
                    NAMES[m],
                    *(two([part(r, *ab) for r in runs]) for ab in stretches.values()),
                    two([r["val_loss"] for r in runs]),
                    len(runs),
                )
            )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--results", type=Path, default=SWEEP, metavar="FILE")
    rows = load(parser.parse_args(argv).results)
    scored = [r for r in rows if r.get("test")]
    if not scored:
        raise SystemExit("every run diverged")
    swept = all(len(grid(rows, m)) > 1 for m in METHODS)
    first, alpha = scored[0], axis(rows, "alpha")
    errors = [sampling_error(r) for r in scored]
    print(
        f"{first['ckpt']} checkpoint {first['checkpoint']}: {len(rows)} runs, "
        f"{sum(r['diverged'] for r in rows)} diverged (they count as 0), "
        f"{sum(r['tokens'] for r in rows) / 1e6:.1f}M tokens on {first['device']}; "
        f"α {', '.join(f'{a:g}' for a in alpha)}; "
        f"lr {', '.join(f'{lr:g}' for lr in axis(rows, 'lr'))}; "
        f"n = {first['test']['n']} test questions in a run, sampling error of a mean at most "
        f"{max(errors):.1f} points; greedy decoding. "
        f"Best lrs are chosen on the {first['val']['n']} validation questions."
    )
    ways = three_ways(rows)
    for name, lr_of in ways.items() if swept else [next(iter(ways.items()))]:
        print("\n" + comparison(rows, f"Accuracy at {name}", lr_of))
        print("\n" + by_task(rows, name, lr_of))
        if any(r.get("strict") for r in rows) and name == "one lr for all":
            print("\n" + comparison(rows, f"Accuracy at {name}", lr_of, "strict"))
    print(f"\n### Loss (Fig. 3)\n\n{losses(rows)}")
    if swept:
        print(f"\n### The whole grid: val / test accuracy (seeds)\n\n{cells(rows)}")
        print(
            "\n### The best learning rates (neighbours in the grid lie a factor 2 to 2.5 apart)\n"
        )
        print(best_rates(rows))
        print(f"\n### RoRA at lr and LoRA at lr·√r, in points of test accuracy\n\n{swapped(rows)}")
        print(
            "\n### Where learning sets in and breaks down: test accuracy, all methods and ranks\n"
        )
        print(edges(rows))
        print(f"\n### One curve on which axis? LoRA and RoRA, all ranks\n\n{axes(rows)}")
    return 0


if __name__ == "__main__":
    as_page(main)
