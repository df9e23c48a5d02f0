"""Folders that this project writes, read by transformers and PEFT: tokenizers, runs, the kit."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from data import format_prompt, load_tokenizer
from llama import load_llama
from rora import load_adapter, main

pytestmark = pytest.mark.crosscheck


@pytest.fixture
def trained(make_llama, data_folder, records, tmp_path):
    """trained(tokenizer, vocab_size) -> (base, a run of two steps on it)."""

    def make(tokenizer: str, vocab_size: int):
        base, _ = make_llama(vocab_size=vocab_size, num_hidden_layers=1)
        shutil.copyfile(data_folder / tokenizer, base / "tokenizer.model")
        data, run = tmp_path / "records.json", tmp_path / "run"
        data.write_text(json.dumps(records["train/boolq"][:4]))
        words = f"--ckpt {base} --data {data} --out {run} --device cpu --val-size 0 --warmup 0"
        command = f"{words} --max-steps 2 --batch-size 2 --rank 4 --lr 0.02"
        assert main(command.split()) == 0
        return base, run

    return make


@pytest.mark.parametrize(
    "tokenizer, vocab_size, whose",
    [("tokenizer.model", 32000, "LLaMA's"), ("llama3/tokenizer.model", 128256, "Llama-3's")],
)
def test_a_merged_folder_gives_the_right_ids_in_transformers(
    tokenizer, vocab_size, whose, trained, data_folder, records, tmp_path, mismatches
):
    """On every prompt there is, from a base that has tokenizer.model and nothing else."""
    _, run = trained(tokenizer, vocab_size)
    assert main(["--merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ours = load_tokenizer(data_folder / tokenizer)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
    texts = list({format_prompt(r): None for task in records.values() for r in task})
    ids = theirs(texts)["input_ids"]
    pairs = zip((ours.encode(t, bos=True, eos=False) for t in texts), ids)
    assert mismatches(f"ids of prompts in a merged folder, {whose}", "transformers", pairs) == 0
    for text, row in list(zip(texts, ids))[::200]:
        assert theirs.decode(row, skip_special_tokens=True) == text


def test_peft_opens_a_run_by_its_folder_alone(trained, deviation):
    """AutoPeftModelForCausalLM finds the base by the name that the adapter holds."""
    base, run = trained("tokenizer.model", 32000)
    theirs = AutoPeftModelForCausalLM.from_pretrained(run).float().eval()
    ours = load_llama(base, dtype=torch.float32)
    load_adapter(ours, run)
    ids = torch.randint(32000, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        absolute, _ = deviation(
            "rora: logits of a run folder", "AutoPeft", ours(ids), theirs(input_ids=ids).logits
        )
    assert absolute < 1e-5


def test_peft_agrees_with_the_conformance_kit():
    script = ROOT / "tests/crosscheck/peers/peft_kit.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    assert [row["kind"] for row in told] == ["agrees"] * 6
    assert all(row["figure"] < row["within"] for row in told), told
