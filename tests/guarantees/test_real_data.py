"""The 7B run in small: real records, real tokenizer, true format; random weights, 2 layers."""

import json

import pytest
from conftest import real_data, write_checkpoint

import eval as judge
import rora
from llama import LlamaConfig


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random LLaMA, 128 wide, with the real vocabulary; beside it, 400 of the real records."""
    folder, tokenizer = tmp_path_factory.mktemp("small"), real_data() / "tokenizer.model"
    records = json.loads((real_data() / "train/commonsense_mini.json").read_text())
    (folder / "records.json").write_text(json.dumps(records[:400]))
    cfg = LlamaConfig(
        dim=128, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=344, vocab_size=32000
    )
    write_checkpoint(folder / "small-llama", cfg, tokenizer)
    return folder


@pytest.mark.parametrize("method", ["rora", "lora", "dora"])
def test_the_loss_falls_on_real_records_and_seven_real_tasks_are_scored(small, tmp_path, method):
    out = tmp_path / "run"
    flags = "--lr 2e-3 --max-steps 6 --warmup 2 --val-size 4 --batch-size 4".split()
    files = ["--ckpt", str(small / "small-llama"), "--data", str(small / "records.json")]
    files += ["--out", str(out)]
    assert rora.main([*files, "--method", method, *flags]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(10.4, abs=0.2)  # ln 32000: a random model knows nothing
    assert losses[-1] < losses[0] - 0.3
    assert judge.main([str(out), "--data", str(real_data() / "eval"), "--limit", "1"]) == 0
    results = json.loads((out / "eval/results.json").read_text())
    assert set(results["tasks"]) == set(judge.PAPER_TASKS) - {"hellaswag"}
    assert results["mean"] is None
