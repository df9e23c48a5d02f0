"""Bad input gets one line on stderr (what, where, what to do) and the right exit code, before long
work and before anything is written."""

import ast
import json
import os
import pickle
import shutil
import struct

import faults
import pytest
import torch
from helpers import (
    ROOT,
    World,
    flags,
    make_records,
    make_tokenizer,
    make_world,
    refused,
    run,
    score,
    tree,
)
from safetensors.torch import load_file, save_file

import data
import llama
from plumbing import flags as flag_module
from plumbing import hf_files as checkpoints
from plumbing import jobs, scoring


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A base, records, tests, and a trained adapter, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("clean")
    world = make_world(folder, 14)
    assert run(*flags(world, folder / "done", max_steps=2, epochs=None)).code == 0
    return folder


@pytest.fixture
def world(clean, tmp_path, monkeypatch):
    shutil.copytree(clean, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for module in (jobs, scoring):
        monkeypatch.setattr(
            module,
            "load_base",
            lambda *a: pytest.fail("the weights were read before the mistake was found"),
            raising=False,
        )
    return world_in(tmp_path)


def world_in(folder):
    return World(folder / "base", folder / "train.json", folder / "tests")


def train(world, **changed):
    """Train; where that is refused, nothing may have been written."""
    before = tree(world.data.parent)
    result = run(*flags(world, "out", **{"max_steps": 2, "epochs": None} | changed))
    assert result.code == 0 or tree(world.data.parent) == before
    return result


def edit(path, change):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


# --- base checkpoint ------------------------------------------------------------------------------

HEADER = b'{"model.norm.weight":{"dtype":"F32","shape":[32],"data_offsets":[0,128]}}'


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "not a readable safetensors file"),
        (b"garbage, not a header", "not a readable safetensors file"),
        (None, "not a readable safetensors file"),  # cut off in the middle
        (
            struct.pack("<Q", 2**63) + HEADER,
            "not a readable safetensors file",
        ),  # a length beyond the file
        (struct.pack("<Q", len(HEADER) + 100) + HEADER, "not a readable safetensors file"),
        (struct.pack("<Q", 0) + bytes(128), "not a readable safetensors file"),
        (
            struct.pack("<Q", len(HEADER)) + HEADER,
            "not a readable safetensors file",
        ),  # offsets beyond the file
        (struct.pack("<Q", len(HEADER)) + HEADER + bytes(128), "do not fit config.json: missing"),
        (
            struct.pack("<Q", len(HEADER)) + HEADER.replace(b"F32", b"I32") + bytes(128),
            "model.norm.weight is I32",
        ),
    ],
)
def test_a_damaged_weight_file_is_refused(world, content, said):
    file = world.base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    refused(train(world), 3, str(world.base), said)


def test_weights_of_another_shape_are_refused(world):
    state = load_file(world.base / "model.safetensors")
    save_file(
        {n: t[:, :-1].contiguous() if t.dim() == 2 else t for n, t in state.items()},
        world.base / "model.safetensors",
    )
    refused(train(world), 3, "wrong shape", "expected (320, 32) found (320, 31)")


def shard(world):
    state = load_file(world.base / "model.safetensors")
    (world.base / "model.safetensors").unlink()
    checkpoints.write_tensors(
        world.base, {n.removeprefix("model."): t for n, t in state.items()}, shard_bytes=60_000
    )
    return world.base / "model.safetensors.index.json"


@pytest.mark.parametrize(
    "entry, said",
    [
        ("../base/model-00001-of-00003.safetensors", "is not a file in this folder"),
        ("/etc/hostname", "is not a file in this folder"),
        ("", "is not a file in this folder"),
        ("..", "is not a file in this folder"),
        (7, 'no "weight_map" from tensor names to file names'),
        ("model-00009-of-00003.safetensors", "absent, but named in model.safetensors.index.json"),
        ("config.json", "config.json"),
    ],
)
def test_an_index_leads_to_files_in_its_own_folder_only(world, entry, said):
    index = shard(world)
    edit(index, lambda v: v["weight_map"].update({"model.norm.weight": entry}))
    refused(train(world), 3, said)


def test_an_index_that_promises_more_than_the_shards_hold_is_refused(world):
    edit(
        shard(world),
        lambda v: v["weight_map"].update(
            {"model.layers.9.mlp.up_proj.weight": "model-00001-of-00003.safetensors"}
        ),
    )
    refused(
        train(world),
        3,
        "the index lists tensors that no shard holds: model.layers.9.mlp.up_proj.weight",
    )


