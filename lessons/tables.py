"""The paper's Tables I and II with our rows under them, in Markdown, and what in the paper's
numbers cannot be.

    python lessons/tables.py > lessons/results/tables.md
    python lessons/tables.py --best    our rows at each method's and rank's best lr (by val)
    python lessons/tables.py --runs runs/llama-7b-*
                                       besides: scored run folders of the paper's own models

paper.tsv holds the paper's numbers as printed. Nothing says there which of them are wrong: this
script finds out, in exact arithmetic. An average may be printed as d if it lies within 0.05 of d;
on a border (72.25 as 72.2) it is called a tie.
"""

import argparse
import csv
import json
import sys
from fractions import Fraction
from pathlib import Path
from statistics import mean, stdev

from rows import (
    as_page,
    HERE,
    METHODS,
    NAMES,
    RESULTS,
    accuracy,
    axis,
    best_lr,
    chosen,
    common_lr,
    line,
    load,
)

TASKS = {
    "boolq": 3270,
    "piqa": 1838,
    "social_i_qa": 1954,
    "hellaswag": 10042,
    "winogrande": 1267,
    "ARC-Easy": 2376,
    "ARC-Challenge": 1172,
    "openbookqa": 500,
}  # questions in the real test sets
MODELS = {
    "llama-7b": "LLaMA-7B",
    "llama-13b": "LLaMA-13B",
    "llama2-7b": "LLaMA2-7B",
    "llama3-8b": "LLaMA3-8B",
    "sheared-llama-1.3b": "Sheared-LLaMA-1.3B",
}
DELTAS = [
    ("RoRA over LoRA, LLaMA-7B", "6.5", "LLaMA-7B", "LoRA"),
    ("RoRA over DoRA, LLaMA-7B", "2.9", "LLaMA-7B", "DoRA"),
    ("best RoRA over best LoRA, Sheared-LLaMA-1.3B", "5.7", "Sheared-LLaMA-1.3B", "LoRA"),
    ("best RoRA over best DoRA, Sheared-LLaMA-1.3B", "3.9", "Sheared-LLaMA-1.3B", "DoRA"),
]  # as the abstract says
DASH = "–"


# --- the paper's numbers ------------------------------------------------------------------------


