"""What derivation.py measured, as a page (lessons/derivation.md) and a picture. Standard library;
the picture needs matplotlib.

    python lessons/derivation_page.py    both again, from lessons/results/derivation.json

PAGE is the text, `facts` the numbers in it: none is typed.
"""

import argparse
import json
import math
import sys
import textwrap
from pathlib import Path

from plot import finish, pyplot, save
from rows import HERE

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

Made by `python lessons/derivation.py`; every number below comes from
`lessons/results/derivation.json`. The letters are the paper's: w is what the adapter adds to a
layer's output, γ the scale, x the input of the first step, x' that of the next. α = {alpha}.

## Eq. 2 to 4: what the first step makes of w

B begins at 0, so A's first gradient is {grad_A} and only B moves. One step of torch's SGD on a real
`RoRALinear` of rank {hand_rank} leaves B where Eq. 3 says, off by {eq3} of its norm, and w of the
next input where Eq. 4 says, off by {eq4}: w = −η δ γ² · xᵀAᵀA x'. These equations are right, and
all that follows is about xᵀAᵀA x'.

## Eq. 5 to 9: how far w spreads

A, x and x' independent standard normal, p_in = {p}, {draws} draws at each of {n_ranks} ranks. The
mean is 0, as Eq. 6 and 7 say: at most {mean_off} standard errors from it. The variance is {var} by
Monte Carlo. The exact r·p_in·(r + p_in + 1) {agrees} it: {exact}, at most {exact_off} standard
errors off at any rank. Eq. 9's r²·p_in does not: {eq9}, up to {eq9_off} standard errors off. Nor
does it follow from Eq. 8, which as printed is a sum of p_in · r · p_in ones: {eq8} at those ranks.

## Eq. 10 to 15: which γ keeps ‖w‖

‖w‖ goes like γ² times the root of that variance, not like γ² r. From r = {low} to {mid}, while r
grows ×{mid_low}, the measured root grows {root_grown}. So ‖w‖ changes {w_linear} under α/r,
{w_sqrt} under α/√r and {w_quarter} under α/r^¼: with independent inputs and r well below p_in the
rank-free rule would be the fourth root, and Eq. 15 does not hold.

## Where the argument lies: inputs are alike

Let x and x' have correlation ½. Then E xᵀAᵀA x' = r·E⟨x, x'⟩ = r·p_in/2: {coherent_exact} at r =
{mid}, measured {coherent}. This coherent part grows like r, the spread around it more slowly: their
ratio is {ratio_low} at r = {low} and {ratio_high} at r = {high}. Under α/√r the coherent part of w
goes like γ² r = α², the same at every rank. This is the argument that carries the method; Eq. 12 to
15 state its result.

For a batch whose gradient is G = ∂L/∂W, w = −ηγ² G AᵀA x'. With σ² the variance of A's entries,

    E ‖w‖² = η² γ⁴ σ⁴ ( r² ‖G x'‖²  +  r (‖G‖² ‖x'‖² + ‖G x'‖²) )
                        coherent       incoherent

A real SGD step on one layer follows this to {formula_off} at all {n_ranks} ranks. The coherent part
is the larger from about r = 1/κ² on, with κ² = ‖G x'‖² / (‖G‖² ‖x'‖²). On that layer κ² is
{k_fresh} for fresh random inputs (1/p_in is {k_random}): from r = {r_fresh} on. For the inputs of
the step itself it is {k_seen}: from r = {r_seen} on. On the trained tiny model, with held-out
records for x', the median layer of each kind has {k_tiny}: from r = {r_tiny_first} to {r_tiny_last}
on. A trained model's inputs are that much alike. There one SGD step's ‖w‖ under α/√r changes
{tiny_w_first} from r = {low} to {mid} and {tiny_w_last} from {mid} to {high}; under α/r
{tiny_w_linear_first} and {tiny_w_linear_last}.