def test_symbolic_links_are_followed_as_in_the_hub_s_cache(world, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(world.data.parent)
    (world.data.parent / "blobs").mkdir()
    for file in list(world.base.iterdir()):
        shutil.move(file, world.data.parent / "blobs" / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    assert train(world).code == 0


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    "content",
    [pickle.dumps(Evil()), pickle.dumps({"model.norm.weight": Evil()}), b"", b"PK\x03\x04garbage"],
)
@pytest.mark.parametrize("what", ["base", "adapter"])
def test_code_in_a_pickle_is_never_executed(world, what, content):
    if what == "base":
        (world.base / "model.safetensors").unlink()
        (world.base / "pytorch_model.bin").write_bytes(content)
        refused(train(world), 3, "pytorch_model.bin")
    else:
        os.remove("done/adapter_model.safetensors")
        with open("done/adapter_model.bin", "wb") as file:
            file.write(content)
        refused(score("done", "--data", world.tests), 3, "adapter_model.bin")
    assert not os.path.exists("executed")


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("hidden_size", None, 'no "hidden_size"'),
        ("num_hidden_layers", 10**8, "out of range"),
        ("vocab_size", -5, "out of range"),
        ("num_attention_heads", 0, "out of range"),
        ("num_attention_heads", 3, 'no multiple of "num_attention_heads", 3'),
        ("hidden_size", "32", "expected a number"),
        ("intermediate_size", 48.5, "expected a whole number"),
        ("rms_norm_eps", float("nan"), "out of range"),
        ("rms_norm_eps", 7, "out of range"),
        ("rope_theta", float("inf"), "out of range"),
        ("num_key_value_heads", 3, "multiple"),
        ("model_type", "gpt2", "computes only 'llama'"),
        ("rope_scaling", {"rope_type": "llama3"}, "rope_scaling"),
        ("intermediate_size", 64, "wrong shape"),
        ("vocab_size", 10**400, "out of range"),
        ("num_hidden_layers", 3, "missing layers.2"),
    ],
)
def test_a_config_with_a_key_missing_absurd_or_of_another_model_is_refused(world, key, value, said):
    edit(world.base / "config.json", lambda v: v.update({key: value}))
    refused(train(world), 3, "base", said)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000])
def test_a_config_that_is_not_a_json_object_is_refused(world, content):
    (world.base / "config.json").write_bytes(content)
    refused(train(world), 3, "config.json")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is empty"),
        (b"garbage", "neither a SentencePiece model nor"),
        (None, "no such file"),
        ("small", "more than padding explains"),
        ("large", "this is another model's tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_this_model_s_is_refused(world, content, said, monkeypatch):
    file = world.base / "tokenizer.model"
    if content is None:
        file.unlink()
    elif content == "small":
        monkeypatch.setattr(
            llama.LlamaConfig,
            "from_json",
            lambda path: jobs.replace(llama.LlamaConfig(), vocab_size=128_256),
        )
    else:
        file.write_bytes(
            make_tokenizer(
                [r | {"instruction": f"{i} {i * i}"} for i, r in enumerate(make_records(99))], 400
            )
            if content == "large"
            else content
        )
    result = train(world)
    refused(result, 3, *([said] if content is not None else ["tokenizer.model"]))


def test_a_tokenizer_that_the_library_cannot_even_complain_about_is_refused(world, monkeypatch):
    """Its message holds the file's bytes, which are not UTF-8."""

    def garbled(model):
        raise UnicodeDecodeError("utf-8", model, 0, 1, "invalid start byte")

    monkeypatch.setattr(data, "SentencePieceTokenizer", garbled)
    refused(train(world), 3, "tokenizer.model", "neither a SentencePiece model nor")


# --- records --------------------------------------------------------------------------------------

GOOD = {
    "instruction": "Can cats sing?",
    "input": "",
    "output": "the correct answer is false",
    "answer": "false",
}


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"{", "not valid JSON"),
        (b"{}", 'record 1: no "instruction"'),
        (b"[]", "non-empty JSON list"),
        (b"[1]", "record 1: expected an object"),
        ([GOOD, GOOD | {"instruction": None}], 'record 2: "instruction" is NoneType'),
        ([GOOD | {"output": 3}], 'record 1: "output" is int'),
        ([GOOD | {"output": "  "}], '"output" is empty'),
        ([GOOD, {"instruction": "x"}], 'record 2: no "output"'),
        ([{"messages": []}], 'record 1: no "instruction"; it has messages'),
        ([GOOD | {"input": ["x"]}], '"input" is list'),
        ([GOOD | {"instruction": "half \ud83d"}], "half of a surrogate pair"),
        (
            json.dumps([GOOD]).encode()[:30] + b"\xff" + json.dumps([GOOD]).encode()[30:],
            "not UTF-8 at byte 30",
        ),
        (b"\xef\xbb\xbf" + json.dumps([GOOD]).encode()[:30] + b"\xff", "not UTF-8 at byte 33"),
        (b"[" * 200_000, "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
    ],
)
def test_bad_records_are_refused_by_number_field_or_byte(world, content, said):
    world.data.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    refused(train(world), 3, str(world.data), said)


