"""This project beside transformers + PEFT on a CPU, with real records: python bench/cpu.py

Run it where both can be imported (make bench). It writes results-cpu.json, every single
measurement, and results-cpu.md, the tables; with --name, results-cpu-NAME of both. RORA_DATA names
the folder with records and tokenizers. The base is bf16 where the CPU multiplies it, fp32
elsewhere.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from turns import HERE, machine, peak_mb, rates, ratios, slope, spread, table, take_turns

VARIANTS = [("lora", 0.0), ("rora", 0.0), ("dora", 0.0), ("dora", 0.05)]
SIDES = {"ours": {"job": "ours train"}, "PEFT": {"job": "peft train"}}
WAYS = SIDES | {  # autocast is bf16: not for a CPU without it
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
    ("the embedded model's questions/s, ours : transformers' generate", "scoring", "≥", 1.8, None),
    ("questions/s, 32 new tokens, ours : transformers' generate", "answers 32", "≥", 2.0, None),
    ("questions/s, 8 new tokens, ours : transformers' generate", "answers 8", "≥", 2.0, None),
    ("step time against tokens, slope", "tokens", "≤", 1.05, None),
    ("step time against layers, slope", "layers", "≤", 1.05, None),
    ("loading: host memory beyond the model, in largest tensors", "load", "≤", 1.5, None),
]

# --- measurements: {group: what take_turns says} --------------------------------------------------


class Plan:
    """What is measured, a method for each section. `quick`: a toy model and two rounds, to see that
    all of it runs."""

    def __init__(self, quick: bool, folder: Path, clock: str, most: int, bf16: bool):
        self.quick, self.folder, self.clock, self.most = quick, folder, clock, most
        self.bf16, self.dtype = bf16, "bfloat16" if bf16 else "float32"
        self.ranks, self.records = ((8,), 4) if quick else ((128, 32, 8), 16)
        self.base = {
            "shape": "toy" if quick else "small",
            "method": "lora",
            "rank": self.ranks[0],
            "dropout": 0.0,
            "clock": clock,
            "base_dtype": self.dtype,
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
        ways = {name: way for name, way in WAYS.items() if self.bf16 or "autocast" not in way}
        for method, p in (("lora", 0.0), ("dora", 0.05)):
            groups[f"{method} p={p:g}"] = self.sides(ways, 5, method, p)
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

    def scoring(self) -> dict:
        """The embedded model, fine-tuned and merged: all test questions, to the answers' ends."""
        run, merged = self.folder / "tiny-run", self.folder / "tiny"
        rora = [sys.executable, HERE.parent / "rora.py"]
        short = ["--max-steps", "2", "--warmup", "1"] if self.quick else []
        for words in (["--out", run, *short], ["--merge", run, "--out", merged]):
            subprocess.run([*rora, *words], check=True, stdout=subprocess.DEVNULL)
        base = {"folder": str(merged), "limit": 4 if self.quick else None}
        sides = {
            "ours": {"job": "ours score"},
            "generate, SDPA": {"job": "peft score"},
            "generate, eager attention": {"job": "peft score", "attention": "eager"},
        }
        return {"tiny": self.take({name: side | base for name, side in sides.items()}, 3)}

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
                        "base_dtype": self.dtype,
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


SECTIONS = ("product", "ways", "dora", "scoring", "answers", "loading", "growth", "training")


# --- tables ---------------------------------------------------------------------------------------

MEMORY = "peak MB (over the built model)"


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
    """(what grows, seconds a step). Batches of as many records differ in tokens: the median of
    their seconds a token counts."""
    if section != "tokens":
        return [(int(n), median(seconds(r))) for n, r in results["growth"][section].items()]
    turns = results["growth"]["tokens"]["ours"]["turns"]
    sizes = [[t for t in turns if t["records"] == n] for n in sorted({t["records"] for t in turns})]
    mean = lambda size: round(sum(t["tokens"] for t in size) / len(size))
    return [
        (mean(size), mean(size) * median(t["seconds"] / t["tokens"] for t in size))
        for size in sizes
    ]


def against_fastest(group: dict, theirs: str = "PEFT", what: str = "tokens") -> float:
    return median(ratios(group["ours"], fastest(group, theirs, what), what))