The loss feels the coherent part alone. One small SGD step lowers it by η γ² ‖G Aᵀ‖², which is r
terms of equal size on average: from r = {low} to {high} that fall changes {fall_sqrt} under α/√r
and {fall_linear} under α/r on the layer (expected ×1 and {fall_linear_expected}), {tiny_sqrt} and
{tiny_linear} on the tiny model.

## A as it really begins

`LoRALinear` draws A from U(±1/√p_in): the measured variance of its entries is {init}/p_in, that is
1/(3 p_in). The variance of xᵀAᵀA x' becomes r (r + p_in − 0.2) / (9 p_in): {real_exact}; measured
{real}. Its root grows {real_grown} from r = {low} to {mid}, against {exact_grown} for standard
normal A. The initialisation divides w by a number without r in it, {real_divides} here, and changes
nothing about the rank.

## One real step of SGD, one of AdamW, and {steps} steps

Growth from r = {low} to r = {high}; in brackets what the rule predicts. ‖w‖ is an rms over inputs.
The layer is {width} × {width}, with 64 inputs, mean over {seeds}. The tiny model (checkpoint
{checkpoint}) steps on {records} records; its fresh inputs are {held_out} held-out records.

{table}

The {steps} steps have batches of {batch}, one seed, warm-up, linear decay and no clipping. Their lr
is {lr_adamw} for AdamW, the tiny default, and {lr_sgd} for SGD, with which the first step at r =
{low} under α/√r would lower the loss by about 0.03. Before them the held-out loss is {before}.

AdamW's first step moves every entry of B by lr, however small its gradient. That gradient goes with
γ√r, {grad_linear} under α/r and {grad_sqrt} under α/√r; but the loss falls with γ r, {adamw_linear}
and {adamw_sqrt} on the layer, {tiny_adamw_linear} and {tiny_adamw_sqrt} on the tiny model. In
AdamW's first step α/r is the rank-free rule, and RoRA at rank r is LoRA at lr·√r.

## Later steps: under AdamW, RoRA is LoRA with a faster B

In LoRA, multiply the learning rate of B, and of B alone, by √r. Then its B stays √r times RoRA's, w
is the same, A's gradient is the same, and B's gradient differs by a factor that AdamW divides out.
So each step is the same, up to AdamW's ε, clipping and rounding: RoRA is LoRA+ (arXiv 2402.12354)
with λ = √r. Over the {steps} steps on the tiny model the training losses of the two differ by at
most {gap}; the held-out loss at the end is {faster} against RoRA's {rora}. LoRA with one learning
rate ends at {lora}.

