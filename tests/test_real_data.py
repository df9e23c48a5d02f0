"""The 7B run in small: real records, real tokenizer, true format and vocabulary; random weights, 4 layers of width 256."""

import json

import pytest
from conftest import real_data, write_checkpoint

import eval as judge
import rora
from llama import LlamaConfig


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    tokenizer = real_data() / "tokenizer.model"
    cfg = LlamaConfig(
        dim=256, n_layers=4, n_heads=8, n_kv_heads=8, hidden_dim=688, vocab_size=32000
    )
    return write_checkpoint(tmp_path_factory.mktemp("small") / "small-llama", cfg, tokenizer)


@pytest.mark.parametrize("method", ["rora", "lora", "dora"])
def test_the_loss_falls_on_real_records_and_seven_real_tasks_are_scored(small, tmp_path, method):
    out = tmp_path / "run"
    assert (
        rora.main(
            [
                "--ckpt",
                str(small),
                "--data",
                str(real_data() / "train/commonsense_mini.json"),
                "--method",
                method,
                "--lr",
                "2e-3",
                "--max-steps",
                "6",
                "--warmup",
                "2",
                "--val-size",
                "8",
                "--batch-size",
                "8",
                "--out",
                str(out),
                "--dtype",
                "bf16",
            ]
        )
        == 0
    )
    losses = [
        row["loss"]
        for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    ]
    assert losses[0] == pytest.approx(10.4, abs=0.2)  # ln 32000: a random model knows nothing
    assert losses[-1] < losses[0] - 0.3
    assert judge.main([str(out), "--data", str(real_data() / "eval"), "--limit", "2"]) == 0
    results = json.loads((out / "eval/results.json").read_text())
    assert set(results["tasks"]) == judge.TASKS.keys() - {"hellaswag"} and results["mean"] is None
