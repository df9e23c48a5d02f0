"""Workers that take turns, and what is said about them: medians, spreads, ratios, slopes, tables.

This file imports no torch: a child's peak memory, as Linux counts it, is at least what its parent
held when it was born.
"""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent


class Worker:
    """A bench/worker.py process. Raises RuntimeError with the end of its complaints if it dies."""

    def __init__(self, **spec):
        self.spec, self.complaints = spec, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, HERE / "worker.py", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
        )

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.complaints.seek(0)
            raise RuntimeError(f"{self.spec}: {self.complaints.read()[-2000:]}")
        return json.loads(line)

    def turn(self, **turn) -> dict:
        print(json.dumps(turn), file=self.process.stdin, flush=True)
        return self.read() | {k: v for k, v in turn.items() if k != "round"}

    def close(self) -> None:
        self.process.communicate()


def take_turns(specs: dict[str, dict], turns: list[dict], warmup: int = 1) -> dict[str, dict]:
    """{name: {"spec", "ready", "turns": [...]}}. Round by round every worker does the same turn, so
    that what disturbs the machine disturbs all of them."""
    print("  " + ", ".join(specs), end="", file=sys.stderr, flush=True)
    workers = {
        name: Worker(**spec) for name, spec in specs.items()
    }  # they build side by side, before any clock runs
    try:
        results = {
            name: {
                "spec": {k: v for k, v in w.spec.items() if k != "folder"},
                "ready": w.read(),
                "turns": [],
            }
            for name, w in workers.items()
        }
        for i, turn in enumerate(turns):
            print(".", end="", file=sys.stderr, flush=True)
            for name, w in workers.items():
                done = w.turn(**turn)
                if i >= warmup:
                    results[name]["turns"].append(done)
    finally:
        for w in workers.values():
            w.close()
        print(file=sys.stderr)
    return results


# --- numbers --------------------------------------------------------------------------------------


def rates(result: dict, what: str) -> list[float]:
    """tokens or questions a second, a number a round."""
    return [t[what] / t["seconds"] for t in result["turns"]]


def spread(values: list[float], digits: int = 0) -> str:
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def ratios(ours: dict, theirs: dict, what: str) -> list[float]:
    """Ours over theirs, round by round: same work, one right after the other."""
    return [a / b for a, b in zip(rates(ours, what), rates(theirs, what))]


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares of log y on log x: 1 is proportional, 2 quadratic."""
    xs, ys = zip(*[(math.log(x), math.log(y)) for x, y in points])
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def peak_mb(result: dict) -> float:
    return max(t["peak_mb"] for t in result["turns"])


def table(head: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def machine() -> dict:
    """What a reader must know before he compares."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "–"

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next(
        (line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "bf16": "avx512_bf16" in flags or "amx_bf16" in flags,
        "load": round(os.getloadavg()[0], 2),
        "commit": commit,
        "python": platform.python_version(),
        **{p: installed(p) for p in ("torch", "transformers", "peft")},
    }