def test_a_byte_order_mark_and_dos_line_ends_are_harmless(world, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(world.data.parent)
    text = json.dumps(json.loads(world.data.read_text()), indent=1)
    world.data.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert train(world).code == 0


def test_records_that_are_all_too_long_and_too_large_a_validation_are_refused(world):
    refused(train(world, max_len=20), 3, "longer than --max-len 20")
    refused(train(world, val_size=14), 3, "--val-size 14", "14 records")
    refused(train(world, data="nowhere.json"), 3, "nowhere.json", "no such file")
    refused(train(world, data="tests"), 3, "tests: a folder; name the file")


def test_an_answer_that_its_task_does_not_allow_is_refused(world):
    edit(world.tests / "boolq.json", lambda v: v[2].update(answer="solution1"))
    before = tree(world.data.parent)
    refused(
        score("done", "--data", world.tests), 3, "boolq.json", "record 3", "not legal for boolq"
    )
    refused(score("done", "--data", world.tests, "--tasks", "hellaswag"), 3, "hellaswag")
    refused(score("done", "--data", "nowhere"), 3, "nowhere")
    assert tree(world.data.parent) == before


# --- adapters -------------------------------------------------------------------------------------


def tensors(change):
    path = "done/adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("r", 8, '"r" is 8'),
        ("r", 0, '"r" is 0'),
        ("target_modules", ["q_proj"], "but the tensors sit on"),
        ("target_modules", "all-linear", "target_modules"),
        ("use_rslora", False, "method is lora"),
        ("lora_alpha", 99, "alpha is 99"),
        ("lora_alpha", float("nan"), "lora_alpha"),
        ("use_dora", True, "missing"),
        ("peft_type", "IA3", "peft_type"),
        ("rank_pattern", {"q_proj": 2}, "not computed here"),
        ("lora_dropout", 2, "dropout is 2"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("layers_to_transform", [0], "layers_to_transform"),
    ],
)
def test_an_adapter_of_another_rank_target_scale_or_kind_is_refused(world, key, value, said):
    edit(world.data.parent / "done" / "adapter_config.json", lambda v: v.update({key: value}))
    before = tree(world.data.parent)
    refused(score("done", "--data", world.tests), 3, "done", said)
    refused(run("--merge", "done", "--out", "merged"), 3, "done", said)
    assert tree(world.data.parent) == before


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s.pop(Q.format("A")), "missing layers.0.self_attn.q_proj.lora_A"),
        (
            lambda s: s.update({Q.format("A"): s[Q.format("A")][:, :-1].contiguous()}),
            "another base?",
        ),
        (
            lambda s: s.update(
                {Q.format("B").replace("layers.0", "layers.7"): s[Q.format("B")].clone()}
            ),
            "no place in this model for layers.7",
        ),
        (lambda s: s[Q.format("B")].fill_(float("nan")), "holds NaN or infinity"),
        (lambda s: s.update({Q.format("B"): s[Q.format("B")].int()}), "expected floating point"),
        (lambda s: s.update({"lm_head.weight": torch.ones(2)}), "unexpected tensor lm_head.weight"),
        (lambda s: s.clear(), "done"),
    ],
)
def test_adapter_tensors_that_do_not_fit_are_refused_by_name(world, change, said):
    tensors(change)
    refused(score("done", "--data", world.tests), 3, "done", said)


def test_an_adapter_is_not_scored_on_another_base_than_its_own(world):
    shutil.copytree(world.base, "other")
    edit(world.data.parent / "other" / "config.json", lambda v: v.update(rope_theta=20_000.0))
    refused(score("done", "--ckpt", "other", "--data", world.tests), 3, "other is not the base")
    refused(
        run("--merge", "done", "--ckpt", "other", "--out", "merged"), 3, "other is not the base"
    )


