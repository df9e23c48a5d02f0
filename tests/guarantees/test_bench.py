"""bench/: its tables say what was measured, and its scripts run."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import cpu
import gpu

CPUS = sorted((ROOT / "bench").glob("results-cpu*.json"))


@pytest.mark.parametrize("file", CPUS, ids=[file.stem for file in CPUS])
def test_the_cpu_tables_are_made_of_the_measurements_beside_them(file):
    assert file.with_suffix(".md").read_text() == cpu.report(json.loads(file.read_text()))


def test_the_gpu_table_is_made_of_the_measurements_beside_it():
    file = ROOT / "bench" / "results-gpu-h100.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert file.with_suffix(".md").read_text().strip() == gpu.report(lines).strip()


def test_what_fails_is_a_row_of_the_gpu_s_table_not_its_end():
    lines = [
        {"section": "eager", "shape": "toy", "name": "rora", "error": "out of memory"},
        {"section": "eager", "shape": "toy", "name": "lora", "tok_s": 9, "ms": 1.0, "records": 4},
    ]
    text = gpu.report(lines)
    assert "| rora | out of memory |" in text and "| lora | 9 | 1.0 |" in text
