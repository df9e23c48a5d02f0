"""What derivation.py measured, as a page (lessons/derivation.md) and two pictures. Standard
library; the pictures need matplotlib.

    python lessons/derivation_page.py    all again, from lessons/results/derivation.json

PAGE is the text, `facts` the numbers in it: none is typed.
"""

import argparse
import json
import math
import textwrap
from pathlib import Path

from plot import finish, pyplot, save
from rows import HERE, as_page

LOOK = {
    "α/r": {"color": "black", "marker": "o", "linestyle": "-"},
    "α/√r": {"color": "#c03a1b", "marker": "^", "linestyle": "-."},
    "α/r^¼": {"color": "#3b7dbd", "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
}
POWER = {"α/r": 1.0, "α/√r": 0.5, "α/r^¼": 0.25}  # γ = α / r to this power


def show(x: float | None) -> str:
    """Three digits; 4.2e6 rather than 4200000."""
    if x is None:
        return "not finite"
    text = f"{x:.3g}"
    return text if "e" not in text else f"{float(text.split('e')[0]):g}e{int(text.split('e')[1])}"


def times(x: float) -> str:
    return f"×{show(x)}"


def listed(values) -> str:
    values = [str(v) for v in values]
    return ", ".join(values[:-1]) + f" and {values[-1]}" if len(values) > 1 else values[0]


class Results:
    """derivation.json, by cell."""

    def __init__(self, path: Path):
        self.all = json.loads(path.read_text())
        self.ranks, self.few = self.all["size"]["ranks"], self.all["size"]["few"]
        self.low, self.high = self.ranks[0], self.ranks[-1]

    def cell(self, where: str, optimizer: str, rule: str, rank: int) -> dict:
        return next(
            c
            for c in self.all[where]
            if (c["optimizer"], c["rule"], c["rank"]) == (optimizer, rule, rank)
        )

    def growth(
        self,
        where: str,
        optimizer: str,
        rule: str,
        key: str,
        start: int | None = None,
        to: int | None = None,
    ) -> float:
        """From one rank to another; if not told otherwise, from the lowest to the highest."""
        return (
            self.cell(where, optimizer, rule, to or self.high)[key]
            / self.cell(where, optimizer, rule, start or self.low)[key]
        )

    def spread(self, rank: int) -> dict:
        return next(s for s in self.all["spreads"] if s["rank"] == rank)


# --- the page -----------------------------------------------------------------------------------


PAGE = """\
# Why √r: the paper's Eq. 2 to 15, measured

With plain gradient descent one step lowers the loss by an amount that goes like γ² r, so α/√r makes
it the same at every rank: the paper's result holds. Its road there does not, because the variance
in Eq. 9 is wrong, and Eq. 15 is true of other inputs only where these are like the step's own, as
they are in a trained model. With AdamW, which everybody uses, the first step's gain goes like γ r:
there α/r is the scale without rank, and RoRA at a learning rate lr begins like LoRA at lr·√r.

The letters are the paper's: w is what the adapter adds to a layer's output, γ the scale, x the
input of the first step, x' that of the next. α = {alpha}. `python lessons/derivation.py` measures
all of this again. Every number is from `lessons/results/derivation.json`.

## Eq. 2 to 4: what the first step makes of w

B begins at 0. So A's first gradient is {grad_A}, and only B moves. One step of torch's SGD on a
real `RoRALinear` leaves B where Eq. 3 says (relative error {eq3}), and w of the next input where
Eq. 4 says (relative error {eq4}):

    w = −η δ γ² · xᵀAᵀA x'

These equations are right. All that follows is about xᵀAᵀA x'.

## Eq. 5 to 9: how far w spreads

Let A, x and x' be independent and standard normal, with p_in = {p}. The mean of xᵀAᵀA x' is 0, as
Eq. 6 and 7 say: in {draws} draws it is at most {mean_off} standard errors off. Its variance is
another matter:

{variances}

Eq. 9 is wrong by up to {eq9_off} standard errors. It does not follow from Eq. 8 either: that adds
up p_in · r · p_in terms, each 1, which makes r·p_in².

## Eq. 10 to 15: which γ keeps ‖w‖

‖w‖ goes like γ² times the root of that variance, and not like γ² r. From r = {low} to {mid} it
changes {w_linear} under α/r, {w_sqrt} under α/√r and {w_quarter} under α/r^¼. So with independent
inputs, and r well below p_in, the fourth root is the rule without rank. Eq. 15 does not hold.

## Where the argument lies: inputs are alike

Let x and x' have correlation ½. Then E xᵀAᵀA x' = r·E⟨x, x'⟩ = r·p_in/2, which is {coherent_exact}
at r = {mid}; measured, {coherent}. This part of w, the same for every draw of A, is called coherent
here. It grows like r, and the spread around it more slowly. Under α/√r it goes like γ² r = α², the
same at every rank. This argument carries the method. Eq. 12 to 15 state its result.

How much of w is coherent? For a batch whose gradient is G = ∂L/∂W, w = −ηγ² G AᵀA x'. With σ² the
variance of A's entries,

    E ‖w‖² = η² γ⁴ σ⁴ ( r² ‖G x'‖²  +  r (‖G‖² ‖x'‖² + ‖G x'‖²) )
                        coherent       incoherent

A real SGD step on one layer follows this to {formula_off} at all {n_ranks} ranks. Let κ² be
‖G x'‖² / (‖G‖² ‖x'‖²): about 1/p_in where x' has nothing to do with the batch, and the squared
cosine of x and x' where the batch is one input x. The coherent part is the larger from r = 1 + 1/κ²
on:

{alignment}

So much is a trained model's input like those of another batch. On the tiny model one SGD step's
‖w‖ under α/√r
changes {tiny_w_first} from r = {low} to {mid} and {tiny_w_last} from {mid} to {high}. Under α/r it
changes {tiny_w_linear_first} and {tiny_w_linear_last}.

The loss of the step's own batch needs no likeness: there x' is x. One small SGD step lowers it by
η γ² ‖G Aᵀ‖², which is r positive terms of equal size on average, whatever the inputs are. The
tables below show it, in the column "fall of the loss".

## A as it really begins

`LoRALinear` draws A from U(±1/√p_in). The variance of its entries is 1/(3 p_in); measured,
{init}/p_in. The variance of xᵀAᵀA x' is then r (r + p_in − 0.2) / (9 p_in):

{as_drawn}

The root of it grows {real_grown} from r = {low} to {mid}, and {exact_grown} for standard normal A.
So the initialisation divides w by about 3 p_in, {real_divides} here, and changes nothing about the
rank.

## One step of SGD and one of AdamW

The tables show growth from r = {low} to r = {high}; in brackets stands what the rule predicts. ‖w‖
is an rms over inputs.

One layer, {width} × {width}, 64 inputs, mean over {seeds}:

{layer_table}

The tiny model (checkpoint {checkpoint}), {records} records, {held_out} held-out records as fresh
inputs:

{tiny_table}

AdamW's first step moves every entry of B by lr, however small its gradient is. So the loss falls
with γ r, while the gradient goes with γ√r. In AdamW's first step α/r is the rule without rank.

## Later steps: under AdamW, RoRA is LoRA with a faster B

In LoRA, multiply the learning rate of B, and of B alone, by √r. Then its B stays √r times RoRA's, w
is the same, A's gradient is the same, and B's gradient differs by a factor that AdamW divides out.
So each step is the same, up to AdamW's ε, clipping and rounding: RoRA is LoRA+ (arXiv 2402.12354)
with λ = √r.

Held-out loss of the tiny model after {steps} steps, {before} before them:

{many_table}

The training losses of RoRA and of LoRA with a faster B differ by at most {gap}. The {steps} steps
have batches of {batch}, one seed, warm-up, linear decay and no clipping. Their lr is {lr_adamw} for
AdamW, RoRA's on the tiny model, and {lr_sgd} for SGD, with which the first step at r = {low} under
α/√r would lower the loss by about 0.03.

![The same in six panels](figures/derivation.png)
"""


def facts(r: Results) -> dict[str, object]:
    """What stands in the page's brackets, in the order of the page."""
    a, every = r.all, r.all["spreads"]
    size, p, low, high, hand = a["size"], a["size"]["p"], r.low, r.high, a["by_hand"]
    mid = min((rank for rank in r.ranks if rank > low), key=lambda rank: abs(rank - 32))
    first, middle = r.spread(low), r.spread(mid)
    off = lambda key, formula, error: max(
        abs(s[key] - (s[formula] if formula else 0)) / s[error] for s in every
    )
    grown = lambda key: math.sqrt(middle[key] / first[key])
    norm = lambda rule: times(grown("var") * (low / mid) ** (2 * POWER[rule]))
    growth = lambda *what, **ranks: times(r.growth(*what, **ranks))
    formula_off = [abs(c[k] / c[f"{k}_formula"] - 1) for c in sgd(r) for k in ("seen", "fresh")]
    return {
        "alpha": show(a["alpha"]),
        "grad_A": show(hand["grad_A"]),
        "eq3": show(hand["eq3"]),
        "eq4": show(hand["eq4"]),
        "p": p,
        "draws": f"{size['draws']:,}",
        "mean_off": show(off("mean", None, "mean_se")),
        "variances": variances(r),
        "eq9_off": show(off("var", "eq9", "var_se")),
        "low": low,
        "mid": mid,
        "high": high,
        "w_linear": norm("α/r"),
        "w_sqrt": norm("α/√r"),
        "w_quarter": norm("α/r^¼"),
        "coherent_exact": show(mid * p / 2),
        "coherent": f"{show(middle['coherent']['mean'])} ± {show(middle['coherent']['mean_se'])}",
        "formula_off": f"{100 * max(formula_off):.0f}%",
        "n_ranks": len(r.ranks),
        "alignment": alignment(r),
        "tiny_w_first": growth("tiny", "SGD", "α/√r", "fresh", to=mid),
        "tiny_w_last": growth("tiny", "SGD", "α/√r", "fresh", start=mid),
        "tiny_w_linear_first": growth("tiny", "SGD", "α/r", "fresh", to=mid),
        "tiny_w_linear_last": growth("tiny", "SGD", "α/r", "fresh", start=mid),
        "init": show(a["init"]),
        "as_drawn": as_drawn(r),
        "real_grown": times(grown("real_exact")),
        "exact_grown": times(grown("exact")),
        "real_divides": show(math.sqrt(middle["exact"] / middle["real_exact"])),
        "width": size["width"],
        "seeds": f"{size['seeds']} seed{'s' * (size['seeds'] > 1)}",
        "layer_table": one_step(r, "layer", {"seen": "‖w‖, same inputs"}),
        "checkpoint": a["checkpoint"][:8],
        "records": size["records"],
        "held_out": size["batch"] * 4,
        "tiny_table": one_step(r, "tiny", {}),
        "steps": size["steps"],
        "before": show(a["before"]),
        "many_table": many_steps(r),
        "gap": listed(f"{show(gap(r, c))} at r = {c['rank']}" for c in a["faster_B"]),
        "batch": size["batch"],
        "lr_adamw": show(a["many_lr"]["AdamW"]),
        "lr_sgd": show(a["many_lr"]["SGD"]),
    }


def page(r: Results) -> str:
    """PAGE filled in, its paragraphs wrapped anew; formulas and tables keep their lines."""
    blocks = PAGE.format(**facts(r)).split("\n\n")
    fill = lambda text: textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
    kept = ("    ", "|", "#")
    return "\n\n".join(b if b.startswith(kept) else fill(b) for b in blocks).rstrip("\n") + "\n"


def gap(r: Results, faster: dict) -> float:
    """Largest difference of the two training losses, step by step."""
    rora = r.cell("many", "AdamW", "α/√r", faster["rank"])
    return max(abs(x - y) for x, y in zip(faster["losses"], rora["losses"]))


# --- its tables -----------------------------------------------------------------------------------


def markdown(head: list, rows: list[list], words: int = 1) -> str:
    """words: how many columns at the left hold words, not numbers."""
    under = "|" + "---|" * words + "--:|" * (len(head) - words)
    text = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    return "\n".join([text(head), under, *map(text, rows)])


def few(r: Results) -> list[dict]:
    return [r.spread(rank) for rank in sorted({*r.ranks} & {16, 64, 256}) or r.ranks]


def sgd(r: Results) -> list[dict]:
    return [c for c in r.all["layer"] if (c["optimizer"], c["rule"]) == ("SGD", "α/√r")]


def variances(r: Results) -> str:
    head = ["r", "measured", "exact: r·p_in·(r + p_in + 1)", "Eq. 8: r·p_in²", "Eq. 9: r²·p_in"]
    rows = []
    for s in few(r):
        measured = f"{show(s['var'])} ± {show(s['var_se'])}"
        rows.append([s["rank"], measured, *(show(s[key]) for key in ("exact", "eq8", "eq9"))])
    return markdown(head, rows, words=0)


def as_drawn(r: Results) -> str:
    rows = []
    for s in few(r):
        measured = f"{show(s['real']['var'])} ± {show(s['real']['var_se'])}"
        rows.append([s["rank"], measured, show(s["real_exact"])])
    return markdown(["r", "measured", "formula"], rows, words=0)


def alignment(r: Results) -> str:
    cell = sgd(r)[0]
    found = {
        "one layer, fresh random inputs": cell["kappa2_fresh"],
        "one layer, the inputs of the step itself": cell["kappa2_seen"],
    }
    for kind, k in r.all["alignment"].items():
        found[f"tiny model, held-out records, median {kind}"] = k["kappa2"]
    rows = [[where, show(k), math.ceil(1 + 1 / k)] for where, k in found.items()]
    return markdown(["x'", "κ²", "coherent from r ="], rows)


def one_step(r: Results, where: str, more: dict[str, str]) -> str:
    """Growth from the lowest rank to the highest; more: {key: title} of other columns."""
    ratio = r.high / r.low
    titles = {"gradient": "‖∂L/∂B‖", **more, "fresh": "‖w‖, fresh inputs"}
    rows = []
    for optimizer in ("SGD", "AdamW"):
        for rule, power in POWER.items():
            expected = {
                "gradient": ratio ** (0.5 - power),
                "fall": ratio ** (1 - 2 * power if optimizer == "SGD" else 1 - power),
            }
            cells = []
            for key in (*titles, "fall"):
                grown = times(r.growth(where, optimizer, rule, key))
                cells.append(grown + (f" ({times(expected[key])})" if key in expected else ""))
            rows.append([optimizer, rule, *cells])
    return markdown(["optimizer", "γ", *titles.values(), "fall of the loss"], rows, words=2)


def many_steps(r: Results) -> str:
    rows = []
    for optimizer in ("SGD", "AdamW"):
        for rule in POWER:
            ends = [show(r.cell("many", optimizer, rule, rank)["after"]) for rank in r.few]
            rows.append([optimizer, rule, *ends])
    faster = {c["rank"]: show(c["after"]) for c in r.all["faster_B"]}
    rows.append(["AdamW", "α/r, B at lr·√r", *(faster.get(rank, "–") for rank in r.few)])
    return markdown(["optimizer", "γ", *(f"r = {rank}" for rank in r.few)], rows, words=2)


# --- the pictures ---------------------------------------------------------------------------------


NAMES = {rule: f"γ = {rule}" for rule in LOOK}


def fall_panel(ax, r: Results, where: str, optimizer: str, names: dict[str, str] = NAMES) -> None:
    """By how much one step lowers the loss, against the rank; 1 at the lowest rank."""
    for rule, name in names.items():
        falls = [r.cell(where, optimizer, rule, rank)["fall"] for rank in r.ranks]
        relative = [fall / falls[0] for fall in falls]
        ax.plot(r.ranks, relative, label=name, markersize=5, **LOOK[rule])
    ax.set_yscale("log")


def one_height(axes: list) -> None:
    low, high = (f(ax.get_ylim()[i] for ax in axes) for i, f in ((0, min), (1, max)))
    for ax in axes:
        ax.set_ylim(low, high)


def draw_idea(plt, r: Results):
    """The two scales alone, on one layer: what README shows."""
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.6), layout="constrained")
    methods = {"α/r": "LoRA: γ = α/r", "α/√r": "RoRA: γ = α/√r"}
    for ax, optimizer, name in zip(axes, ("SGD", "AdamW"), ("gradient descent", "AdamW")):
        fall_panel(ax, r, "layer", optimizer, methods)
        ax.set_title(f"one step of {name}")
        ax.set_xscale("log", base=2)
        ax.set_xticks(r.ranks, [str(rank) for rank in r.ranks])
        ax.set_xlabel("rank r")
    one_height(list(axes))
    axes[0].set_ylabel(f"fall of the loss, relative to r = {r.low}")
    width, seeds = r.all["size"]["width"], r.all["size"]["seeds"]
    said = (
        f"One layer of {width} × {width}, 64 inputs, mean of {seeds} seeds, α = {r.all['alpha']:g}."
    )
    finish(fig, said, axes[0])
    return fig