def bar_values(results: dict) -> dict[str, float]:
    """Of what was measured."""
    values: dict[str, float] = {}
    if "ways" in results:
        values["lora"] = against_fastest(results["ways"]["lora p=0"])
        values["dora"] = against_fastest(results["ways"]["dora p=0.05"])
    if "dora" in results:
        steps = results["dora"]["ours"]
        values["dora:lora"] = median(ratios(steps["lora p=0"], steps["dora p=0"], "tokens"))
    if "scoring" in results:
        values["scoring"] = against_fastest(results["scoring"]["tiny"], "generate", "questions")
    for new, group in results.get("answers", {}).items():
        values[f"answers {new}"] = against_fastest(group, "generate", "questions")
    if "growth" in results:
        values |= {what: slope(points(results, what)) for what in ("tokens", "layers")}
    if "loading" in results:
        load = results["loading"]["fp16"]["ours"]
        values["load"] = median(beyond_model(load)) / load["turns"][0]["largest_tensor_mb"]
    return values


def bars(results: dict) -> str:
    values, rows = bar_values(results), []
    for what, key, sign, bar, stretch in BARS:
        if key not in values:
            continue
        reached = lambda least: values[key] >= least if sign == "≥" else values[key] <= least
        met = "yes" if reached(bar) else "**no**"
        further = f"{stretch}: {'yes' if reached(stretch) else 'no'}" if stretch else "–"
        rows.append([what, f"{values[key]:.2f}", f"{sign} {bar}", met, further])
    return f"""## Bars

{table(["", "measured", "bar", "met", "stretch"], rows)}

Against PEFT's and transformers' fastest setting below, batch by batch."""


def training(results: dict) -> str:
    product = median(rates(results["product"]["bf16"]["square"], "flops"))
    rows = []
    for name, g in results["training"].items():
        ours, weights = g["ours"], g["ours"]["ready"]["linear_weights"]
        rates_of = [spread(rates(g[side], "tokens")) for side in ("ours", "PEFT")]
        share = f"{400 * weights * median(rates(ours, 'tokens')) / product:.0f}%"
        ratio = spread(ratios(ours, g["PEFT"], "tokens"), 2)
        rows.append([name, *rates_of, ratio, share, memory(ours), memory(g["PEFT"])])
    head = ["", "ours", "PEFT", "ours : PEFT", "our share", "our " + MEMORY, "PEFT's"]
    return f"""## Training, tokens/s

{table(head, rows)}

Share: 4 FLOPs for each frozen weight that multiplies and each token, adapters and attention not
counted, of the rate above."""


def ways(results: dict) -> str:
    rows = []
    for name, g in results["ways"].items():
        for way, r in g.items():
            computed = sum(t.get("padded", t["tokens"]) for t in r["turns"])
            padding = computed / sum(t["tokens"] for t in r["turns"])
            ratio = spread(ratios(g["ours"], r, "tokens"), 2)
            rows.append([name, way, spread(rates(r, "tokens")), ratio, f"{padding:.2f}", memory(r)])
    head = ["", "", "tokens/s", "ours : this", "tokens computed : real", MEMORY]
    return f"""## Ways to run, highest rank

{table(head, rows)}

Autocast is what `Trainer(bf16=True)` adds: adapters multiply in bf16. Checkpointing: every block.
Batches of one length: `group_by_length`."""


def dora(results: dict) -> str:
    steps = results["dora"]["ours"]
    to_lora = lambda r: spread(ratios(steps["lora p=0"], r, "tokens"), 2)
    rows = [[name, spread(seconds(r), 3), to_lora(r)] for name, r in steps.items()]
    return f"""## DoRA beside LoRA, ours

{table(["", "seconds a step", "to LoRA p=0"], rows)}"""


def answered(groups: dict, words: str) -> list[list]:
    rows = []
    for of, g in groups.items():
        for name, r in g.items():
            ratio = spread(ratios(g["ours"], r, "questions"), 2)
            rate = spread(rates(r, "questions"), 1)
            rows.append([words.format(of), name, rate, ratio, memory(r)])
    return rows


