"""This project beside transformers + PEFT on a CPU, with real records: python bench/cpu.py [--quick] [--only SECTION ...]

Run it where both can be imported (make bench). It writes results-cpu.json, every single measurement, and results-cpu.md,
the tables. RORA_DATA names the folder with records and tokenizers.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from turns import HERE, machine, peak_mb, rates, ratios, slope, spread, table, take_turns

VARIANTS = [("lora", 0.0), ("rora", 0.0), ("dora", 0.0), ("dora", 0.05)]
SIDES = {"ours": {"job": "ours train"}, "PEFT": {"job": "peft train"}}
WAYS = SIDES | {
    "ours, checkpointing": {"job": "ours train", "recompute": "all"},
    "PEFT, autocast": {"job": "peft train", "autocast": True},
    "PEFT, checkpointing": {"job": "peft train", "recompute": "all"},
}
BARS = [  # what, key of bar_values, at least or at most, bar, stretch
    ("LoRA r=128, tokens/s, ours : PEFT", "lora", "≥", 2.3, 2.5),
    (
        "DoRA r=128 p=0.05, tokens/s, ours : PEFT (whose dropout reaches W x too; ours does not)",
        "dora",
        "≥",
        3.6,
        4.0,
    ),
    ("our DoRA step : our LoRA step, p=0", "dora:lora", "≤", 1.15, None),
    ("questions/s, 32 new tokens, ours : transformers' generate", "answers 32", "≥", 2.0, None),
    ("questions/s, 8 new tokens, ours : transformers' generate", "answers 8", "≥", 2.0, None),
    ("step time against tokens, slope", "tokens", "≤", 1.05, None),
    ("step time against layers, slope", "layers", "≤", 1.05, None),
    ("loading: host memory beyond the model, in largest tensors", "load", "≤", 1.5, None),
]

# --- measurements: {group: what take_turns says} ---------------------------------------------------


class Plan:
    """What is measured, a method a section. `quick`: a toy model and two rounds, to see that all of it runs."""

    def __init__(self, quick: bool, folder: Path, clock: str, most: int):
        self.quick, self.folder, self.clock, self.most = quick, folder, clock, most
        self.ranks, self.records = ((8,), 4) if quick else ((128, 32, 8), 16)
        self.base = {
            "shape": "toy" if quick else "small",
            "method": "lora",
            "rank": self.ranks[0],
            "dropout": 0.0,
            "clock": clock,
        }

    def take(self, specs: dict[str, dict], rounds: int, **turn) -> dict:
        return take_turns(
            {name: self.base | spec for name, spec in specs.items()},
            [
                {"round": i, "records": self.records, **turn}
                for i in range(2 if self.quick else min(rounds, self.most) + 1)
            ],
        )

    def sides(
        self,
        sides: dict[str, dict],
        rounds: int,
        method: str,
        dropout: float,
        rank: int | None = None,
        **turn,
    ) -> dict:
        more = {"method": method, "dropout": dropout, "rank": rank or self.ranks[0]}
        return self.take({name: side | more for name, side in sides.items()}, rounds, **turn)

    def ways(self) -> dict:
        groups = {}
        for method, p in (("lora", 0.0), ("dora", 0.05)):
            groups[f"{method} p={p:g}"] = self.sides(WAYS, 5, method, p)
            groups[f"{method} p={p:g}, batches of one length"] = self.sides(
                SIDES, 3, method, p, grouped=True
            )
        return groups

    def dora(self) -> dict:
        return {
            "ours": self.take(
                {
                    f"{method} p={p:g}": {"job": "ours train", "method": method, "dropout": p}
                    for p in (0.0, 0.05)
                    for method in ("lora", "dora")
                },
                7,
            )
        }

    def answers(self) -> dict:
        base = {
            "folder": str(self.folder / "merged"),
            "questions": 8 if self.quick else 64,
            "batch": 4 if self.quick else 32,
        }
        take_turns({"writing": self.base | base | {"job": "write", "dtype": "bfloat16"}}, [{}])
        theirs = {
            "generate": {},
            "generate, eager attention": {"attention": "eager"},
            "generate, static cache": {"static": True},
        }
        sides = {"ours": {"job": "ours answer"}} | {
            name: {"job": "peft answer", **way} for name, way in theirs.items()
        }
        return {
            str(new): self.take(
                {name: {**side, **base, "new": new} for name, side in sides.items()}, 3
            )
            for new in (32, 8)
        }

    def loading(self) -> dict:
        base = {
            "shape": "toy" if self.quick else "wide",
            "folder": str(self.folder / "wide"),
            "dtype": "float16",
            "clock": self.clock,
        }
        take_turns({"writing": {"job": "write", **base}}, [{}])
        loaders = {
            "ours": {"job": "ours load", **base},
            "from_pretrained": {"job": "peft load", **base},
        }
        once = [
            take_turns({name: spec}, [{}], warmup=0)
            for _ in range(3)
            for name, spec in loaders.items()
        ]  # or a peak hides the next
        return {
            "fp16": {
                name: {
                    **next(r[name] for r in once if name in r),
                    "turns": [r[name]["turns"][0] for r in once if name in r],
                }
                for name in loaders
            }
        }

    def growth(self) -> dict:
        ours, small = {"job": "ours train"}, self.quick
        sizes, layers, ranks = (
            ((2, 4), (1, 2), (4, 8))
            if small
            else ((4, 8, 16, 32), (2, 4, 8, 16), (8, 32, 128, 256))
        )
        turns = [
            {"round": i, "records": n}
            for i in range(2 if small else min(3, self.most) + 1)
            for n in sizes
        ]
        return {
            "tokens": take_turns({"ours": self.base | ours}, turns, warmup=len(sizes)),
            "layers": self.take({str(n): {**ours, "layers": n} for n in layers}, 3),
            "rank": self.take({str(r): {**ours, "rank": r} for r in ranks}, 3),
        }

    def product(self) -> dict:
        return {
            "bf16": take_turns(
                {
                    "square": {
                        "job": "product",
                        "n": 256 if self.quick else 2048,
                        "clock": self.clock,
                    }
                },
                [{}] * 6,
            )
        }

    def training(self) -> dict:
        return {
            f"{method} r={rank} p={p:g}": self.sides(SIDES, 3, method, p, rank)
            for rank in self.ranks
            for method, p in VARIANTS
        }


SECTIONS = ("product", "ways", "dora", "answers", "loading", "growth", "training")


# --- tables ----------------------------------------------------------------------------------------


def fastest(group: dict, prefix: str, what: str) -> dict:
    return max(
        (r for name, r in group.items() if name.startswith(prefix)),
        key=lambda r: median(rates(r, what)),
    )


def memory(r: dict) -> str:
    return f"{peak_mb(r):,.0f} ({peak_mb(r) - r['ready']['built_mb']:+,.0f})"


def beyond_model(r: dict) -> list[float]:
    return [t["peak_mb"] - r["ready"]["built_mb"] - t["model_mb"] for t in r["turns"]]


def seconds(r: dict) -> list[float]:
    return [t["seconds"] for t in r["turns"]]


def points(results: dict, section: str) -> list[tuple[float, float]]:
    """(what grows, seconds a step). Batches of as many records differ in tokens: the median of their seconds a token counts."""
    if section != "tokens":
        return [(int(n), median(seconds(r))) for n, r in results["growth"][section].items()]
    turns = results["growth"]["tokens"]["ours"]["turns"]
    sizes = [[t for t in turns if t["records"] == n] for n in sorted({t["records"] for t in turns})]
    mean = lambda size: round(sum(t["tokens"] for t in size) / len(size))
    return [
        (mean(size), mean(size) * median(t["seconds"] / t["tokens"] for t in size))
        for size in sizes
    ]


def bar_values(results: dict) -> dict[str, float]:
    ways, load = results["ways"], results["loading"]["fp16"]["ours"]
    steps = results["dora"]["ours"]
    against_fastest = lambda group, theirs="PEFT", what="tokens": median(
        ratios(group["ours"], fastest(group, theirs, what), what)
    )
    return {
        "lora": against_fastest(ways["lora p=0"]),
        "dora": against_fastest(ways["dora p=0.05"]),
        "dora:lora": median(ratios(steps["lora p=0"], steps["dora p=0"], "tokens")),
        **{
            f"answers {new}": against_fastest(group, "generate", "questions")
            for new, group in results["answers"].items()
        },
        "tokens": slope(points(results, "tokens")),
        "layers": slope(points(results, "layers")),
        "load": median(beyond_model(load)) / load["turns"][0]["largest_tensor_mb"],
    }


def report(results: dict) -> str:
    m, values, ways = results["machine"], bar_values(results), results["ways"]
    steps = results["dora"]["ours"]
    ready = ways["lora p=0"]["ours"]["ready"]
    product = median(rates(results["product"]["bf16"]["square"], "flops"))
    share = lambda r: f"{400 * ready['linear_weights'] * median(rates(r, 'tokens')) / product:.0f}%"
    padding = lambda r: (
        sum(t.get("padded", t["tokens"]) for t in r["turns"]) / sum(t["tokens"] for t in r["turns"])
    )

    reached = lambda value, sign, bar: value >= bar if sign == "≥" else value <= bar
    bars = [
        [
            what,
            f"{values[key]:.2f}",
            f"{sign} {bar}",
            "yes" if reached(values[key], sign, bar) else "**no**",
            f"{stretch}: {'yes' if reached(values[key], sign, stretch) else 'no'}"
            if stretch
            else "–",
        ]
        for what, key, sign, bar, stretch in BARS
    ]
    training = [
        [
            name,
            *(spread(rates(g[side], "tokens")) for side in ("ours", "PEFT")),
            spread(ratios(g["ours"], g["PEFT"], "tokens"), 2),
            share(g["ours"]),
            memory(g["ours"]),
            memory(g["PEFT"]),
        ]
        for name, g in results.get("training", {}).items()
    ]
    settings = [
        [
            name,
            way,
            spread(rates(r, "tokens")),
            spread(ratios(g["ours"], r, "tokens"), 2),
            f"{padding(r):.2f}",
            memory(r),
        ]
        for name, g in ways.items()
        for way, r in g.items()
    ]
    dora = [
        [name, spread(seconds(r), 3), spread(ratios(steps["lora p=0"], r, "tokens"), 2)]
        for name, r in steps.items()
    ]
    answered = [
        [
            f"{new} new tokens",
            name,
            spread(rates(r, "questions"), 1),
            spread(ratios(g["ours"], r, "questions"), 2),
            memory(r),
        ]
        for new, g in results["answers"].items()
        for name, r in g.items()
    ]
    loaded = [
        [
            name,
            spread(seconds(r), 2),
            *(f"{r['turns'][0][mb]:,.0f}" for mb in ("model_mb", "largest_tensor_mb")),
            spread(beyond_model(r)),
        ]
        for name, r in results["loading"]["fp16"].items()
    ]
    grown = [
        [
            what,
            f"{slope(points(results, what)):.2f}",
            ", ".join(f"{x:,}: {y:.2f}" for x, y in points(results, what)),
        ]
        for what in ("tokens", "layers", "rank")
    ]
    MEMORY = "peak MB (over the built model)"
    return f"""# Beside transformers + PEFT, on a CPU

