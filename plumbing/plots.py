"""Pictures of runs, for `python eval.py --plot`: how they trained, and what they answer.

matplotlib is not among the packages that training needs: it is imported here, when it is called.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from data import TASKS
from eval import error_bar
from plumbing import run_folder
from plumbing.finding import read_scores
from plumbing.flags import FlagError

PANELS = {  # a column of metrics.jsonl: its title, the scale of its axis
    "loss": ("training loss per token", "log"),
    "val_loss": ("validation loss per token", "log"),
    "lr": ("learning rate", "linear"),
    "grad_norm": ("gradient norm before clipping", "log"),
}
LOOKS = [  # told apart without colour too
    ("#0072b2", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#009e73", "-.", "^"),
    ("#cc79a7", ":", "D"),
    ("#000000", (0, (5, 1, 1, 1)), "v"),
    ("#e69f00", (0, (1, 1)), "P"),
]
FORMATS = (".png", ".svg", ".pdf")


def plot_runs(folders: list[Path], out: Path | None) -> Path:
    """Draw runs into one picture, `out` or metrics.png in the first of them. Returns its path.

    A run that was not scored has curves only, a scored base model has bars only. Raises FlagError,
    RunError or CheckpointError.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FlagError(
            "--plot needs matplotlib, which is not installed: pip install 'matplotlib>=3.8'"
        ) from None
    out = out or folders[0] / "metrics.png"
    if out.suffix not in FORMATS:
        raise FlagError(f"--out {out}: its name must end in {', '.join(FORMATS)}")
    curves = [read_metrics(folder) for folder in folders]
    scores = [(read_scores(folder) or {"tasks": {}})["tasks"] for folder in folders]
    for folder, has_curves, has_scores in zip(folders, curves, scores):
        if not has_curves and not has_scores:
            raise FlagError(f"{folder}: neither metrics.jsonl nor eval/results.json in it: no run")
    run_folder.check_writable(out.parent)

    fig = Figure(figsize=(10, 9.5), layout="constrained")
    axes = fig.subplot_mosaic([["loss", "val_loss"], ["lr", "grad_norm"], ["bars", "bars"]])
    for column, (title, scale) in PANELS.items():
        draw_curves(axes[column], [run.get(column) for run in curves], scale)
        axes[column].set_title(title)
    draw_bars(axes["bars"], scores)
    for ax in axes.values():
        ax.grid(color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    handles = [axes["loss"].plot([], [], **look(i))[0] for i in range(len(folders))]
    legend = fig.legend(handles, names(folders), loc="outside upper center", ncols=3, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a $
    with run_folder.replaced_files(out.parent) as temporary:
        fig.savefig(temporary / out.name, dpi=130)
    return out


def read_metrics(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """{column: (steps, values)} of metrics.jsonl. A line that is just being written is passed
    over."""
    columns: dict[str, tuple[list[int], list[float]]] = {}
    path = folder / "metrics.jsonl"
    text = path.read_text(errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = {key: float(value) for key, value in json.loads(line).items()}
            step = int(row["step"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            continue
        for column in PANELS.keys() & row.keys():
            steps, values = columns.setdefault(column, ([], []))
            steps.append(step)
            values.append(row[column])
    return columns


def draw_curves(ax, curves: list[tuple[list[int], list[float]] | None], scale: str) -> None:
    """A line per run: a running mean, what it is the mean of behind it."""
    drawn = [curve for curve in curves if curve]
    if not drawn:
        say(ax, "nothing recorded")
        return
    for i, curve in enumerate(curves):
        if curve is None:
            continue
        steps, values = curve
        window = 1 if scale == "linear" else max(1, len(values) // 30)
        if window > 1:
            ax.plot(steps, values, color=look(i)["color"], alpha=0.25, linewidth=0.7)
        few = len(steps) < 20  # points that can be told apart get their marks
        ax.plot(steps, running_mean(values, window), **look(i) | ({} if few else {"marker": ""}))
    ax.set_xlim(0, 1.02 * max(steps[-1] for steps, _ in drawn))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("step")
    values = [value for _, curve in drawn for value in curve]
    if scale == "log" and max(values) > 2 * min(values):  # else log's labels lie on one another
        ax.set_yscale(scale)
        ax.yaxis.set_major_formatter("{x:g}")
        low, high = ax.get_ylim()
        ax.yaxis.set_minor_formatter("{x:g}" if high < 30 * low else "")


def say(ax, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", color="0.4")
    ax.set(xticks=[], yticks=[])


def running_mean(values: list[float], window: int) -> list[float]:
    """Each value the mean of the last `window` ones."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [math.fsum(part) / len(part) for part in parts]


def draw_bars(ax, scores: list[dict[str, dict]]) -> None:
    """Accuracy by task: a bar for each scored run, its standard error, and the constant answer."""
    tasks = [task for task in TASKS if any(task in run for run in scores)]
    if not tasks:
        say(ax, "not scored yet: python eval.py RUN")
        ax.set_title("accuracy by task")
        return
    scored = [i for i, run in enumerate(scores) if run]
    width = 0.8 / len(scored)
    for place, i in enumerate(scored):
        rows = [(at, scores[i][task]) for at, task in enumerate(tasks) if task in scores[i]]
        ax.bar(
            [at + (place - (len(scored) - 1) / 2) * width for at, _ in rows],
            [row["accuracy"] for _, row in rows],
            width * 0.9,
            yerr=[error_bar(row["accuracy"], row["n"]) for _, row in rows],
            color=look(i)["color"],
            hatch=[None, "//", "..", "xx", "\\\\", "++"][i % len(LOOKS)],
            edgecolor="white",
            error_kw={"elinewidth": 1, "capsize": 2},
        )
    for at, row in constants(tasks, scores):
        ax.hlines(row["constant"], at - 0.45, at + 0.45, color="0.2", linestyle=":", linewidth=1.2)
    counts = sorted({row["n"] for run in scores for row in run.values()})
    asked = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    ax.set_title(
        f"accuracy by task, % of {asked} questions, ± one standard error; "
        "dotted: always the most frequent answer"
    )
    ax.set_xticks(range(len(tasks)), tasks)
    ax.set_ylim(0, 105)


def constants(tasks: list[str], scores: list[dict[str, dict]]) -> Iterator[tuple[int, dict]]:
    """(place of the task, the row of the first run that answered it)."""
    for at, task in enumerate(tasks):
        yield at, next(run[task] for run in scores if task in run)


def look(i: int) -> dict:
    color, line, marker = LOOKS[i % len(LOOKS)]
    return {"color": color, "linestyle": line, "marker": marker, "linewidth": 1.5}


def names(folders: list[Path]) -> list[str]:
    """The folders' own names; their whole paths where two would read alike."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
