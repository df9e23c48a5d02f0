"""Files that come from elsewhere and go elsewhere: what others write is read, what they read is
written."""

import base64
import json
import shutil

import pytest
import torch
from conftest import words, write_checkpoint
from helpers import flags, make_world, refused, run
from safetensors.torch import load_file, save_file

from data import load_tokenizer
from llama import Llama, load_llama
from plumbing.tokenizer_json import write_tokenizer_json
from rora import METHODS, attach, load_adapter, save_adapter, trainable

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_world(tmp_path, 14)


def adapter(tiny, folder, method="rora", targets=None, **config):
    """A saved adapter whose config says this too, and a base without one."""
    attach(tiny, method, 4, 8, targets=targets)
    save_adapter(tiny, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with torch.device("meta"):
        return Llama(tiny.cfg)


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets, said",
    [
        (EVERY, "all-linear"),
        (["q_proj", "v_proj"], r".*\.self_attn\.(q|v)_proj"),
        (["q_proj", "up_proj"], ["self_attn.q_proj", "mlp.up_proj"]),
        (["q_proj"], [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]),
    ],
    ids=["all", "a pattern", "dotted", "in full"],
)
def test_target_modules_is_read_in_each_of_pefts_spellings(tiny, tmp_path, targets, said):
    base = adapter(tiny, tmp_path, targets=targets, target_modules=said)
    assert set(load_adapter(base, tmp_path).targets) == set(targets)


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {".*up_proj": 8}},
        {"exclude_modules": ["o_proj", "lm_head"]},
        {"exclude_modules": ".*lm_head"},
        {"layers_to_transform": [0, 1]},
        {"lora_dropout": None},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    ],
    ids=str,
)
def test_a_key_that_says_nothing_new_is_read(tiny, tmp_path, config):
    assert load_adapter(adapter(tiny, tmp_path, **config), tmp_path).rank == 4


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.0\.self_attn\.(q|k|v)_proj|.*(up|down)_proj"},
        {"target_modules": "(q_proj"},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "lm_head"]},
        {"target_modules": [["q_proj"]]},
        {"rank_pattern": {"q_proj": 2}},
        {"rank_pattern": [2]},
        {"alpha_pattern": {"q_proj": 16}},
        {"exclude_modules": ["k_proj"]},
        {"exclude_modules": 3},
        {"layers_to_transform": [0]},
        {"layers_to_transform": "all"},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_a_key_that_contradicts_the_tensors_is_refused_by_name(tiny, tmp_path, config):
    base = adapter(tiny, tmp_path, **config)
    with pytest.raises(ValueError, match=f'"{next(iter(config))}"'):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_flag_of_peft_is_written_only_where_it_is_true(tiny, tmp_path, method):
    """PEFT before 0.8 and 0.9 fails on the mere key."""
    attach(tiny, method, 4, 8)
    save_adapter(tiny, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.get("use_rslora", True) and config.get("use_dora", True)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("method", ["series", "parallel"])
def test_a_bottleneck_comes_back_from_either_of_its_two_files(tiny, tmp_path, method, file):
    """LLM-Adapters reads adapter_model.bin alone, and names its layers as we do."""
    base = adapter(tiny, tmp_path, method)
    other = {"adapter_model.safetensors", "adapter_model.bin"} - {file}
    (tmp_path / other.pop()).unlink()
    base = base.to_empty(device="cpu")
    assert load_adapter(base, tmp_path).method == method
    for (name, ours), back in zip(trainable(tiny).items(), trainable(base).values()):
        assert torch.equal(ours, back), name


# --- the base that an adapter names ---------------------------------------------------------------


def test_a_run_on_a_folder_names_it_by_its_absolute_path(world, tmp_path):
    assert run(*flags(world, "r", ckpt="base", max_steps=2, epochs=None)).code == 0
    config = json.loads((tmp_path / "r/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_run_on_a_named_checkpoint_names_the_hubs_which_is_found_again(world, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(world.base, tmp_path / "checkpoints/llama-7b")
    assert run(*flags(world, "r", ckpt="llama-7b", max_steps=3, epochs=None)).code == 0
    config = json.loads((tmp_path / "r/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "yahma/llama-7b-hf"
    (tmp_path / "r/run.json").rename(tmp_path / "run.json")  # now it is anybody's adapter
    assert run("--merge", "r", "--out", "merged").code == 0
    shutil.rmtree(tmp_path / "checkpoints")
    refused(run("--merge", "r", "--out", "again"), 3, "weights_download.sh llama-7b")


def test_a_folder_elsewhere_may_have_a_checkpoints_name(world, tmp_path):
    shutil.copytree(world.base, tmp_path / "elsewhere/llama-7b")
    done = run(*flags(world, "r", ckpt="elsewhere/llama-7b", max_steps=2, epochs=None))
    assert done.code == 0, done.err


# --- base checkpoints -----------------------------------------------------------------------------


def test_shards_may_lie_in_a_folder_below(world):
    file = world.base / "model.safetensors"
    names = load_file(file)
    (world.base / "shards").mkdir()
    file.rename(world.base / "shards/one.safetensors")
    index = {"weight_map": dict.fromkeys(names, "shards/one.safetensors")}
    (world.base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_llama(world.base).cfg.dim == 32


def add_bias(base, value: float) -> str:
    name = "model.layers.0.self_attn.q_proj.bias"
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {name: torch.full((32,), value)}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"attention_bias": True}
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "swish"}))
    return name


def test_biases_that_are_all_zero_are_read_and_not_promised_after_a_merge(world, tmp_path):
    add_bias(world.base, 0.0)
    assert run(*flags(world, "r", max_steps=2, epochs=None)).code == 0
    assert run("--merge", "r", "--out", "merged").code == 0
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["attention_bias"] is False and config["hidden_act"] == "swish"


def test_a_bias_that_is_not_zero_is_refused_by_its_name(world):
    name = add_bias(world.base, 0.5)
    with pytest.raises(ValueError, match=name.removeprefix("model.")):
        load_llama(world.base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_is_written_in_the_dtype_that_is_asked_for(world, tmp_path, dtype):
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    assert run(*flags(world, "r", max_steps=2, epochs=None)).code == 0
    assert run("--merge", "r", "--out", "merged", "--dtype", name).code == 0
    tensors = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config.get("torch_dtype", config.get("dtype")) == str(dtype).removeprefix("torch.")
    refused(run("--merge", "r", "--out", "s", "--export-scale", "plain", "--dtype", name), 2)


# --- tokenizers -----------------------------------------------------------------------------------


def test_a_merged_folder_has_every_tokenizer_and_template_file_of_the_base(world, tmp_path):
    shutil.rmtree(world.base)
    write_checkpoint(world.base)
    files = ["chat_template.jinja", "added_tokens.json", "special_tokens_map.json"]
    for name in files:
        (world.base / name).write_text("{}")
    assert run(*flags(world, "r", max_steps=2, epochs=None)).code == 0
    assert run("--merge", "r", "--out", "merged").code == 0
    there = {path.name for path in (tmp_path / "merged").iterdir()}
    assert there >= {*files, "tokenizer.model", "tokenizer.json", "tokenizer_config.json"}


def test_what_readers_of_a_merged_folder_will_lack_is_said(world, tmp_path):
    """The SentencePiece model here squeezes blanks, which LLaMA's does not."""
    assert run(*flags(world, "r", max_steps=2, epochs=None)).code == 0
    done = run("--merge", "r", "--out", "merged")
    assert done.code == 0 and "no tokenizer.json was written" in done.out
    assert not (tmp_path / "merged/tokenizer.json").exists()


def test_a_tokenizer_config_of_the_bases_own_is_kept(tmp_path):
    words(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert write_tokenizer_json(tmp_path, tmp_path) is None
    assert (tmp_path / "tokenizer.json").exists()
    assert "LlamaTokenizer" in (tmp_path / "tokenizer_config.json").read_text()


def test_llama_3s_ranks_written_as_a_tokenizer_json_give_the_same_ids(tmp_path):
    """Read back by data.py, whose reader of tokenizer.json the cross-check holds to the library."""
    tokens = [bytes([b]) for b in range(256)] + [
        b"th",
        b"the",
        b" t",
        b" th",
        b" the",
        b"he",
        b"12",
    ]
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    assert write_tokenizer_json(tmp_path, tmp_path) is None
    ours, theirs = (load_tokenizer(tmp_path / f"tokenizer.{x}") for x in ("model", "json"))
    for text in ("the thethe  12123\n", "é the", "ththe", ""):
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs.encode(text, bos=True, eos=False) == ids
