"""Checkpoint folders: in whole or not at all, and never two copies."""

import dataclasses
import json

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file

from llama import Llama, load_llama, save_llama
from plumbing.hf_files import CheckpointError, TensorFiles, write_tensors

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def test_what_is_saved_is_loaded(tiny, tmp_path):
    save_llama(tiny, tmp_path)
    assert torch.equal(load_llama(tmp_path, "cpu", torch.float32)(IDS), tiny(IDS))


def test_tensors_bear_hugging_face_names(tiny, tmp_path):
    save_llama(tiny, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    } <= names


def test_shards_and_one_file_are_the_same_model(tiny, tmp_path):
    save_llama(tiny, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_tensors(tmp_path, tiny.state_dict(), shard_bytes=10_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(load_llama(tmp_path, "cpu", torch.float32)(IDS), tiny(IDS))


def test_bin_files_are_the_same_model(tiny, tmp_path):
    save_llama(tiny, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(
        4
    )  # old conversions store it; we compute it
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert torch.equal(load_llama(tmp_path, "cpu", torch.float32)(IDS), tiny(IDS))


def test_tied_embeddings_are_one_tensor_on_disk_and_in_memory(tmp_path):
    model = Llama(dataclasses.replace(SMALL, tie_embeddings=True))
    save_llama(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_llama(tmp_path, "cpu", torch.float32)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight and torch.equal(
        loaded(IDS), model(IDS)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_asked_for_is_the_dtype_loaded(tiny, tmp_path, dtype):
    save_llama(tiny, tmp_path)
    model = load_llama(tmp_path, "cpu", dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    save_llama(model, tmp_path / "again")
    assert {p.dtype for p in load_llama(tmp_path / "again", "cpu", None).parameters()} == {dtype}


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda s: s.pop("model.layers.1.mlp.up_proj.weight"),
            "missing layers.1.mlp.up_proj.weight",
        ),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            "unexpected layers.0.self_attn.q_proj.bias",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(31)}),
            r"norm.weight expected \(32,\) found \(31,\)",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            "norm.weight is I8",
        ),
    ],
)
def test_a_checkpoint_loads_whole_or_not_at_all(tiny, tmp_path, change, said):
    save_llama(tiny, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        load_llama(tmp_path, "cpu", torch.float32)


def test_names_and_shapes_are_checked_before_any_weight_is_read(tiny, tmp_path, monkeypatch):
    save_llama(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    monkeypatch.setattr(TensorFiles, "read", lambda *a: pytest.fail("a weight was read"))
    with pytest.raises(CheckpointError, match="missing layers.2"):
        load_llama(tmp_path)


def test_a_model_with_adapters_is_not_saved_as_a_plain_one(tiny, tmp_path):
    import rora

    rora.attach(tiny, "lora", 4)
    with pytest.raises(ValueError, match="merge"):
        save_llama(tiny, tmp_path)
    rora.merge(tiny)
    save_llama(tiny, tmp_path)


def test_two_checkpoints_of_other_shape_or_precision_have_other_fingerprints(tiny, tmp_path):
    save_llama(tiny, tmp_path / "a")
    save_llama(tiny.bfloat16(), tmp_path / "b")
    assert TensorFiles(tmp_path / "a").identity() != TensorFiles(tmp_path / "b").identity()