def test_an_adapter_replaced_while_the_base_is_read_is_not_scored_under_the_old_one_s_name(
    world, monkeypatch
):
    monkeypatch.undo()
    monkeypatch.chdir(world.data.parent)
    load_base = scoring.load_base

    def slow(*args):
        tensors(lambda s: s[Q.format("B")].add_(1))
        return load_base(*args)

    monkeypatch.setattr(scoring, "load_base", slow)
    refused(score("done", "--data", world.tests), 2, "replaced while it was read")


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        ("--rank 0", "--rank"),
        ("--rank 9999999999", "--rank"),
        ("--dropout 1", "--dropout"),
        ("--lr 0", "--lr"),
        ("--lr nan", "--lr"),
        ("--lr inf", "--lr"),
        ("--alpha -1", "--alpha"),
        ("--max-len 7", "--max-len"),
        ("--seed -1", "--seed"),
        ("--batch-size 1.5", "--batch-size"),
        ("--rnak 4", "--rnak"),
        ("--ra 4", "--ra"),
        ("--method adalora", "--method"),
        ("--method rora --scale linear", "--method lora is that"),
        ("--method prefix --alpha 3", "--alpha has no effect"),
        ("--method series --targets q_proj", "--targets has no effect"),
        ("--epochs 2 --max-steps 3", "--max-steps replaces --epochs"),
        ("--targets lm_head", "lm_head"),
        ("--targets ,", "no layer is named"),
        ("--checkpoint-blocks some", "neither auto, all, none nor a whole number"),
        ("--checkpoint-blocks 9", "2 blocks"),
        ("--device meta", "choose cuda, cpu or mps"),
        ("--device cuda:99", "--device"),
        ("--export-scale plain", "has no effect"),
        ("--merge done --resume done", "different jobs"),
        ("--merge done", "--merge"),
        ("--overwrite --resume done", "--overwrite has no effect"),
        ("--resume nowhere", "not a run folder"),
        ("--trace tests", "is a folder"),
        ("--max-steps 1e3", "--max-steps"),
        ("--warmup 99999999999999999999", "--warmup"),
    ],
)
def test_flags_out_of_range_unknown_or_contradictory_are_refused(world, words, said):
    before = tree(world.data.parent)
    base = (
        []
        if any(w in words for w in ("--merge", "--resume", "--export"))
        else ["--ckpt", world.base]
    )
    refused(
        run(
            *base,
            *([] if "--trace" in words or not base else ["--data", world.data]),
            *words.split(),
        ),
        2,
        said,
    )
    assert tree(world.data.parent) == before


@pytest.mark.parametrize(
    "words, said",
    [
        ("", "what shall be scored"),
        ("nowhere", "no such folder"),
        ("done --tasks chess", "unknown task chess"),
        ("done --limit 0", "--limit"),
        ("done --batch-size -1", "--batch-size"),
        ("--table tests", "none of these"),
        ("--table done --limit 3", "--table takes no --limit"),
    ],
)
def test_flags_of_eval_are_checked_too(world, words, said):
    result = score(*words.split(), *(["--data", world.tests] if "--table" not in words else []))
    lines = [line for line in result.err.splitlines() if not line.startswith("note: ")]
    assert result.code == 2 and len(lines) == 1 and said in lines[0]


def test_a_checkpoint_that_is_not_there_says_where_it_was_looked_for(world):
    refused(run("--ckpt", "llama-7b"), 3, "checkpoints/llama-7b", "./weights_download.sh llama-7b")
    refused(run("--ckpt", "llama7b"), 3, "did you mean llama-7b?")
    refused(run("--ckpt", "/no/such"), 3, "no checkpoint folder /no/such;")
    refused(run("--ckpt", "nonsense"), 3, "known names: tiny")


def test_a_torch_that_would_run_code_from_weights_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    refused(run("--ckpt", "tiny"), 1, "torch 2.5.1 is too old", "weights_only", "pip install")
    refused(score("--ckpt", "tiny"), 1, "torch 2.5.1 is too old")


def test_a_message_is_one_printable_line_whatever_a_file_holds(capsys):
    def work():
        raise checkpoints.CheckpointError("tensor \x1b[31m\nred\u2028 \ud800" + "x" * 9999)

    assert flag_module.exit_code(work, "rora") == 3
    message = capsys.readouterr().err
    assert (
        message.startswith("rora: tensor ?[31m red ?xxx")
        and message.count("\n") == 1
        and len(message) < 2100
    )


# --- security -------------------------------------------------------------------------------------


def test_no_file_evaluates_text_unpickles_freely_or_calls_a_shell():
    for path in [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name, given = (
                    ast.unparse(node.func),
                    {k.arg: ast.unparse(k.value) for k in node.keywords},
                )
                assert name not in (
                    "eval",
                    "exec",
                    "os.system",
                    "os.popen",
                    "pickle.load",
                    "pickle.loads",
                    "__import__",
                ), (path, name)
                assert name != "torch.load" or given.get("weights_only") == "True", path
                assert given.get("shell", "False") == "False", path


def test_secrets_in_the_environment_are_neither_printed_nor_stored(clean, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    result = run(*flags(world_in(clean), tmp_path / "run", max_steps=2, epochs=None))
    assert result.code == 0 and "verysecret" not in result.out + result.err
    assert not any(b"verysecret" in content for content in tree(tmp_path).values())


# --- and all the rest -----------------------------------------------------------------------------


def test_mutated_input_of_every_kind_ends_in_a_clean_exit_with_a_clean_message(tmp_path):
    """31 of the mutations that `make faults` tries by the thousand, one of each kind."""
    problems = [problem for _, problem in faults.fuzz(tmp_path.resolve(), 31, seed=5) if problem]
    assert not problems, "\n".join(problems)
