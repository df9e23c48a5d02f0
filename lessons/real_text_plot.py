"""The curves of real_text.py as a picture, and their ends as a table. Needs matplotlib for the
picture, and no torch.

python lessons/real_text_plot.py
"""

import argparse
import math
from pathlib import Path
from statistics import mean

from plot import LOOK, finish, pyplot, save, smooth
from rows import HERE, METHODS, NAMES, read, as_page

WINDOW = 8  # steps


def load(path: Path) -> dict[tuple[str, float], dict]:
    """{(method, lr): run}, of the base model that was run last."""
    rows = read(path)
    if not rows:
        raise SystemExit(f"{path} holds no results; python lessons/real_text.py makes them")
    same = lambda row: all(row[key] == rows[-1][key] for key in ("base", "records_sha256", "size"))
    return {(row["settings"]["method"], row["settings"]["lr"]): row for row in rows if same(row)}


def table(found: dict[tuple[str, float], dict]) -> str:
    row = next(iter(found.values()))
    lines = [
        f"base: {row['parameters']:,} parameters, read {row['texts']:,} texts of {row['tokens']:,} "
        f"tokens; their kind's loss per token {row['loss_before']:.2f} before, "
        f"{row['loss_after']:.2f} after",
        "",
        "| method | s | lr | lr · s | first loss | mean of the last 20 steps | held-out loss |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (method, lr), row in sorted(
        found.items(), key=lambda item: (item[0][1], METHODS.index(item[0][0]))
    ):
        lines.append(
            f"| {NAMES[method]} | {row['scale']:.3g} | {lr:.3g} | {lr * row['scale']:.3g} | "
            f"{row['loss'][0]:.3f} | {mean(row['loss'][-20:]):.3f} | {row['val_loss']:.3f} |"
        )
    return "\n".join(lines)


def draw(plt, found: dict[tuple[str, float], dict]):
    lrs = sorted({lr for _, lr in found})
    fig, axes = plt.subplots(
        1, len(lrs), figsize=(4.9 * len(lrs), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, lr in zip(axes[0], lrs):
        for i, method in enumerate(METHODS):
            if run := found.get((method, lr)):
                losses = smooth(run["loss"], WINDOW)
                every = max(1, len(losses) // 12)
                ax.plot(
                    range(1, len(losses) + 1),
                    losses,
                    markevery=(i * every // 3, every),
                    markersize=4.5,
                    linewidth=1.3,
                    label=NAMES[method],
                    **LOOK[method],
                )
        other = found.get(("lora", lrs[-1]))
        if lr == lrs[0] < lrs[-1] and other:
            losses = smooth(other["loss"], WINDOW)
            ax.plot(
                range(1, len(losses) + 1),
                losses,
                linestyle=":",
                color="black",
                linewidth=1.3,
                label=f"LoRA at lr {lrs[-1]:.2g}",
            )
        ax.set_title(f"lr {lr:.2g}")
        ax.set_xlabel("step")
    axes[0, 0].set_ylabel("training loss per token")
    row = next(iter(found.values()))
    s, size = row["settings"], row["size"]["shape"]
    scales = ", ".join(
        f"{found[m, lrs[0]]['scale']:.3g} ({NAMES[m]})" for m in METHODS if (m, lrs[0]) in found
    )
    finish(
        fig,
        f"Loss against step on real records, r = {s['rank']}, α = {s['alpha']}, s = {scales}; "
        f"mean over the last {WINDOW} steps; {s['batch-size']} records a step, one seed "
        f"({s['seed']}). {size['n_layers']} layers, width {size['dim']}, LLaMA's tokenizer, "
        f"pretrained on {row['tokens']:,} tokens of the other half's plain text "
        f"(loss {row['loss_before']:.1f} to {row['loss_after']:.1f}). "
        f"The second lr is the first times √r = {math.sqrt(s['rank']):.3g}.",
        axes[0, 0],
    )
    return fig


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument(
        "--results", type=Path, default=HERE / "results" / "real_text.jsonl", metavar="FILE"
    )
    parser.add_argument("--out", type=Path, default=HERE / "figures", metavar="DIR")
    args = parser.parse_args(argv)
    found = load(args.results)
    print(table(found))
    if plt := pyplot("real_text"):
        save(plt, draw(plt, found), args.out, "real_text")
    return 0


if __name__ == "__main__":
    as_page(main)
