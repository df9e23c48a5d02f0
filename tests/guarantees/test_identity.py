"""A base is its weights and what its config means: known again however and wherever it is written,
and never taken for another of the same shape."""

import json
import shutil

import pytest
import torch
from helpers import flags, interrupt, make_world, outcome, refused, run, score, tree
from safetensors.torch import load_file, save_file

from llama import load_llama
from plumbing.hf_files import TensorFiles, pieces, write_tensors

SHORT = {"max_steps": 3, "epochs": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*flags(world, folder, **SHORT)).code == 0
    return folder


# --- the same base, written otherwise -------------------------------------------------------------


def as_bin(base):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def as_shards(base):
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    named = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    write_tensors(base, named, shard_bytes=60_000)


def in_other_words(base):
    config = json.loads((base / "config.json").read_text())
    theta = config.pop("rope_theta")
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "_note": "mine"}
    (base / "config.json").write_text(json.dumps(config, indent=7, sort_keys=True))


@pytest.mark.parametrize("rewrite", [as_bin, as_shards, in_other_words])
def test_the_same_base_elsewhere_and_otherwise_written_is_known_again(
    world, whole, tmp_path, rewrite
):
    base = shutil.copytree(world.base, tmp_path / "base")
    rewrite(base)
    data = shutil.copyfile(world.data, tmp_path / "records.json")
    assert interrupt(1, *flags(world, tmp_path / "run", **SHORT)).code == 130
    assert run("--resume", tmp_path / "run", "--ckpt", base, "--data", data).code == 0
    (ours, theirs) = (outcome(folder) for folder in (tmp_path / "run", whole))
    assert ours["run.json"]["settings"]["ckpt"] == str(base)  # where it is now
    for key in ("best, last, optimizer", "metrics"):
        # the adapter's config names the base's folder; its tensors do not
        assert ours[key] == theirs[key]
    command = (whole, "--ckpt", base, "--data", world.tests, "--out", tmp_path / "scores")
    assert score(*command).code == 0
    assert run("--merge", whole, "--ckpt", base, "--out", tmp_path / "merged").code == 0


# --- another base of the same shapes --------------------------------------------------------------


def another_tensor(base):
    """One of all, as fine-tuning a layer would change it."""
    state = load_file(base / "model.safetensors")
    state["model.layers.1.self_attn.v_proj.weight"] *= 1.001
    save_file(state, base / "model.safetensors")


def another_rotation(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))


def another_precision(base):
    state = load_file(base / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in state.items()}, base / "model.safetensors")


@pytest.mark.parametrize("change", [another_tensor, another_rotation, another_precision])
def test_another_base_of_the_same_shapes_is_refused(world, whole, tmp_path, change):
    base = shutil.copytree(world.base, tmp_path / "base")
    change(base)
    assert interrupt(1, *flags(world, tmp_path / "run", **SHORT)).code == 130
    before = tree(tmp_path)
    refused(run("--resume", tmp_path / "run", "--ckpt", base), 3, "is not what", "--ckpt")
    refused(score(whole, "--ckpt", base, "--data", world.tests), 3, "is not the base")
    merged = ("--merge", whole, "--ckpt", base, "--out", tmp_path / "merged")
    refused(run(*merged), 3, "is not the base")
    assert tree(tmp_path) == before


def test_a_run_of_a_version_that_knew_bases_by_headers_is_refused_with_the_reason(
    world, whole, tmp_path
):
    old = shutil.copytree(whole, tmp_path / "old")
    saved = json.loads((old / "run.json").read_text())
    (old / "run.json").write_text(json.dumps(saved | {"base_sha256": "0" * 64}))
    refused(run("--resume", old), 2, "another version", "--overwrite")


def test_a_sample_reaches_from_a_tensor_s_first_byte_to_its_last():
    for size in (0, 1, 4096, 4097, 100_000, 16_777_216):
        cut = pieces(size)
        assert cut[0][0] == 0 and cut[-1][1] == size and sum(b - a for a, b in cut) <= 4096
        assert all(a < b for a, b in cut) or size == 0


# --- a head of its own ----------------------------------------------------------------------------


def tie(base, head):
    state = load_file(base / "model.safetensors")
    state["lm_head.weight"] = head(state["model.embed_tokens.weight"])
    save_file(state, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return state["lm_head.weight"]


def test_a_head_that_differs_from_the_embedding_is_used_whatever_the_config_says(world, tmp_path):
    base = shutil.copytree(world.base, tmp_path / "base")
    head = tie(base, lambda embedding: embedding.flip(0).contiguous())
    model = load_llama(base, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, head)
    assert run(*flags(world, tmp_path / "run", ckpt=base, **SHORT)).code == 0
    assert run("--merge", tmp_path / "run", "--out", tmp_path / "merged").code == 0
    merged = load_llama(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(merged.lm_head.weight, head)
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_is_the_embedding_is_tied_and_the_same_base_with_it_and_without(
    world, tmp_path
):
    base = shutil.copytree(world.base, tmp_path / "base")
    tie(base, lambda embedding: embedding.clone())
    model = load_llama(base, dtype=torch.float32)
    assert model.lm_head.weight is model.embed_tokens.weight
    twice = TensorFiles(base).identity()
    state = load_file(base / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, base / "model.safetensors")
    assert TensorFiles(base).identity() == twice


# --- NaN and infinity -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_is_refused_by_tensor_whatever_it_is_wanted_for(
    world, whole, tmp_path, bad
):
    """Weights are sampled for their identity: one bad number may lie between the samples."""
    base = shutil.copytree(world.base, tmp_path / "base")
    state = load_file(base / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"].view(-1)[75] = bad
    save_file(state, base / "model.safetensors")
    before = tree(tmp_path)
    named = "layers.1.mlp.up_proj.weight holds NaN or infinity"
    refused(run(*flags(world, tmp_path / "run", ckpt=base, **SHORT)), 4, str(base), named)
    refused(run(*flags(world, None, ckpt=base, **SHORT), "--check"), 4, named)
    out = ("--data", world.tests, "--out", tmp_path / "scores")
    refused(score("--ckpt", base, *out), 4, named)
    refused(score(whole, "--ckpt", base, *out), 4, named)
    refused(run("--merge", whole, "--ckpt", base, "--out", tmp_path / "merged"), 4, named)
    assert tree(tmp_path) == before


def test_a_merge_that_the_base_s_precision_cannot_hold_is_refused(world, tmp_path):
    base = shutil.copytree(world.base, tmp_path / "base")
    state = load_file(base / "model.safetensors")
    save_file({n: t.half() for n, t in state.items()}, base / "model.safetensors")
    assert run(*flags(world, tmp_path / "run", ckpt=base, **SHORT)).code == 0
    adapter = tmp_path / "run" / "adapter_model.safetensors"
    save_file({n: 1e6 * t for n, t in load_file(adapter).items()}, adapter)
    before = tree(tmp_path)
    result = run("--merge", tmp_path / "run", "--out", tmp_path / "merged")
    refused(result, 4, "once the adapter is in", "float16")
    assert tree(tmp_path) == before
