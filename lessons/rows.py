"""What the lessons share: results files, one JSON line a finished run, and how runs are chosen and
averaged.

Standard library alone: pictures and tables need no torch. A line belongs to a condition: the bytes
of checkpoint and questions and every setting but the axes of the sweep. Lines of different
conditions are never averaged or compared.
"""

import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
SWEEP = RESULTS / "sweep.jsonl"
METHODS = ("lora", "dora", "rora")
NAMES = {"lora": "LoRA", "dora": "DoRA", "rora": "RoRA"}
AXES = ("method", "scale", "rank", "lr", "seed")  # scale follows from the method
SPLITS = {"test": "data", "val": "val", "strict": "strict"}  # folders in tiny/

ABSCISSAS = {  # what accuracy may be drawn against; s is the effective scale
    "lr": lambda r: r["settings"]["lr"],
    "lr · s": lambda r: r["settings"]["lr"] * r["scale"],
    "lr · s · √r": lambda r: r["settings"]["lr"] * r["scale"] * r["settings"]["rank"] ** 0.5,
    "lr · s · r": lambda r: r["settings"]["lr"] * r["scale"] * r["settings"]["rank"],
}


def as_page(main: Callable[[list[str]], int]) -> None:
    """Run a script whose output becomes a page: in UTF-8, whatever the terminal can show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    sys.exit(main(sys.argv[1:]))


def line(*cells) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(map(str, cells)) + " |"


def digest(files: list[Path]) -> str:
    """One hash for names and bytes of some files."""
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(
            f"{path.parent.name}/{path.name}\n".encode()
            + hashlib.sha256(path.read_bytes()).digest()
        )
    return total.hexdigest()[:16]


def checkpoint_digest(folder: Path) -> str:
    """Of the weights themselves, not of their sizes: a checkpoint made anew is another one."""
    small = ("config.json", "tokenizer.model", "tokenizer.json")
    return digest([p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name in small])


def questions_digest(homes: Iterable[Path]) -> str:
    """Of all records in some folders, those trained on included."""
    return digest([p for home in homes for p in home.rglob("*.json")])


def read(path: Path) -> list[dict]:
    """The lines of a results file; one that a crash cut short is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"note: {path}: a line cut short is passed over", file=sys.stderr)
    return found


def append(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut + json.dumps(row, ensure_ascii=False) + "\n")


def key(row: dict) -> str:
    """What a run is: equal keys, equal results."""
    return json.dumps(
        [row[k] for k in ("checkpoint", "questions", "limit", "settings")], sort_keys=True
    )


def condition(row: dict) -> str:
    return key(row | {"settings": {k: v for k, v in row["settings"].items() if k not in AXES}})


def load(path: Path) -> list[dict]:
    """The runs of the condition that was added to last, each run's last line. Raises SystemExit
    where there are none.
    """
    every = read(path)
    if not every:
        raise SystemExit(f"{path} holds no results; python lessons/sweep.py fig1 makes them")
    if every[-1]["limit"] or every[-1]["settings"]["max_steps"]:
        raise SystemExit(f"{path} holds trial runs: their numbers mean nothing, and none are shown")
    chosen = {key(r): r for r in every if condition(r) == condition(every[-1])}
    if left := len({key(r) for r in every}) - len(chosen):
        print(
            f"note: {path}: {left} runs of another checkpoint, other questions or settings are out",
            file=sys.stderr,
        )
    if every[-1]["ckpt"] == "tiny" and every[-1]["checkpoint"] != checkpoint_digest(ROOT / "tiny"):
        print(
            f"note: {path} is of an earlier tiny checkpoint ({every[-1]['checkpoint']})",
            file=sys.stderr,
        )
    return list(chosen.values())


def chosen(rows: list[dict], **wanted) -> list[dict]:
    """Rows by axis: chosen(rows, method="rora", rank=32, lr=3e-3)."""
    return [r for r in rows if all(r["settings"][k] == v for k, v in wanted.items())]


def axis(rows: list[dict], name: str) -> list:
    return sorted({r["settings"][name] for r in rows})