def paper() -> list[dict]:
    with (HERE / "paper.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def average(row: dict) -> Fraction:
    """Recomputed from the row's eight numbers, exactly."""
    return sum(Fraction(row[t]) for t in TASKS) / len(TASKS)


def verdict(printed: str, exact: Fraction) -> str:
    """ok, tie or misprint: could `exact` be printed so, to one decimal?"""
    off = abs(Fraction(printed) - exact)
    return "ok" if off < Fraction(1, 20) else "tie" if off == Fraction(1, 20) else "misprint"


def possible(printed: str, n: int) -> bool:
    """Whether some count of right answers out of n is this percentage, to one decimal (ties either
    way).
    """
    near = int(Fraction(printed) * n / 100)
    return any(
        verdict(printed, Fraction(100 * k, n)) != "misprint" for k in (near - 1, near, near + 1)
    )


def delta(model: str, other: str) -> Fraction:
    """RoRA's best average of a model over another method's best."""
    best = lambda method: max(
        average(r) for r in paper() if r["model"] == model and r["method"] == method
    )
    return best("RoRA") - best(other)


def alike(rows: list[dict], least: int = 5) -> list[tuple[int, dict, dict]]:
    """Pairs of rows that share at least `least` of eight numbers: more than chance explains."""
    pairs = [
        (sum(a[t] == b[t] for t in TASKS), a, b) for i, a in enumerate(rows) for b in rows[i + 1 :]
    ]
    return [p for p in pairs if p[0] >= least]


def decimals(x: Fraction) -> str:
    return f"{float(x):.4f}".rstrip("0").rstrip(".")


def paper_line(row: dict) -> str:
    exact = average(row)
    marks = {
        "ok": row["average"],
        "tie": f"{row['average']} (tie: {decimals(exact)})",
        "misprint": f"{row['average']} (misprint: **{decimals(exact)}**)",
    }
    cells = [row[t] + ("" if possible(row[t], n) else " †") for t, n in TASKS.items()]
    return line(
        row["model"],
        row["method"],
        row["rank"],
        "paper",
        DASH,
        DASH,
        *cells,
        marks[verdict(row["average"], exact)],
    )


# --- ours ---------------------------------------------------------------------------------------


def pm(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def method_name(settings: dict) -> str:
    name = NAMES.get(settings["method"], settings["method"].capitalize())
    return name + (" α/√r" if settings["method"] == "dora" and settings["scale"] == "sqrt" else "")


def our_line(model: str, rows: list[dict]) -> str:
    """One line for the seeds of one setting."""
    s, scored = (
        rows[0]["settings"],
        [r for r in rows if r.get("test")],
    )  # one that diverged has no scores; its average counts as 0
    if not scored:
        return line(
            model,
            method_name(s),
            s["rank"],
            f"ours, lr {s['lr']:g}: diverged",
            len(rows),
            *[DASH] * 10,
        )
    cell = lambda t: (
        pm([r["test"]["tasks"][t] for r in scored])
        if all(t in r["test"]["tasks"] for r in scored)
        else DASH
    )
    means = [accuracy(r) for r in rows]
    lost = f", {len(rows) - len(scored)} diverged" if len(scored) < len(rows) else ""
    return line(
        model,
        method_name(s),
        s["rank"],
        f"ours, lr {s['lr']:g}{lost}",
        len(rows),
        scored[0]["test"]["n"],
        *map(cell, TASKS),
        DASH if None in means else f"**{pm(means)}**",
    )


def from_runs(folders: list[Path]) -> dict[str, list[dict]]:
    """{model: rows} of scored run folders."""
    found: dict[str, list[dict]] = {}
    for folder in folders:
        try:
            record, results = (
                json.loads((folder / name).read_text())
                for name in ("run.json", "eval/results.json")
            )
        except (FileNotFoundError, NotADirectoryError):
            print(f"note: {folder} is not a scored run; it is left out", file=sys.stderr)
            continue
        tasks = {t: r["accuracy"] for t, r in results["tasks"].items()}
        ckpt = Path(record["settings"]["ckpt"]).name
        if ckpt not in MODELS:
            print(
                f"note: {folder} is of {ckpt}, which is no model of the paper's; it is left out",
                file=sys.stderr,
            )
            continue
        found.setdefault(MODELS[ckpt], []).append(
            {
                "settings": record["settings"],
                "world": [record["base_sha256"], record["data_sha256"], results["limit"]],
                "test": {
                    "mean": results["mean"],
                    "n": sum(r["n"] for r in results["tasks"].values()),
                    "tasks": tasks,
                },
            }
        )
    return found


def by_setting(rows: list[dict]) -> list[list[dict]]:
    """Runs that differ in nothing but the seed, together."""
    groups: dict[str, list[dict]] = {}
    for r in rows:
        same = [r.get("world"), {k: v for k, v in r["settings"].items() if k != "seed"}]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(r)
    order = lambda s: (s["rank"], METHODS.index(s["method"]) if s["method"] in METHODS else -1)
    return sorted(groups.values(), key=lambda g: order(g[0]["settings"]))


def from_sweep(path: Path, best: bool) -> list[dict]:
    """The sweep's rows for the table: those at one lr, or at each cell's best."""
    rows = load(path)
    if not best:
        return chosen(rows, lr=common_lr(rows))
    return [
        r
        for m in axis(rows, "method")
        for rank in axis(chosen(rows, method=m), "rank")
        for r in chosen(rows, method=m, rank=rank, lr=best_lr(rows, m, rank))
    ]


def table(name: str, runs: dict[str, list[dict]], sweeps: list[Path], best: bool) -> str:
    """The paper's rows, ours of the same model and method below each (a dash where nothing was
    run), then our small models.
    """
    lines = [
        line("model", "method", "rank", "whose", "seeds", "n", *TASKS, "average"),
        "|---|---|--:|---|--:|--:|" + "--:|" * 9,
    ]
    groups, shown = {model: by_setting(rows) for model, rows in runs.items()}, []
    for row in [r for r in paper() if r["table"] == name]:
        lines.append(paper_line(row))
        mine = [
            g
            for g in groups.get(row["model"], [])
            if method_name(g[0]["settings"]) == row["method"]
            and row["rank"] in (DASH, str(g[0]["settings"]["rank"]))
        ]
        lines += [our_line(row["model"], g) for g in mine] or [
            line(row["model"], row["method"], row["rank"], "ours", *[DASH] * 11)
        ]
        shown += map(id, mine)
    lines += [
        our_line(model, g)
        for model in runs
        if any(r["table"] == name and r["model"] == model for r in paper())
        for g in groups[model]
        if id(g) not in shown
    ]  # settings that the paper has no row of
    for path in sweeps:
        rows = from_sweep(path, best)
        lines += [our_line(Path(rows[0]["ckpt"]).name, g) for g in by_setting(rows)]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--runs", nargs="+", type=Path, default=[], metavar="RUN")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="of sweep.jsonl and sweep-CKPT.jsonl",
    )
    args = parser.parse_args(argv)
    runs = from_runs(args.runs)
    pruned = lambda path: any(word in path.name for word in ("pruned", "healed", "sheared"))
    sweeps = sorted(args.results.glob("sweep*.jsonl"))
    print(
        "paper: as printed, one run for each row. ours: greedy decoding (the paper: four beams), "
        "mean ± standard deviation over seeds; n: test questions in a run; "
        f"{DASH}: not run, or not said. The small models answer questions about a closed world of "
        "their own, not the real test sets.\n"
        "misprint, tie: the average printed, and recomputed from the row's eight numbers. "
        "†: no count of right answers gives this percentage."
    )
    for name, title in [
        (
            "I",
            "LLaMA-7B/13B, LLaMA2-7B, LLaMA3-8B (the paper says no ranks here; its text: "
            "RoRA's 81.3 is at 128)",
        ),
        ("II", "pruned models, by rank"),
    ]:
        mine = [p for p in sweeps if pruned(p) == (name == "II")]
        print(f"\n## Table {name}: {title}\n\n{table(name, runs, mine, args.best)}")
    print("\n## The differences in the paper's abstract\n")
    print(line("difference", "printed", "recomputed", "verdict") + "\n|---|--:|--:|---|")
    for what, printed, model, other in DELTAS:
        exact = delta(model, other)
        print(line(what, printed, decimals(exact), verdict(printed, exact)))
    second = [r for r in paper() if r["table"] == "II"]
    above = sum(Fraction(r["ARC-Challenge"]) > Fraction(r["ARC-Easy"]) for r in second)
    print(
        f"\nTable II has ARC-Challenge above ARC-Easy in {above} of {len(second)} rows. "
        "Rows of it that share most of their numbers: "
        + "; ".join(
            f"{a['method']} r={a['rank']} and {b['method']} r={b['rank']}, {same} of 8"
            for same, a, b in alike(second)
        )
        + "."
    )
    return 0


if __name__ == "__main__":
    as_page(main)
