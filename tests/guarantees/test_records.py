"""Records as people have them: what training can use is taken, what the judge needs it demands."""

import json
import os

import pytest
from helpers import flags, make_records, make_world, refused, run, score, tree
from safetensors.torch import load_file

SHORT = {"max_steps": 2, "epochs": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*flags(world, folder, **SHORT)).code == 0
    return folder


def as_lines(records):
    return "".join(json.dumps(r) + "\n" for r in records) + "\n"


WAYS = {
    "JSON Lines": as_lines,
    "null input": lambda records: json.dumps([r | {"input": None} for r in records]),
    "no input": lambda records: json.dumps([without(r, "input") for r in records]),
    "no answer": lambda records: json.dumps([without(r, "answer") for r in records]),
    "null answer": lambda records: json.dumps([r | {"answer": None} for r in records]),
}


def without(record, field):
    return {key: value for key, value in record.items() if key != field}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_records_written_otherwise_train_the_same_adapter(world, whole, tmp_path, way):
    data = tmp_path / "records"
    data.write_text(WAYS[way](make_records(26)))
    assert run(*flags(world, tmp_path / "run", data=data, **SHORT)).code == 0
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "run", whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n', 'record 2: no "output"'),
        ('{"instruction": "a", "output": "b"}\n{"instruction":\n', "line 2: not valid JSON"),
        ('{"instruction": "a",\n "output": "b"}', "line 1: not valid JSON"),
        ('{"instruction": "a", "output": "b"}\n[]\n', "record 2: expected an object"),
    ],
)
def test_bad_lines_are_named(world, tmp_path, content, said):
    data = tmp_path / "records.jsonl"
    data.write_text(content)
    refused(run(*flags(world, tmp_path / "run", data=data, **SHORT)), 3, str(data), said)


def test_the_judge_needs_answers_and_no_outputs(world, whole, tmp_path):
    questions = json.loads((world.tests / "boolq.json").read_text())
    (tmp_path / "boolq.json").write_text(as_lines([without(q, "output") for q in questions]))
    out = ("--out", tmp_path / "scores")
    assert score(whole, "--data", tmp_path, *out).code == 0
    (tmp_path / "boolq.json").write_text(as_lines([without(q, "answer") for q in questions]))
    refused(score(whole, "--data", tmp_path, *out), 3, 'record 1: no "answer"')


def test_an_answer_that_begins_with_a_newline_trains_unless_it_is_to_be_learned_alone(
    world, tmp_path
):
    records = make_records(26)
    records[6]["output"] = "\n" + records[6]["output"]
    data = tmp_path / "records.json"
    data.write_text(json.dumps(records))
    assert run(*flags(world, tmp_path / "all", data=data, loss="all", **SHORT)).code == 0
    result = run(*flags(world, tmp_path / "answer", data=data, loss="answer", **SHORT))
    if result.code:  # this tokenizer joins two line ends
        refused(result, 3, str(data), "record 7", "begins with '\\n", "--loss all")


def test_what_can_be_read_only_once_is_refused(world, tmp_path):
    """It would be hashed as nothing, and --resume could not read it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    before = tree(tmp_path)
    refused(run(*flags(world, tmp_path / "run", data=pipe, **SHORT)), 3, "only once", "--resume")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("alpha", ["1e9", "2e9", "inf"])
def test_an_alpha_that_could_not_be_read_back_is_refused_before_it_trains(world, tmp_path, alpha):
    refused(run(*flags(world, tmp_path / "run", alpha=alpha, **SHORT)), 2, "--alpha", "1e+09")


def test_the_largest_alpha_that_trains_is_read_back(world, tmp_path):
    small = SHORT | {"alpha": 9e8, "lr": 1e-12, "max_steps": 3}
    assert run(*flags(world, tmp_path / "run", **small)).code == 0
    assert score(tmp_path / "run", "--data", world.tests, "--tasks", "piqa").code == 0
    exported = ("--merge", tmp_path / "run", "--export-scale", "plain", "--out", tmp_path / "x")
    refused(run(*exported), 2, "lora_alpha would be 1.8e+09")
