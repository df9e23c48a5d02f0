"""This project beside transformers + PEFT on one GPU, at the paper's sizes: python bench/gpu.py

Random weights, made on the device; real records and questions (RORA_DATA names their folder). Each
section is a process of its own that builds its base once and puts one variant after the other on
it; what matters most comes first. Every measurement is a line of JSON the moment it is made, into
gpu.jsonl, and gpu.md is the table of all lines; what fails is a line, too, and ends nothing.

    python bench/gpu.py --minutes 6                                  all of it
    python bench/gpu.py --device cpu --shapes toy --minutes 1        to see that it runs
    python bench/gpu.py --table FILE.jsonl                           the table again
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from turns import HERE, machine, table

SECTIONS = {  # in this order; each may take its share of the time that is left
    "eager": 1.0,
    "graphs": 1.5,
    "answers": 0.7,
    "peers": 1.4,
    "compiled": 1.2,
    "loading": 0.7,
}
QUESTIONS = 22_419  # of the eight tasks

# --- a section, in its process --------------------------------------------------------------------


class Bench:
    """One base model and what is measured on it. Rows are printed as they come."""

    def __init__(self, section: str, shape: str, device: str):
        """Whatever need not wait for the device: imports, records."""
        import torch
        import worker

        self.torch, self.worker, self.section, self.shape = torch, worker, section, shape
        self.device, self.until, self.cuda = torch.device(device), 0.0, device == "cuda"
        self.cfg = worker.config({"shape": shape})
        self.small, self.rows = not self.cuda, 0
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.lines = sys.stdout
        sys.stdout = sys.stderr  # libraries print; the other end reads JSON
        torch.manual_seed(0)
        self.batch = worker.training_batches(self.cfg)
        self.rounds = 3 if self.small else 8
        self.records = 4 if self.small else 16

    def say(self, name: str, **facts) -> dict:
        facts = {"section": self.section, "shape": self.shape, "name": name, **facts}
        print(json.dumps(facts), file=self.lines, flush=True)
        return facts

    def row(self, name: str, measure: Callable[[], dict], seconds: float = 0) -> dict:
        """Say what `measure` finds, or why it found nothing. `seconds`: what it takes at least."""
        if self.rows and time.time() + seconds > self.until:  # a section's first is measured
            return self.say(name, error="not measured: no time was left")
        self.rows += 1
        began = time.perf_counter()
        self.tidy()
        try:
            facts = measure()
        except Exception as e:  # whatever it is, the next row may work
            what = "out of memory" if isinstance(e, self.torch.OutOfMemoryError) else None
            facts = {"error": what or f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}
        return self.say(name, **facts, wall=round(time.perf_counter() - began, 1))

    def tidy(self) -> None:
        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def peak_gb(self) -> float | None:
        return round(self.torch.cuda.max_memory_allocated() / 1e9, 1) if self.cuda else None

    def reserved_gb(self) -> float | None:
        return round(self.torch.cuda.max_memory_reserved() / 1e9, 1) if self.cuda else None

    def timed(self, work: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def steps(self, step: Callable[[list], None], records: int, rounds: int, warm: int) -> dict:
        """Tokens a second over `rounds` batches, after `warm` of them."""
        batches = [self.batch({"round": i, "records": records}) for i in range(rounds)]
        for batch in (batches * warm)[:warm]:
            step(batch)
        tokens = [sum(len(r.ids) for r in batch) for batch in batches]
        seconds = [self.timed(lambda: step(batch)) for batch in batches]
        rates = [n / s for n, s in zip(tokens, seconds)]
        mean = sum(tokens) / len(tokens)
        return {
            "tok_s": round(median(rates)),
            "least": round(min(rates)),
            "most": round(max(rates)),
            "ms": round(1000 * median(seconds), 1),
            "tokens": round(mean),
            "records": records,
            "peak_gb": self.peak_gb(),
            "reserved_gb": self.reserved_gb(),
        }

    # --- the sections ---

    def begin(self) -> None:
        """Say that all is ready, wait for the word, which is when rows may no longer begin."""
        self.say("ready")
        self.until = float(sys.stdin.readline())
        if self.section != "peers":
            self.model = self.new_model()

    def new_model(self):
        model = self.worker.our_model({"shape": self.shape}, self.device)
        return model if self.cuda else model.float()  # few CPUs multiply bf16

    def product(self) -> dict:
        n = 8192 if self.cuda else 256
        a, b = self.torch.randn(2, n, n, device=self.device).to(self.dtype)
        ten = lambda: 20 * n**3 / self.timed(lambda: [a @ b for _ in range(10)])
        rates = [ten() for _ in range(6)][1:]
        self.warm_up(ten)
        name = self.torch.cuda.get_device_name() if self.cuda else "cpu"
        return {
            "flops": median(rates),
            "sustained": median(ten() for _ in range(5)),
            "device": name,
            "weights": self.worker.linear_weights(self.cfg),
        }

    def warm_up(self, work: Callable[[], object]) -> None:
        """A card that works without a pause gets hot, and slower: measure it so, as training is."""
        end = time.time() + (2 if self.cuda else 0)
        while time.time() < end:
            self.timed(work)

    def floor(self, records: int) -> dict:
        """The frozen weights' products alone, forward and to the input, at a batch's size."""
        linear = self.torch.nn.Linear
        weights = [m.weight for m in self.model.modules() if isinstance(m, linear)]
        batches = [self.batch({"round": i, "records": records}) for i in range(self.rounds)]
        n = round(sum(len(r.ids) for b in batches for r in b) / len(batches))
        widths = {w for W in weights for w in W.shape}
        x = {w: self.torch.randn(n, w, device=self.device).to(self.dtype) for w in widths}

        def once() -> None:
            for W in weights:
                x[W.size(1)] @ W.t()
                x[W.size(0)] @ W

        once()
        burst = 1000 * median(self.timed(once) for _ in range(3))
        self.warm_up(once)
        ms = 1000 * median(self.timed(once) for _ in range(5))
        return {
            "ms": round(ms, 1),
            "burst_ms": round(burst, 1),
            "tokens": n,
            "records": records,
            "tok_s": round(1000 * n / ms),
        }

    @contextmanager
    def attached(self, method: str, rank: int, dropout: float) -> Iterator[None]:
        import rora

        rora.attach(self.model, method, rank, self.worker.ALPHA, dropout)
        self.model.train()
        try:
            yield
        finally:
            for name, layer in rora.wrappers(self.model).items():
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, layer.base)

    def ours(
        self,
        method: str,
        rank: int,
        dropout: float,
        records: int | None = None,
        graphs: bool = False,
        recomputed: int = 0,
        compiled: bool = False,
        profile: bool = False,
    ) -> Callable[[], dict]:
        records = records or self.records

        def measure() -> dict:
            import fast
            import rora
            from data import collate
            from llama import compile_blocks
            from plumbing import memory

            with self.attached(method, rank, dropout):
                optimizer, facts = rora.new_optimizer(self.model, self.worker.LR), {}
                batches = [self.batch({"round": i, "records": records}) for i in range(self.rounds)]
                largest = max(batches, key=lambda b: sum(len(r.ids) for r in b))
                with fast.held(self.model), self.torch.random.fork_rng():
                    plan = memory.plan(self.model, collate(largest), fast.logit_bytes(self.device))
                facts["plan_gb"] = round(plan.total(recomputed) / 1e9, 1)
                backward = rora.backward
                if compiled:  # before anything is recorded
                    compile_blocks(self.model)
                if graphs:
                    if why := fast.Graphs.refusal(self.model, recomputed):
                        raise ValueError(why)
                    most = sum(len(r.ids) for r in largest)
                    backward = fast.Graphs(self.model, records, most, 256).backward
                self.tidy()

                def step(batch: list) -> None:
                    rora.train_step(
                        self.model,
                        batch,
                        optimizer,
                        self.worker.LR,
                        records,
                        recomputed,
                        backward=backward,
                    )
                    optimizer.zero_grad()

                warm = self.rounds if graphs or compiled else 3
                facts |= self.steps(step, records, self.rounds, warm)
                if graphs:
                    facts["recordings"] = len(backward.__self__.recorded)
                if compiled:
                    counters = self.torch._dynamo.utils.counters
                    facts["compilations"] = counters["stats"].get("unique_graphs")
                if profile and self.cuda:
                    facts |= self.kernels(lambda: step(batches[0]))
                return facts

        return measure

    def kernels(self, work: Callable[[], None]) -> dict:
        """How many kernels run and what they take on the device, the longest by name."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            work()
            self.wait()
        total, count = Counter(), Counter()
        for e in seen.events():
            if e.device_type == self.torch.autograd.DeviceType.CUDA:
                name = re.sub(r"void |at::native::|\(anonymous namespace\)::", "", e.name)[:110]
                total[name] += e.device_time_total / 1000
                count[name] += 1
        top = {name: [round(ms, 2), count[name]] for name, ms in total.most_common(40)}
        return {
            "device_ms": round(sum(total.values()), 1),
            "kernels": sum(count.values()),
            "top": top,
        }

    def eager(self) -> None:
        r = 8 if self.small else 128
        self.row("product", self.product)
        self.row(f"floor, {self.records} records", lambda: self.floor(self.records))
        self.row(f"rora r={r} p=0.05", self.ours("rora", r, 0.05))
        self.row(f"dora r={r} p=0.05", self.ours("dora", r, 0.05))
        self.row(f"rora r={r} p=0", self.ours("rora", r, 0.0))
        self.row("lora r=8 p=0.05", self.ours("lora", 8, 0.05))
        many = 4 * self.records
        self.row(f"floor, {many} records", lambda: self.floor(many))
        self.row(f"rora r={r} p=0.05, {many} records", self.ours("rora", r, 0.05, many))
        L = self.cfg.n_layers
        self.row(f"rora r={r} p=0.05, all recomputed", self.ours("rora", r, 0.05, recomputed=L))
        for method in ("rora", "dora"):
            measure = self.ours(method, r, 0.05, profile=True)
            self.row(f"{method} r={r} p=0.05, kernels", measure, 10 if self.cuda else 0)

    def graphs(self) -> None:
        r, many = (8 if self.small else 128), 4 * self.records
        on = {"graphs": True}
        self.row("product", self.product)
        self.row(f"floor, {self.records} records", lambda: self.floor(self.records))
        self.row(f"rora r={r} p=0.05", self.ours("rora", r, 0.05, **on))
        measure = self.ours("dora", r, 0.05, profile=True, **on)
        self.row(f"dora r={r} p=0.05", measure)
        self.row(f"rora r={r} p=0.05, {many} records", self.ours("rora", r, 0.05, many, **on))
        self.row(f"rora r={r} p=0", self.ours("rora", r, 0.0, **on))
        self.row("lora r=8 p=0.05", self.ours("lora", 8, 0.05, **on))
        some = 23 if self.cuda else 6
        self.row(f"rora r={r} p=0.05, {some} records", self.ours("rora", r, 0.05, some, **on))
        self.row(f"dora r={r} p=0", self.ours("dora", r, 0.0, **on))
        measure = self.ours("rora", r, 0.05, profile=True, **on)
        self.row(f"rora r={r} p=0.05, kernels", measure, 10 if self.cuda else 0)
        del self.model
        self.tidy()
        self.shape = "small-135m" if self.cuda else self.shape
        self.cfg = self.worker.config({"shape": self.shape})
        self.model = self.new_model()
        for name, on in ((", eager", False), ("", True)):
            self.row(f"rora r=32 p=0.05{name}", self.ours("rora", 32, 0.05, graphs=on))

    def compiled(self) -> None:
        r, many = (8 if self.small else 128), 4 * self.records
        if not self.cuda:
            return
        both = {"graphs": True, "compiled": True}
        measure = self.ours("rora", r, 0.05, profile=True, **both)
        self.row(f"rora r={r} p=0.05, graphs", measure)
        measure = self.ours("dora", r, 0.05, profile=True, **both)
        self.row(f"dora r={r} p=0.05, graphs", measure)
        measure = self.ours("rora", r, 0.05, many, **both)
        self.row(f"rora r={r} p=0.05, graphs, {many} records", measure)
        self.row(f"rora r={r} p=0.05", self.ours("rora", r, 0.05, compiled=True))

    def answers_of(self, new: int, rows: int, draft: int = 0) -> Callable[[], dict]:
        def measure() -> dict:
            from llama import generate

            self.model.eval()
            prompts, begin = self.prompts, list(range(100, 100 + draft))

            def answer() -> None:
                for i in range(0, len(prompts), rows):
                    generate(self.model, prompts[i : i + rows], new, -1, begin)

            answer()
            seconds = median(self.timed(answer) for _ in range(2))
            rate = len(prompts) / seconds
            return {
                "q_s": round(rate, 1),
                "questions": len(prompts),
                "tokens": sum(map(len, prompts)),
                "minutes": round(QUESTIONS / rate / 60, 2),
                "peak_gb": self.peak_gb(),
            }

        return measure

    def answers(self) -> None:
        n, rows = (16, 8) if self.small else (512, 256)
        self.prompts = self.worker.test_prompts(self.cfg, n)
        self.row(f"8 new tokens, {rows} rows", self.answers_of(8, rows))
        self.row(f"1 new token, {rows} rows", self.answers_of(1, rows))
        self.row(f"32 new tokens, {rows} rows", self.answers_of(32, rows))
        self.row(f"8 new tokens, {rows} rows, 4 drafted in vain", self.answers_of(8, rows, 4))
        self.row(f"4 new tokens, {rows} rows", self.answers_of(4, rows))
        self.row(f"8 new tokens, {rows // 2} rows", self.answers_of(8, rows // 2))
        self.row(f"8 new tokens, {2 * rows} rows", self.answers_of(8, 2 * rows))
        if self.cuda:
            self.prompts = self.prompts[:32]
            self.row("8 new tokens, each alone", self.answers_of(8, 1), 15)

    def theirs(self, base, method: str, rank: int, dropout: float, **how) -> Callable[[], dict]:
        """Their documented ways: mixed precision by autocast, checkpointing."""

        def measure() -> dict:
            spec = {"method": method, "rank": rank, "dropout": dropout, **how}
            step, peft_model = self.worker.their_step(spec, base, self.device)
            try:
                slow = "recompute" in how and method == "dora"
                return self.steps(step, self.records, 3 if slow else self.rounds, 1 if slow else 3)
            finally:
                peft_model.unload()
                for p in base.parameters():
                    p.grad = None
                base.gradient_checkpointing_disable()

        return measure

    def peers(self) -> None:
        try:
            import peft
            import transformers
        except ImportError as e:
            self.say("PEFT", error=f"not measured: {e}")
            return
        r = 8 if self.small else 128
        base = self.worker.their_model({"shape": self.shape}, self.device).to(self.dtype)
        self.say("versions", transformers=transformers.__version__, peft=peft.__version__)
        for method, p, how in [
            ("rora", 0.05, {"autocast": True}),
            ("dora", 0.0, {"autocast": True}),
            ("dora", 0.05, {"recompute": "all"}),
            ("rora", 0.05, {"recompute": "all", "autocast": True}),
            ("dora", 0.05, {"autocast": True}),
            ("rora", 0.05, {}),
        ]:
            if not self.cuda:  # bf16 is slow on most CPUs
                how = {k: v for k, v in how.items() if k != "autocast"}
            name = ", ".join({"recompute": "checkpointing"}.get(k, k) for k in how) or "plain"
            self.row(f"{method} r={r} p={p:g}, {name}", self.theirs(base, method, r, p, **how))

    def loading(self) -> None:
        """A checkpoint of fp16, written and so in the page cache, to the device."""
        from llama import load_llama, save_llama

        with tempfile.TemporaryDirectory() as folder:
            write = lambda: save_llama(self.model.half(), folder)
            self.row("written", lambda: {"seconds": round(self.timed(write), 1)}, 20 * self.cuda)
            self.model = None
            if any(Path(folder).iterdir()):
                load = lambda: load_llama(folder, self.device)
                for _ in range(2):
                    self.row("loaded", lambda: {"seconds": round(self.timed(load), 1)})


def section(name: str, shape: str, device: str) -> None:
    sys.path.insert(0, str(HERE.parent))
    if name == "peers":  # seconds that the section before it need not wait for
        try:
            import peft  # noqa: F401
        except ImportError:
            pass
    bench = Bench(name, shape, device)
    bench.begin()
    getattr(bench, name)()


# --- all of them ----------------------------------------------------------------------------------


def run(args: argparse.Namespace, file: Path) -> None:
    """One section after the other; the next one's imports run while this one measures."""
    end = time.time() + 60 * args.minutes
    jobs = [(name, shape) for shape in args.shapes for name in args.only or SECTIONS]
    start = lambda job: subprocess.Popen(
        [
            sys.executable,
            __file__,
            "--section",
            job[0],
            "--shapes",
            job[1],
            "--device",
            args.device,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    ahead = start(jobs[0])
    with file.open("a") as lines:
        lines.write(json.dumps({"section": "machine", "name": "machine", **machine()}) + "\n")
        for i, job in enumerate(jobs):
            process, ahead = ahead, start(jobs[i + 1]) if i + 1 < len(jobs) else None
            ready = process.stdout.readline()
            if not ready:
                print(f"{job[1]}, {job[0]}: did not start", flush=True)
                continue
            left = sum(SECTIONS[name] for name, _ in jobs[i:])
            until = time.time() + max(0, end - time.time()) * SECTIONS[job[0]] / left
            print(f"{job[1]}, {job[0]}: until {until - end + 60 * args.minutes:.0f} s", flush=True)
            process.stdin.write(f"{until}\n")
            process.stdin.flush()
            reap = subprocess.Popen(["sleep", str(max(1, until + 20 - time.time()))])
            for line in follow(process, reap):
                lines.write(line)
                lines.flush()
                print(line[:400], end="", flush=True)
            if process.wait():
                facts = {"section": job[0], "shape": job[1], "name": "the process"}
                lines.write(
                    json.dumps(facts | {"error": f"ended with {process.returncode}"}) + "\n"
                )


def follow(process: subprocess.Popen, clock: subprocess.Popen) -> Iterator[str]:
    """Its lines, until it ends or the clock does, which ends it."""
    import threading

    def end() -> None:
        clock.wait()
        process.kill()

    threading.Thread(target=end, daemon=True).start()
    yield from process.stdout
    clock.kill()


def report(lines: list[dict]) -> str:
    """Markdown: a table a section and shape, with shares of the product rate and of the floor."""
    facts = next((r for r in lines if "flops" in r), {})
    m = next((r for r in lines if r["section"] == "machine"), {})
    parts = [
        f"# {facts.get('device', 'unknown')}\n\n{m.get('date')}, commit {m.get('commit') or '–'}, "
        f"Python {m.get('python')}, torch {m.get('torch')}, transformers {m.get('transformers')}, "
        f"PEFT {m.get('peft')}. Random weights, real records; real tokens: padding is not "
        "counted.\n\n"
        "Floor: the frozen weights' products alone, forward and to the input, for as many tokens. "
        "Product: 4 FLOPs for each frozen weight that multiplies and each token, of the square "
        "product's rate. Both are the section's own where it has them, else the first."
    ]
    floors = [r for r in lines if r["name"].startswith("floor") and "ms" in r]
    for name, shape in dict.fromkeys((r["section"], r.get("shape")) for r in lines):
        if name == "machine":
            continue
        rows, beside = [], lambda r: r["section"] != name  # the section's own before the others'
        rate = min((r for r in lines if "flops" in r), key=beside, default=facts)
        for r in (r for r in lines if (r["section"], r.get("shape")) == (name, shape)):
            if "error" in r:
                rows.append([r["name"], r["error"], "–", "–", "–", "–"])
            elif "tok_s" in r:
                share = 4 * rate["weights"] * r["tok_s"] / rate["flops"] if rate else 0
                near = lambda f: (abs(f["records"] - r["records"]), beside(f))
                floor = r["tok_s"] / min(floors, key=near)["tok_s"] if floors else 0
                gb = f"{r['peak_gb']}" if r.get("peak_gb") else "–"
                gb += f" ({r['plan_gb']})" if r.get("plan_gb") else ""
                spread = f" ({r['least']:,}–{r['most']:,})" if "least" in r else ""
                cells = [f"{r['tok_s']:,}{spread}", r["ms"]]
                same = shape == facts.get("shape")
                shares = [f"{floor:.2f}", f"{share:.2f}"] if same else ["–", "–"]
                rows.append([r["name"], *cells, *shares, gb])
            elif "q_s" in r:
                cells = [f"{r['q_s']} questions/s", f"{r['minutes']} min for {QUESTIONS:,}"]
                rows.append([r["name"], *cells, "–", "–", r.get("peak_gb") or "–"])
            elif "flops" in r:
                rows.append([r["name"], f"{r['flops'] / 1e12:,.0f} TFLOP/s", "–", "–", "–", "–"])
            elif "us" in r:
                rows.append([r["name"], f"{r['us']:,.0f} µs", "–", "–", "–", "–"])
            elif "seconds" in r:
                rows.append([r["name"], f"{r['seconds']} s", "–", "–", "–", "–"])
        head = [f"{shape}, {name}", "tokens/s", "ms a step", "of the floor", "of the product"]
        if rows:
            parts.append(table([*head, "peak GB (planned)"], rows))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=6, metavar="N")
    parser.add_argument("--shapes", nargs="+", default=["llama-7b"], metavar="NAME")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--out", default=os.environ.get("OUT"), metavar="DIR")
    parser.add_argument("--table", metavar="FILE", help="nothing is measured")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        return section(args.section, args.shapes[0], args.device)
    out = Path(args.out or HERE.parent / "runs" / "bench-gpu")
    out.mkdir(parents=True, exist_ok=True)
    file = Path(args.table) if args.table else out / "gpu.jsonl"
    if not args.table:
        file.unlink(missing_ok=True)
        run(args, file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    text = report(lines)
    if not args.table:
        (out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # tables have dashes
    main()