![The same in six panels](figures/derivation.png)
"""


def facts(r: Results) -> dict[str, str]:
    """What stands in the page's brackets, in the order of the page."""
    a, every = r.all, r.all["spreads"]
    size, p, low, high, hand = a["size"], a["size"]["p"], r.low, r.high, a["by_hand"]
    mid = min((rank for rank in r.ranks if rank > low), key=lambda rank: abs(rank - 32))
    some = [r.spread(rank) for rank in sorted({*r.ranks} & {16, 64, 256}) or r.ranks]
    first, middle, last = r.spread(low), r.spread(mid), r.spread(high)
    at_some = lambda value: listed(f"{value(s)} at r = {s['rank']}" for s in some)
    off = lambda key, formula, error: max(
        abs(s[key] - (s[formula] if formula else 0)) / s[error] for s in every
    )
    grown = lambda key: math.sqrt(middle[key] / first[key])
    norm = lambda rule: times(grown("var") * (low / mid) ** (2 * POWER[rule]))
    ratio = lambda s: show(s["coherent"]["mean"] / math.sqrt(s["coherent"]["var"]))
    sgd = [c for c in a["layer"] if c["optimizer"] == "SGD" and c["rule"] == "α/√r"]
    kinds = {kind: k["kappa2"] for kind, k in a["alignment"].items()}
    growth = lambda *what, **ranks: times(r.growth(*what, **ranks))
    ends = lambda optimizer, rule: listed(
        f"{show(r.cell('many', optimizer, rule, c['rank'])['after'])} at r = {c['rank']}"
        for c in a["faster_B"]
    )
    formula_off = [abs(c[k] / c[f"{k}_formula"] - 1) for c in sgd for k in ("seen", "fresh")]
    return {
        "alpha": show(a["alpha"]),
        "grad_A": show(hand["grad_A"]),
        "hand_rank": hand["rank"],
        "eq3": show(hand["eq3"]),
        "eq4": show(hand["eq4"]),
        "p": p,
        "draws": f"{size['draws']:,}",
        "n_ranks": len(r.ranks),
        "mean_off": show(off("mean", None, "mean_se")),
        "var": at_some(lambda s: f"{show(s['var'])} ± {show(s['var_se'])}"),
        "agrees": "agrees with" if off("var", "exact", "var_se") < 4 else "differs from",
        "exact": listed(show(s["exact"]) for s in some),
        "exact_off": show(off("var", "exact", "var_se")),
        "eq9": listed(show(s["eq9"]) for s in some),
        "eq9_off": show(off("var", "eq9", "var_se")),
        "eq8": listed(show(s["eq8"]) for s in some),
        "low": low,
        "mid": mid,
        "high": high,
        "mid_low": show(mid / low),
        "root_grown": times(grown("var")),
        "w_linear": norm("α/r"),
        "w_sqrt": norm("α/√r"),
        "w_quarter": norm("α/r^¼"),
        "coherent_exact": show(mid * p / 2),
        "coherent": f"{show(middle['coherent']['mean'])} ± {show(middle['coherent']['mean_se'])}",
        "ratio_low": ratio(first),
        "ratio_high": ratio(last),
        "formula_off": f"{100 * max(formula_off):.0f}%",
        "k_fresh": show(sgd[0]["kappa2_fresh"]),
        "k_random": show(1 / size["width"]),
        "r_fresh": f"{1 / sgd[0]['kappa2_fresh']:.0f}",
        "k_seen": show(sgd[0]["kappa2_seen"]),
        "r_seen": f"{1 / sgd[0]['kappa2_seen']:.0f}",
        "k_tiny": listed(f"{show(k)} ({kind})" for kind, k in kinds.items()),
        "r_tiny_first": f"{1 / max(kinds.values()):.0f}",
        "r_tiny_last": f"{1 / min(kinds.values()):.0f}",
        "tiny_w_first": growth("tiny", "SGD", "α/√r", "fresh", to=mid),
        "tiny_w_last": growth("tiny", "SGD", "α/√r", "fresh", start=mid),
        "tiny_w_linear_first": growth("tiny", "SGD", "α/r", "fresh", to=mid),
        "tiny_w_linear_last": growth("tiny", "SGD", "α/r", "fresh", start=mid),
        "fall_sqrt": growth("layer", "SGD", "α/√r", "fall"),
        "fall_linear": growth("layer", "SGD", "α/r", "fall"),
        "fall_linear_expected": times(low / high),
        "tiny_sqrt": growth("tiny", "SGD", "α/√r", "fall"),
        "tiny_linear": growth("tiny", "SGD", "α/r", "fall"),
        "init": show(a["init"]),
        "real_exact": at_some(lambda s: show(s["real_exact"])),
        "real": listed(f"{show(s['real']['var'])} ± {show(s['real']['var_se'])}" for s in some),
        "real_grown": times(grown("real_exact")),
        "exact_grown": times(grown("exact")),
        "real_divides": show(math.sqrt(middle["exact"] / middle["real_exact"])),
        "steps": size["steps"],
        "width": size["width"],
        "seeds": f"{size['seeds']} seed{'s' * (size['seeds'] > 1)}",
        "checkpoint": a["checkpoint"][:8],
        "records": size["records"],
        "held_out": size["batch"] * 4,
        "table": table(r),
        "batch": size["batch"],
        "lr_adamw": show(a["many_lr"]["AdamW"]),
        "lr_sgd": show(a["many_lr"]["SGD"]),
        "before": show(a["before"]),
        "grad_linear": growth("layer", "AdamW", "α/r", "gradient"),
        "grad_sqrt": growth("layer", "AdamW", "α/√r", "gradient"),
        "adamw_linear": growth("layer", "AdamW", "α/r", "fall"),
        "adamw_sqrt": growth("layer", "AdamW", "α/√r", "fall"),
        "tiny_adamw_linear": growth("tiny", "AdamW", "α/r", "fall"),
        "tiny_adamw_sqrt": growth("tiny", "AdamW", "α/√r", "fall"),
        "gap": listed(f"{show(gap(r, c))} at r = {c['rank']}" for c in a["faster_B"]),
        "faster": listed(f"{show(c['after'])} at r = {c['rank']}" for c in a["faster_B"]),
        "rora": ends("AdamW", "α/√r"),
        "lora": ends("AdamW", "α/r"),
    }


