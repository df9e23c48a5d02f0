"""The GPU's benchmark, on a CPU with toy shapes: its speeds mean nothing, but its path is real."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.crosscheck


def test_the_gpu_s_benchmark_runs_to_its_end_in_a_minute_and_only_graphs_fail(
    data_folder, tmp_path
):
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--shapes", "toy"]
    command += ["--minutes", "1", "--out", str(tmp_path)]
    env = os.environ | {"RORA_DATA": str(data_folder)}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=300)
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    sections = {row["section"] for row in rows if "error" not in row}
    assert sections >= {"machine", "eager", "answers", "peers", "loading"}
    errors = {row["error"] for row in rows if "error" in row}
    no_gpu = "ValueError: they are for a GPU, in bf16, with torch 2.10 or later"
    assert errors <= {no_gpu, "not measured: no time was left"}
    assert "| rora r=8 p=0.05 |" in (tmp_path / "gpu.md").read_text()
