"""Pictures of the sweep, as PNG in lessons/figures/. Needs matplotlib and no torch.

    python lessons/plot.py                  every picture that the results allow
    python lessons/plot.py fig1 fig3        some of: fig1 fig3 grid collapse fig1_lr

    fig1       the paper's Fig. 1: accuracy against rank at one lr, mean and standard deviation
    fig3       the paper's Fig. 3: loss against step at one rank
    grid       accuracy against lr, and against lr·s, a panel for each rank (s: α/r or α/√r)
    collapse   all cells of the grid in one panel, against lr, lr·s, lr·s·√r, lr·s·r: on which axis
               do the methods fall together?
    fig1_lr    Fig. 1 three times: at one lr, at each method's best lr, and at its best at each rank

Legible without colour: a marker and a line style a method. The same results give the same
picture.
"""

import argparse
import sys
import textwrap
from pathlib import Path
from statistics import mean

from rows import (
    as_page,
    ABSCISSAS,
    HERE,
    METHODS,
    NAMES,
    SWEEP,
    accuracy,
    axis,
    chosen,
    common_lr,
    grid,
    load,
    spread,
    three_ways,
)

LOOK = {
    "lora": {"color": "black", "marker": "o", "linestyle": "-", "markerfacecolor": "black"},
    "dora": {"color": "#3b7dbd", "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
    "rora": {"color": "#c03a1b", "marker": "^", "linestyle": "-.", "markerfacecolor": "#c03a1b"},
}
SPLIT_NAMES = {
    "test": "test: facts in no fine-tuning record",
    "strict": "strict: facts only ever stated",
}


def pyplot(program: str):
    """matplotlib.pyplot, set so that equal results give equal files; None, after a line that says
    so, where it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        print(
            f"{program}: pictures need matplotlib, which is not installed: "
            'pip install "matplotlib>=3.8"',
            file=sys.stderr,
        )
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "savefig.dpi": 160})
    return plt


def save(plt, fig, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.png", metadata={"Software": None})
    plt.close(fig)
    print(f"saved {folder / name}.png")


def smooth(losses: list[float], window: int) -> list[float]:
    """Each value the mean of the last `window` ones."""
    return [mean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]


def listed(values) -> str:
    return ", ".join(f"{v:g}" for v in values)


def caption(rows: list[dict], said: str, scores: bool = True) -> str:
    """What a picture rests on: questions, seeds, α, checkpoint."""
    n = max((r["test"]["n"] for r in rows if r.get("test")), default=0)
    diverged = sum(r["diverged"] for r in rows)
    asked = f"n = {n} test questions in a run, 8 tasks, greedy; seeds" if scores else "Seeds"
    return (
        f"{said} {asked} {listed(axis(rows, 'seed'))}; α = {listed(axis(rows, 'alpha'))}; "
        f"{max(r['tokens'] for r in rows):,} training tokens in a run; "
        f"{rows[0]['ckpt']} checkpoint {rows[0]['checkpoint'][:8]}; "
        f"{', '.join(sorted({r['device'] for r in rows}))}."
        + (f" Runs that diverged count as 0: {diverged}." if diverged else "")
    )


def finish(fig, text: str, axes) -> None:
    """One legend above, the caption below, on every picture alike."""
    for ax in fig.axes:
        ax.grid(color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    fig.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        handlelength=3.5,
    )
    fig.supxlabel(
        "\n".join(textwrap.wrap(text, int(fig.get_figwidth() * 17))),
        fontsize=7.5,
        x=0.01,
        ha="left",
        color="0.25",
    )


def show_ranks(ax, ranks: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks, [str(r) for r in ranks])
    ax.minorticks_off()
    ax.set_xlabel("rank r")


def rank_curves(ax, rows: list[dict], lr_of, split: str = "test") -> list[dict]:
    """Accuracy against rank, three methods; lr_of(method, rank) says which runs. Returns them."""
    used = []
    for i, m in enumerate(METHODS):
        cells = [
            (rank, chosen(rows, method=m, rank=rank, lr=lr_of(m, rank)))
            for rank in axis(chosen(rows, method=m), "rank")
        ]
        cells = [
            (rank, [r for r in found if r["diverged"] or r.get(split)]) for rank, found in cells
        ]
        cells = [(rank, found) for rank, found in cells if found]
        used += [r for _, found in cells for r in found]
        values = [[accuracy(r, split) for r in found] for _, found in cells]
        ax.errorbar(
            [rank * 1.045 ** (i - 1) for rank, _ in cells],
            [mean(v) for v in values],
            [spread(v) for v in values],
            capsize=3,
            label=NAMES[m],
            **LOOK[m],
        )  # moved apart by a hair, so that bars do not hide each other
    show_ranks(ax, axis(rows, "rank"))
    return used


def fig1(plt, rows: list[dict], rank: int | None):
    lr = common_lr(rows)
    splits = [s for s in SPLIT_NAMES if any(r.get(s) for r in chosen(rows, lr=lr))]
    fig, axes = plt.subplots(
        1,
        len(splits),
        figsize=(4.6 * len(splits), 4.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, split in zip(axes[0], splits):
        used = rank_curves(ax, rows, lambda m, r: lr, split)
        ax.set_title(
            SPLIT_NAMES[split] + f" (n = {max(r[split]['n'] for r in used if r.get(split))})",
            fontsize=9,
        )
    axes[0, 0].set_ylabel("accuracy, mean of 8 tasks, %")
    finish(
        fig,
        caption(
            chosen(rows, lr=lr),
            f"Accuracy against rank at one learning rate, {lr:g}: mean ± standard deviation over "
            "seeds.",
        ),
        axes[0, 0],
    )
    return fig


def fig3(plt, rows: list[dict], rank: int | None, window: int = 5):
    lr, rank = (
        common_lr(rows),
        rank or axis(rows, "rank")[-1],
    )  # the paper's 128 is the largest of its Fig. 1
    used = [r for r in chosen(rows, lr=lr, rank=rank) if not r["diverged"]]
    if not used:
        raise SystemExit(
            f"plot: no finished run at rank {rank} and lr {lr:g}; "
            f"there are ranks {listed(axis(rows, 'rank'))}"
        )
    lost = len(chosen(rows, lr=lr, rank=rank)) - len(used)
    fig, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for m in METHODS:
        curves = [smooth(r["loss"], window) for r in chosen(used, method=m)]
        if not curves:
            continue
        every = chosen(used, method=m)[0]["loss_every"]
        steps = [every * (i + 1) for i in range(len(curves[0]))]
        ax.fill_between(
            steps,
            [min(v) for v in zip(*curves)],
            [max(v) for v in zip(*curves)],
            color=LOOK[m]["color"],
            alpha=0.15,
            linewidth=0,
        )
        ax.plot(
            steps,
            [mean(v) for v in zip(*curves)],
            markevery=(3 * METHODS.index(m), 12),
            markersize=4.5,
            linewidth=1.3,
            label=NAMES[m],
            **LOOK[m],
        )
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ticks = [digit * 10.0**power for power in range(-4, 3) for digit in (1, 2, 5)]
    ax.set_yticks(
        [t for t in ticks if low <= t <= high], [f"{t:g}" for t in ticks if low <= t <= high]
    )
    ax.minorticks_off()
    ax.set(xlabel="step", ylabel="training loss per token (log scale)")
    finish(
        fig,
        caption(
            used,
            f"Loss against step at rank {rank}, lr {lr:g}, s = "
            + ", ".join(
                f"{chosen(used, method=m)[0]['scale']:.3g} ({NAMES[m]})"
                for m in METHODS
                if chosen(used, method=m)
            )
            + f": mean over the last {window * used[0]['loss_every']} steps and over seeds; "
            + "shaded: lowest to highest seed."
            + (f" Diverged and not drawn: {lost}." if lost else ""),
            scores=False,
        ),
        ax,
    )
    return fig


def lr_curves(
    rows: list[dict], m: str, rank: int, x
) -> tuple[list[float], list[float], list[float]]:
    """(x, mean accuracy, spread) along the grid of a method at a rank."""
    cells = grid(rows, m, rank).values()
    values = [[accuracy(r) for r in found] for found in cells]
    return [x(found[0]) for found in cells], [mean(v) for v in values], [spread(v) for v in values]


def all_cells(rows: list[dict]) -> list[dict]:
    """The runs of the grid."""
    return [
        r
        for m in METHODS
        for rank in axis(chosen(rows, method=m), "rank")
        for found in grid(rows, m, rank).values()
        for r in found
    ]


def grid_lr(plt, rows: list[dict], rank: int | None):
    ranks, names = axis(rows, "rank"), ["lr", "lr · s"]
    fig, axes = plt.subplots(
        2,
        len(ranks),
        figsize=(2.3 * len(ranks) + 1, 5.6),
        sharey=True,
        sharex="row",
        squeeze=False,
        layout="constrained",
    )
    for i, name in enumerate(names):
        for ax, r in zip(axes[i], ranks):
            for m in METHODS:
                x, y, bar = lr_curves(rows, m, r, ABSCISSAS[name])
                ax.errorbar(
                    x, y, bar, capsize=2, label=NAMES[m], markersize=5, linewidth=1.2, **LOOK[m]
                )
            ax.set_xscale("log")
            ax.set_xlabel(name)
            ax.set_title(f"rank {r}" if i == 0 else "", fontsize=9)
        axes[i, 0].set_ylabel("test accuracy, %")
    finish(
        fig,
        caption(
            all_cells(rows),
            "Accuracy against learning rate (above) and against lr · s (below), a panel for each "
            "rank; s = α/r for LoRA and DoRA, α/√r for RoRA.",
        ),
        axes[0, 0],
    )
    return fig


def collapse(plt, rows: list[dict], rank: int | None):
    ranks = axis(rows, "rank")
    fig, axes = plt.subplots(
        1, len(ABSCISSAS), figsize=(12, 4.2), sharey=True, layout="constrained"
    )
    for ax, (name, x) in zip(axes, ABSCISSAS.items()):
        for m in METHODS:
            for r in ranks:
                at, y, _ = lr_curves(rows, m, r, x)
                ax.plot(
                    at,
                    y,
                    **LOOK[m] | {"linestyle": "none", "markerfacecolor": "none"},
                    markersize=4 + 2.5 * ranks.index(r),
                    label=NAMES[m] if r == ranks[len(ranks) // 2] else None,
                )
        ax.set_xscale("log")
        ax.set_xlabel(name)
    axes[0].set_ylabel("test accuracy, %")
    finish(
        fig,
        caption(
            all_cells(rows),
            "Every cell of the grid on four axes; the marker's size grows with the rank, "
            f"{listed(ranks)}. Where the points fall on one curve, the axis explains the accuracy.",
        ),
        axes[0],
    )
    return fig


def fig1_lr(plt, rows: list[dict], rank: int | None):
    ways = three_ways(rows)
    fig, axes = plt.subplots(1, 3, figsize=(11.5, 4.6), sharey=True, layout="constrained")
    used = []
    for ax, (name, lr_of) in zip(axes, ways.items()):
        mine = rank_curves(ax, rows, lr_of)
        ax.set_title(f"{name} (seeds {listed(axis(mine, 'seed'))})", fontsize=9)
        used += mine
    axes[0].set_ylabel("test accuracy, mean of 8 tasks, %")
    _, own, each = ways.values()
    ranks = {m: axis(chosen(rows, method=m), "rank") for m in METHODS}
    best = "; ".join(
        f"{NAMES[m]} {own(m, 0):g}, by rank {listed(each(m, r) for r in ranks[m])}" for m in METHODS
    )
    finish(
        fig,
        caption(
            used,
            f"Fig. 1 at one lr, {common_lr(rows):g}, and at the best lr by validation accuracy: "
            f"{best}. Bars: standard deviation over the seeds there are.",
        ),
        axes[0],
    )
    return fig


PICTURES = {"fig1": fig1, "fig3": fig3, "grid": grid_lr, "collapse": collapse, "fig1_lr": fig1_lr}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="default: all")
    parser.add_argument("--results", type=Path, default=SWEEP, metavar="FILE")
    parser.add_argument("--out", type=Path, default=HERE / "figures", metavar="DIR")
    parser.add_argument("--rank", type=int, metavar="N", help="of fig3 (default: the largest)")
    args = parser.parse_args(argv)
    if unknown := set(args.pictures) - PICTURES.keys():
        parser.error(f"no picture {min(unknown)}; choose from {', '.join(PICTURES)}")
    if not (plt := pyplot("plot")):
        return 1
    rows = load(args.results)
    swept = all(len(grid(rows, m)) > 1 for m in METHODS)
    ending = (
        "" if args.results.stem == "sweep" else f"-{args.results.stem.removeprefix('sweep-')}"
    )  # fig1-tiny-pruned.png, beside tiny's
    for name in args.pictures or PICTURES:
        if name not in ("fig1", "fig3") and not swept:
            print(
                f"plot: {name} needs several lrs: python lessons/sweep.py grid"
                f"{'' if args.results == SWEEP else f' --results {args.results}'}",
                file=sys.stderr,
            )
            continue
        save(plt, PICTURES[name](plt, rows, args.rank), args.out, name + ending)
    return 0


if __name__ == "__main__":
    as_page(main)