def page(r: Results) -> str:
    """PAGE filled in, its paragraphs wrapped anew; the formula and the table keep their lines."""
    blocks = PAGE.format(**facts(r)).split("\n\n")
    return (
        "\n\n".join(
            b
            if b.startswith(("    ", "|", "#"))
            else textwrap.fill(b, 100, break_long_words=False, break_on_hyphens=False)
            for b in blocks
        ).rstrip("\n")
        + "\n"
    )


def gap(r: Results, faster: dict) -> float:
    """Largest difference of the two training losses, step by step."""
    rora = r.cell("many", "AdamW", "α/√r", faster["rank"])
    return max(abs(x - y) for x, y in zip(faster["losses"], rora["losses"]))


def table(r: Results) -> str:
    ratio = r.high / r.low
    head = [
        "optimizer",
        "γ",
        "layer: ‖∂L/∂B‖",
        "‖w‖, same inputs",
        "‖w‖, fresh inputs",
        "fall of the loss",
        "tiny: ‖∂L/∂B‖",
        "‖w‖, fresh inputs",
        "fall of the loss",
        f"held-out loss after {r.all['size']['steps']} steps, r = {' / '.join(map(str, r.few))}",
    ]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "--:|" * (len(head) - 2)]
    for optimizer in ("SGD", "AdamW"):
        for rule, power in POWER.items():
            gradient, fall = (
                ratio ** (0.5 - power),
                ratio ** (1 - 2 * power if optimizer == "SGD" else 1 - power),
            )
            grown = lambda where, key, expected=None: (
                times(r.growth(where, optimizer, rule, key))
                + (f" ({times(expected)})" if expected is not None else "")
            )
            lines.append(
                "| "
                + " | ".join(
                    [
                        optimizer,
                        rule,
                        grown("layer", "gradient", gradient),
                        grown("layer", "seen"),
                        grown("layer", "fresh"),
                        grown("layer", "fall", fall),
                        grown("tiny", "gradient", gradient),
                        grown("tiny", "fresh"),
                        grown("tiny", "fall", fall),
                        " / ".join(
                            show(r.cell("many", optimizer, rule, rank)["after"]) for rank in r.few
                        ),
                    ]
                )
                + " |"
            )
    return "\n".join(lines)


# --- the picture --------------------------------------------------------------------------------


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
        for rule, look in LOOK.items():
            first = r.cell(where, optimizer, rule, r.low)["fall"]
            ax.plot(
                r.ranks,
                [r.cell(where, optimizer, rule, rank)["fall"] / first for rank in r.ranks],
                label=f"γ = {rule}",
                markersize=5,
                **look,
            )
        ax.set_yscale("log")
        ax.set_title(f"{name}, one step of {optimizer}: fall of the loss")
        ax.set_ylabel(f"relative to r = {r.low}")
    low, high = (f(ax.get_ylim()[i] for ax, *_ in places) for i, f in ((0, min), (1, max)))
    for ax, *_ in places:
        ax.set_ylim(low, high)
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
    (home / "derivation.md").write_text(text)
    print(text)
    print(f"saved {home / 'derivation.md'}")
    if plt := pyplot("derivation"):
        save(plt, draw(plt, results), home / "figures", "derivation")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