{m["cpu"]}, {m["cores"]} cores ({ready["threads"]} threads), bf16 instructions: {"yes" if m["bf16"] else "no"}; \
{product / 1e9:,.0f} GFLOP/s in a bf16 product of 2,048². {m["date"]}, {m["clock"]} clock, load average {m["load"]} before; \
commit {m["commit"]}, Python {m["python"]}, torch {m["torch"]}, transformers {m["transformers"]}, PEFT {m["peft"]}.

LLaMA of width 512, 8 layers, vocabulary 32,000, random weights; 16 real records a step, cut at 256 tokens; bf16 base, fp32 adapters on \
q, k, v, up, down; fused AdamW, clipping. Tokens are real tokens: padding is not counted. Every measurement has a process of its own; the \
processes take turns, step by step, with the same records. Median (least–most).

## Bars

{table(["", "measured", "bar", "met", "stretch"], bars)}

Against PEFT's and transformers' fastest setting below, batch by batch.

## Training, tokens/s

{table(["", "ours", "PEFT", "ours : PEFT", "our share", "our " + MEMORY, "PEFT's"], training)}

Share: 4 FLOPs for each frozen weight that multiplies and each token, adapters and attention not counted, of the rate above.

## Ways to run, highest rank

{table(["", "", "tokens/s", "ours : this", "tokens computed : real", MEMORY], settings)}