def draw(plt, r: Results):
    fig, axes = plt.subplots(2, 3, figsize=(11.5, 7), layout="constrained")
    ax, s = axes[0, 0], r.all["spreads"]
    ax.errorbar(
        r.ranks,
        [x["var"] for x in s],
        [x["var_se"] for x in s],
        linestyle="none",
        marker="o",
        color="black",
        capsize=3,
        label="Monte Carlo",
    )
    for key, look, name in [
        ("exact", "-", "r·p·(r+p+1), exact"),
        ("eq8", "--", "r·p², Eq. 8 summed"),
        ("eq9", ":", "r²·p, Eq. 9"),
    ]:
        ax.plot(
            r.ranks, [x[key] for x in s], linestyle=look, color="0.35", linewidth=1.4, label=name
        )
    ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=7.5)
    ax.set_title(f"Eq. 9: variance of xᵀAᵀA x', p = {r.all['size']['p']}")
    places = [
        (axes[0, 1], "layer", "SGD", "one layer"),
        (axes[0, 2], "layer", "AdamW", "one layer"),
        (axes[1, 0], "tiny", "SGD", "tiny model"),
        (axes[1, 1], "tiny", "AdamW", "tiny model"),
    ]
    for ax, where, optimizer, name in places:
        fall_panel(ax, r, where, optimizer)
        ax.set_title(f"{name}, one step of {optimizer}: fall of the loss")
        ax.set_ylabel(f"relative to r = {r.low}")
    one_height([ax for ax, *_ in places])
    ax = axes[1, 2]
    for rule, look in LOOK.items():
        ax.plot(
            r.few,
            [r.cell("many", "AdamW", rule, rank)["after"] or math.nan for rank in r.few],
            markersize=5,
            **look,
        )
    plus = r.all["faster_B"]
    ax.plot(
        [c["rank"] for c in plus],
        [c["after"] for c in plus],
        linestyle="none",
        marker="x",
        markersize=11,
        color="black",
        label="α/r, B's lr·√r",
    )
    ax.legend(frameon=False, fontsize=7.5)
    ax.set_title(f"tiny model, {r.all['size']['steps']} steps of AdamW: held-out loss")
    for ax in axes.flat:
        ax.set_xscale("log", base=2)
        ax.set_xticks(
            r.ranks if ax is not axes[1, 2] else r.few,
            [str(x) for x in (r.ranks if ax is not axes[1, 2] else r.few)],
        )
        ax.tick_params(axis="x", which="minor", bottom=False)
        ax.set_xlabel("rank r")
    size = r.all["size"]
    finish(
        fig,
        f"One layer: {size['width']} × {size['width']}, 64 inputs, mean of {size['seeds']} seeds. "
        f"Tiny model: checkpoint {r.all['checkpoint'][:8]}, {size['records']} records a step "
        f"({size['batch']} over {size['steps']} steps), one seed, "
        f"AdamW lr {show(r.all['many_lr']['AdamW'])}, {size['batch'] * 4} held-out records. "
        f"α = {r.all['alpha']:g}. Monte Carlo: {size['draws']:,} draws, bars are standard errors.",
        axes[0, 1],
    )
    return fig


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument(
        "--home",
        type=Path,
        default=HERE,
        metavar="DIR",
        help="holds results/, takes derivation.md and figures/",
    )
    home = parser.parse_args(argv).home
    results = Results(home / "results" / "derivation.json")
    text = page(results)
    (home / "derivation.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"saved {home / 'derivation.md'}")
    if plt := pyplot("derivation"):
        save(plt, draw(plt, results), home / "figures", "derivation")
        save(plt, draw_idea(plt, results), home / "figures", "idea")
    return 0


if __name__ == "__main__":
    as_page(main)
