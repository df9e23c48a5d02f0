"""Pruning from the command line: what is written is a checkpoint, of the promised size."""

import json
import sys

import torch
from conftest import ROOT, write_checkpoint, write_records

from llama import load_llama

sys.path.insert(0, str(ROOT / "lessons"))
import prune


def test_the_pruned_folder_is_a_checkpoint_of_the_promised_size(tmp_path):
    folder, records = write_checkpoint(tmp_path / "base"), write_records(tmp_path / "records.json")
    out = tmp_path / "small"
    flags = [
        "--ckpt",
        str(folder),
        "--data",
        str(records),
        "--keep",
        "0.5",
        "--records",
        "8",
        "--device",
        "cpu",
    ]
    assert prune.main([*flags, "--out", str(out)]) == 0
    model, said = load_llama(out, dtype=None), json.loads((out / "pruned.json").read_text())
    whole, size = said["parameters"]
    assert sum(p.numel() for p in model.parameters()) == size <= 0.5 * whole
    assert (out / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_what_is_left_of_tiny_is_trained_on_tinys_corpus(tmp_path, capsys):
    assert prune.main(["--records", "4", "--heal", "2", "--out", str(tmp_path / "small")]) == 0
    said = json.loads((tmp_path / "small/pruned.json").read_text())
    assert said["parameters"][1] <= 0.2 * said["parameters"][0] and said["loss"].keys() == {
        "whole",
        "pruned",
        "healed",
    }
    tables = [
        load_llama(folder, dtype=torch.float32).embed_tokens.weight
        for folder in (ROOT / "tiny", tmp_path / "small")
    ]
    assert torch.equal(
        tables[0][:, said["kept"]["channels"]], tables[1]
    )  # the tasks' words stay apart
    assert "healing 2/2" in capsys.readouterr().out