Autocast is what `Trainer(bf16=True)` adds: adapters multiply in bf16. Checkpointing: every block. Batches of one length: `group_by_length`.

## DoRA beside LoRA, ours

{table(["", "seconds a step", "to LoRA p=0"], dora)}

## Answering

Real test questions, longest first, in batches; greedy; the same merged bf16 weights from one folder. Random weights never end an answer, so \
both sides are told when: after 32 tokens, the most that is allowed, or after 8, where a fine-tuned model ends by itself.

{table(["", "", "questions/s", "ours : this", MEMORY], answered)}

## Loading

fp16 on disk (in the page cache), bf16 in memory; host memory beyond the imports and the model itself.

{table(["", "seconds", "model MB", "largest tensor MB", "beyond the model MB"], loaded)}

## How our step grows

{table(["with", "log-log slope", "measured: seconds"], grown)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a toy model, to see that all of it runs; into runs/bench-quick",
    )
    parser.add_argument(
        "--only",
        nargs="*",
        choices=SECTIONS,
        help="measure these again, keep the rest; none: only make the tables",
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: seconds of CPU instead, for a machine that is not "
        "idle; with OMP_NUM_THREADS=1 the two agree on one that is",
    )
    parser.add_argument(
        "--rounds", type=int, default=9, metavar="N", help="at most so many timed turns of each"
    )
    args = parser.parse_args()
    out = HERE.parent / "runs" / "bench-quick" if args.quick else HERE
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results-cpu.json"
    results = (
        json.loads(file.read_text())
        if args.only is not None
        else {"machine": machine() | {"clock": args.clock}}
    )
    with tempfile.TemporaryDirectory() as folder:
        for section in SECTIONS if args.only is None else args.only:
            began = time.time()
            results[section] = getattr(
                Plan(args.quick, Path(folder), args.clock, args.rounds), section
            )()
            results["machine"]["seconds"] = {
                **results["machine"].get("seconds", {}),
                section: round(time.time() - began),
            }
            file.write_text(json.dumps(results, indent=1) + "\n")
    if missing := [section for section in SECTIONS[:-1] if section not in results]:
        parser.exit(1, f"no tables yet: {', '.join(missing)} not measured\n")
    (out / "results-cpu.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