def accuracy(row: dict, split: str = "test") -> float:
    """Percent, mean of the tasks. A run that diverged counts as 0, whatever it had saved before."""
    return row[split]["mean"] if row.get(split) else 0.0


def spread(values: list[float]) -> float:
    """Standard deviation over seeds; 0 where there is one seed: then the caption must say so."""
    return stdev(values) if len(values) > 1 else 0.0


def common_lr(rows: list[dict]) -> float:
    """The one lr that Fig. 1 is drawn at: the one with most seeds, then most runs."""
    return max(
        axis(rows, "lr"),
        key=lambda lr: (len(axis(chosen(rows, lr=lr), "seed")), len(chosen(rows, lr=lr))),
    )


def grid(rows: list[dict], method: str, rank: int | None = None) -> dict[float, list[dict]]:
    """{lr: runs}, over the ranks and seeds that every lr was run with, so that no lr is judged by a
    luckier seed. Ranks with one lr alone, those of fig1 that the grid has not come to, are no part
    of it.
    """
    mine = [r for r in chosen(rows, method=method) if rank in (None, r["settings"]["rank"])]
    ranks = [k for k in axis(mine, "rank") if len(axis(chosen(mine, rank=k), "lr")) > 1] or axis(
        mine, "rank"
    )
    mine = [r for r in mine if r["settings"]["rank"] in ranks]
    runs = {lr: chosen(mine, lr=lr) for lr in axis(mine, "lr")}
    runs = {lr: found for lr, found in runs.items() if axis(found, "rank") == ranks}
    cell = lambda r: (r["settings"]["rank"], r["settings"]["seed"])
    shared = (
        set.intersection(*({cell(r) for r in found} for found in runs.values())) if runs else set()
    )
    return (
        {lr: [r for r in found if cell(r) in shared] for lr, found in runs.items()}
        if shared
        else {}
    )


def ranking(rows: list[dict], method: str, rank: int | None = None) -> list[float]:
    """The grid's lrs by accuracy on the validation questions (never the test's), best first; rank
    None: one lr for all ranks.
    """
    found = grid(rows, method, rank)
    return sorted(found, key=lambda lr: -mean(accuracy(r, "val") for r in found[lr]))


def best_lr(rows: list[dict], method: str, rank: int | None = None) -> float | None:
    """The best by all the seeds that the grid's two best share, among all lrs run with these: one
    seed cannot tell neighbours apart.
    """
    found = {lr: {} for lr in grid(rows, method, rank)}
    for r in chosen(rows, method=method):
        if r["settings"]["lr"] in found and rank in (None, r["settings"]["rank"]):
            found[r["settings"]["lr"]][r["settings"]["rank"], r["settings"]["seed"]] = accuracy(
                r, "val"
            )
    shared = (
        set.intersection(*(set(found[lr]) for lr in ranking(rows, method, rank)[:2]))
        if found
        else set()
    )
    return max(
        (lr for lr in found if shared <= found[lr].keys()),
        key=lambda lr: mean(found[lr][cell] for cell in shared),
        default=None,
    )


def at_edge(rows: list[dict]) -> list[tuple[str, int, float]]:
    """(method, rank, best lr) where the best is the grid's first or last: the true best may lie
    outside.
    """
    cells = [
        (m, rank, best_lr(rows, m, rank))
        for m in METHODS
        for rank in axis(chosen(rows, method=m), "rank")
    ]
    return [
        (m, rank, lr)
        for m, rank, lr in cells
        if lr in (min(grid(rows, m, rank), default=0), max(grid(rows, m, rank), default=0))
    ]


def three_ways(rows: list[dict]) -> dict[str, Callable[[str, int], float | None]]:
    """Fig. 1's three readings: which lr a method is shown at, at a rank."""
    shared, own = common_lr(rows), {m: best_lr(rows, m) for m in METHODS}
    return {
        "one lr for all": lambda m, rank: shared,
        "each method's best lr": lambda m, rank: own[m],
        "each method's best lr at each rank": lambda m, rank: best_lr(rows, m, rank),
    }