def scoring(results: dict) -> str:
    said = {t["said"] for r in results["scoring"]["tiny"].values() for t in r["turns"]}
    same = "All sides say the same." if len(said) == 1 else "**The sides' answers differ.**"
    return f"""## Scoring the embedded model

Fine-tuned with RoRA and merged; all its test questions in batches of 64, each answer to its end;
fp32. {same}

{table(["", "", "questions/s", "ours : this", MEMORY], answered(results["scoring"], "{}"))}"""


def answers(results: dict) -> str:
    rows = answered(results["answers"], "{} new tokens")
    return f"""## Answering

Real test questions, longest first, in batches; greedy; the same merged bf16 weights from one
folder. Random weights never end an answer, so both sides are told when: after 32 tokens, the most
that is allowed, or after 8, where a fine-tuned model ends by itself.

{table(["", "", "questions/s", "ours : this", MEMORY], rows)}"""


def loading(results: dict) -> str:
    rows = []
    for name, r in results["loading"]["fp16"].items():
        sizes = [f"{r['turns'][0][mb]:,.0f}" for mb in ("model_mb", "largest_tensor_mb")]
        rows.append([name, spread(seconds(r), 2), *sizes, spread(beyond_model(r))])
    head = ["", "seconds", "model MB", "largest tensor MB", "beyond the model MB"]
    return f"""## Loading

fp16 on disk (in the page cache), bf16 in memory; host memory beyond the imports and the model
itself.

{table(head, rows)}"""


def growth(results: dict) -> str:
    rows = []
    for what in ("tokens", "layers", "rank"):
        measured = ", ".join(f"{x:,}: {y:.2f}" for x, y in points(results, what))
        rows.append([what, f"{slope(points(results, what)):.2f}", measured])
    return f"""## How our step grows

{table(["with", "log-log slope", "measured: seconds"], rows)}"""


PARTS = {  # in the order of the page
    "training": training,
    "ways": ways,
    "dora": dora,
    "scoring": scoring,
    "answers": answers,
    "loading": loading,
    "growth": growth,
}


def report(results: dict) -> str:
    m, square = results["machine"], results["product"]["bf16"]["square"]
    dtype = {"float32": "fp32"}.get(square["spec"].get("base_dtype"), "bf16")
    product = median(rates(square, "flops")) / 1e9
    head = f"""# Beside transformers + PEFT, on a CPU

{m["cpu"]}, {m["cores"]} cores ({square["ready"]["threads"]} threads), bf16 instructions: \
{"yes" if m["bf16"] else "no"}; {product:,.0f} GFLOP/s in a {dtype} product of 2,048². \
{m["date"]}, {m["clock"]} clock, load average {m["load"]} before; commit {m["commit"]}, Python \
{m["python"]}, torch {m["torch"]}, transformers {m["transformers"]}, PEFT {m["peft"]}.

LLaMA of width 512, 8 layers, vocabulary 32,000, random weights; 16 real records a step, cut at 256
tokens; {dtype} base, fp32 adapters on q, k, v, up, down; fused AdamW, clipping. Tokens are real
tokens: padding is not counted. Every measurement has a process of its own; the processes take
turns, step by step, with the same records. Median (least–most)."""
    parts = [part(results) for section, part in PARTS.items() if section in results]
    return "\n\n".join([head, bars(results), *parts]) + "\n"


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
    parser.add_argument("--name", metavar="NAME", help="of another machine's results")
    args = parser.parse_args()
    out = HERE.parent / "runs" / "bench-quick" if args.quick else HERE
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"results-cpu{f'-{args.name}' if args.name else ''}.json"
    results = {"machine": machine() | {"clock": args.clock}}
    if args.only is not None and file.exists():
        results = json.loads(file.read_text())
    bf16 = results["machine"]["bf16"]
    with tempfile.TemporaryDirectory() as folder:
        for section in SECTIONS if args.only is None else args.only:
            began = time.time()
            plan = Plan(args.quick, Path(folder), args.clock, args.rounds, bf16)
            results[section] = getattr(plan, section)()
            results["machine"]["seconds"] = {
                **results["machine"].get("seconds", {}),
                section: round(time.time() - began),
            }
            file.write_text(json.dumps(results, indent=1) + "\n")
    if "product" not in results:
        parser.exit(1, "no tables yet: the section product is not measured\n")
    file.with_suffix(".md").write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # tables have dashes
    main()
