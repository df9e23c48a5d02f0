"""From config.json, model.safetensors and tokenizer.json to a trained, scored and merged model."""

import dataclasses
import json
import random
import shutil

import pytest
import torch
from helpers import CONFIG, flags, interrupt, make_world, refused, run, score
from test_bpe import BEGIN, END, LLAMA3, SMOLLM2, TEMPLATE, write

from data import DataError, load_tokenizer
from llama import Llama, LlamaConfig, RopeScaling, load_llama, save_llama
from plumbing.hf_files import CheckpointError

SHAPES = {  # what is particular about each, but for the size
    "llama-3.1": (LLAMA3, {"rope_theta": 5e5, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)}),
    "llama-3.2": (
        LLAMA3,
        {
            "rope_theta": 5e5,
            "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192),
            "tie_embeddings": True,
        },
    ),
    "smollm2": (SMOLLM2, {"rope_theta": 1e5, "tie_embeddings": True, "norm_eps": 1e-5}),
}
MERGES = "t h,th e,a n,a t,i n,i s,e r"
ENDS = [{"id": 300 + i, "content": f"<|{end}|>", "special": True} for i, end in enumerate("be")]


def make_base(world, shape: str) -> None:
    rule, change = SHAPES[shape]
    shutil.rmtree(world.base)
    cfg = dataclasses.replace(CONFIG, vocab_size=302, bos=300, eos=301, **change)
    torch.manual_seed(1)
    save_llama(Llama(cfg), world.base)
    config = (world.base / "config.json").read_text()
    write(world.base, MERGES, pre_tokenizer=rule, added_tokens=ENDS)
    (world.base / "config.json").write_text(config)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_world(tmp_path, 14)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_with_tokenizer_json_is_trained_scored_and_merged(world, tmp_path, shape):
    make_base(world, shape)
    assert run(*flags(world, "r", max_steps=3, epochs=None, targets=["q_proj", "v_proj"])).code == 0
    assert score("r", "--data", world.tests, "--limit", 2).code == 0
    assert run("--merge", "r", "--out", "merged").code == 0
    merged, before = tmp_path / "merged", load_llama(world.base, dtype=torch.float32)
    after = load_llama(merged, dtype=torch.float32)
    assert after.cfg == before.cfg == LlamaConfig.from_json(merged / "config.json")
    ids = load_tokenizer(merged).encode("is the sky blue?", bos=True, eos=False)
    assert ids[0] == 300
    assert not torch.equal(after(torch.tensor([ids])), before(torch.tensor([ids])))


def test_a_run_is_not_resumed_with_another_tokenizer_json(world):
    make_base(world, "smollm2")
    assert interrupt(2, *flags(world, "r", max_steps=4, epochs=None)).code == 130
    file = world.base / "tokenizer.json"
    other = json.loads(file.read_text())
    other["model"]["ignore_merges"] = True
    file.write_text(json.dumps(other))
    refused(run("--resume", "r"), 3, "tokenizer")


@pytest.mark.parametrize("name", ["base/model.safetensors", "r/adapter_model.safetensors"])
def test_a_git_lfs_pointer_in_place_of_weights_is_called_one(world, name, tmp_path):
    assert run(*flags(world, "r", max_steps=2, epochs=None)).code == 0
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(run("--merge", "r", "--out", "merged"), 3, name, "git-lfs pointer")


def test_a_checkpoint_is_found_under_the_hubs_name_and_its_adapter_says_so(world, tmp_path):
    (tmp_path / "checkpoints/some-one").mkdir(parents=True)
    shutil.move(world.base, tmp_path / "checkpoints/some-one/model")
    assert run(*flags(world, "r", ckpt="some-one/model", max_steps=2, epochs=None)).code == 0
    config = json.loads((tmp_path / "r/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some-one/model"
    (tmp_path / "alone").mkdir()  # as an adapter is handed on: without its run
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(tmp_path / "r" / name, tmp_path / "alone" / name)
    assert run("--merge", "alone", "--out", "merged").code == 0
    absent = run(*flags(world, "s", ckpt="some-one/other"))
    refused(absent, 3, "./weights_download.sh some-one/other fetches it")
    file = run(*flags(world, "s", ckpt=world.data))
    refused(file, 3, "is a file: name the folder")


def test_an_adapter_of_a_named_checkpoint_carries_the_name_that_others_know(world, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.move(world.base, tmp_path / "checkpoints/smollm2-135m")
    assert run(*flags(world, "r", ckpt="smollm2-135m", max_steps=2, epochs=None)).code == 0
    config = json.loads((tmp_path / "r/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M"
    for name in ("run.json", "checkpoints"):
        shutil.move(tmp_path / "r" / name, tmp_path / f"not-{name}")
    assert run("--merge", "r", "--out", "merged").code == 0  # found by that name too


# --- any damage -----------------------------------------------------------------------------------

ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    [None],
    {},
    {"type": []},
    10**30,
]


def places(value, path=()):
    """The path of every part of a JSON value, of long lists and objects the first ones."""
    yield path
    children = value.items() if isinstance(value, dict) else ()
    children = enumerate(value) if isinstance(value, list) else children
    for key, child in list(children)[:30]:
        yield from places(child, (*path, key))


def put(value, path, new):
    if not path:
        return new
    value = value.copy()
    value[path[0]] = put(value[path[0]], path[1:], new)
    return value


@pytest.mark.parametrize("name, read", [("tokenizer.json", load_tokenizer), ("config.json", None)])
def test_whatever_stands_in_a_file_it_is_read_or_refused_in_one_line(tmp_path, name, read):
    """300 files with one or two parts replaced by something odd."""
    rng = random.Random(0)
    added = [END, BEGIN, {"id": 902, "content": "foo", "special": False}]
    write(tmp_path, MERGES, pre_tokenizer=SMOLLM2, post_processor=TEMPLATE, added_tokens=added)
    if read is None:
        cfg = dataclasses.replace(CONFIG, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
        (tmp_path / name).write_text(json.dumps(cfg.to_json(torch.float32)))
        read = lambda folder: LlamaConfig.from_json(folder / name)
    whole, refusals = json.loads((tmp_path / name).read_text()), 0
    for _ in range(300):
        spoilt = whole
        for _ in range(rng.randint(1, 2)):
            spoilt = put(spoilt, rng.choice(list(places(spoilt))), rng.choice(ODD))
        (tmp_path / name).write_text(json.dumps(spoilt))
        try:
            read(tmp_path)
        except (DataError, CheckpointError) as e:
            assert name in str(e) and "\n" not in str(e)
            refusals += 1
    assert 150 < refusals < 300
