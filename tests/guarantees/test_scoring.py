"""A score is made once, of one thing: answers are kept, gone on with, and never mixed."""

import json
import signal

import pytest
from conftest import score_base
from helpers import flags, interrupt, make_world, refused, run, runs, score, tree

from plumbing import scoring


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A finished run, to be scored."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*flags(world, folder)).code == 0
    return folder


def test_where_nobody_watches_a_bar_scoring_tells_the_time_to_go(
    world, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(scoring, "EVERY", 0)  # seconds between two lines
    command = (whole, "--data", world.tests, "--tasks", "boolq", "--batch-size", 4)
    said = score(*command, "--out", tmp_path).out.splitlines()
    told = [line for line in said if line.endswith("min to go")]
    assert [line.split(",")[0] for line in told] == [
        f"boolq: {n} of 11 answers" for n in (4, 8, 11)
    ]


# --- what is kept ---------------------------------------------------------------------------------


def test_every_generation_is_kept_and_scoring_again_generates_nothing(
    benchmark, tmp_path, monkeypatch
):
    first, kept = score_base(benchmark, tmp_path)
    assert len(kept) == 8 and all(len(text.splitlines()) == 7 for text in kept.values())
    monkeypatch.setattr(
        scoring, "generate", lambda *a: pytest.fail("an answer was generated twice")
    )
    assert score_base(benchmark, tmp_path) == (first, kept)


def test_a_larger_limit_goes_on_from_the_smaller(benchmark, tmp_path):
    tasks = ("--tasks", "boolq", "piqa")
    score_base(benchmark, tmp_path / "steps", "--limit", "3", *tasks)
    steps, _ = score_base(benchmark, tmp_path / "steps", *tasks)
    once, _ = score_base(benchmark, tmp_path / "once", *tasks)
    assert steps["tasks"] == once["tasks"]


def test_a_smaller_limit_shows_its_scores_and_leaves_the_larger_ones(benchmark, tmp_path):
    score_base(benchmark, tmp_path)
    before = tree(tmp_path)
    command = ("--ckpt", benchmark / "toy", "--data", benchmark / "tests", "--out", tmp_path)
    shown = score(*command, "--tasks", "boolq,piqa", "--limit", "2")
    assert shown.code == 0 and f"not saved: {tmp_path}/results.json has the scores of" in shown.out
    assert [line.count(" 2 |") for line in shown.out.splitlines() if "| boolq" in line] != [0]
    assert tree(tmp_path) == before


def test_scoring_one_task_again_keeps_the_scores_of_the_others(benchmark, tmp_path):
    whole, _ = score_base(benchmark, tmp_path, "--limit", "2")
    again, _ = score_base(benchmark, tmp_path, "--limit", "2", "--tasks", "boolq")
    assert again["tasks"] == whole["tasks"]


def test_scoring_can_be_stopped_and_goes_on_where_it_stopped(world, whole, tmp_path, monkeypatch):
    generate, asked = scoring.generate, []

    def watched(model, prompts, *rest):
        asked.extend(map(tuple, prompts))
        if len(asked) in (6, 11):
            signal.raise_signal(signal.SIGTERM)
        return generate(model, prompts, *rest)

    monkeypatch.setattr(scoring, "generate", watched)
    command = (whole, "--data", world.tests, "--batch-size", 3, "--out")
    for code in (143, 143, 0):
        assert score(*command, tmp_path / "cut").code == code
    questions = len(asked)
    assert (
        score(*command, tmp_path / "cut").code == 0 and len(asked) == questions == 16
    )  # nothing twice, nothing lost
    monkeypatch.setattr(scoring, "generate", generate)
    assert score(*command, tmp_path / "whole").code == 0
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_an_answer_cut_short_by_a_crash_is_asked_for_again(world, whole, tmp_path, cut):
    """cut 1: all but the line break is there; the next answer must not be written behind it."""
    command = (whole, "--data", world.tests, "--tasks", "boolq", "--out", tmp_path)
    score(*command)
    file = tmp_path / "boolq.jsonl"
    before = {name: content for name, content in tree(tmp_path).items()}
    file.write_bytes(file.read_bytes()[:-cut])
    assert score(*command).code == 0 and tree(tmp_path) == before


# --- what is not mixed ----------------------------------------------------------------------------


def test_scores_of_another_prompt_or_precision_are_not_mixed(benchmark, tmp_path):
    score_base(benchmark, tmp_path, "--limit", "2")
    command = ("--ckpt", benchmark / "toy", "--data", benchmark / "tests", "--out", tmp_path)
    for change in (("--prompt", "dora"), ("--dtype", "bf16")):
        refused(score(*command, *change), 2, "holds scores with", "choose another --out")


def test_scores_of_another_adapter_or_of_changed_questions_are_not_gone_on_with(
    world, whole, tmp_path
):
    copy = make_world(tmp_path / "world")
    command = (whole, "--data", copy.tests, "--out", tmp_path / "scores")
    assert score(*command).code == 0
    questions = (copy.tests / "boolq.json").read_text()
    (copy.tests / "boolq.json").write_text(questions.replace("cats", "bats"))
    refused(score(*command), 2, "of another test file for boolq; choose another --out")
    (copy.tests / "boolq.json").write_text(questions)
    refused(score(runs.checkpoints(whole)[1], *command[1:]), 2, "another adapter")
    assert score(*command).code == 0


# --- what a score does not depend on --------------------------------------------------------------


def test_answers_do_not_depend_on_batch_size_or_the_order_of_the_questions(world, whole, tmp_path):
    turned = tmp_path / "turned"
    turned.mkdir()
    questions = json.loads((world.tests / "boolq.json").read_text())
    (turned / "boolq.json").write_text(json.dumps(questions[::-1]))
    said = []
    for i, (folder, size) in enumerate(
        [(world.tests, 1), (world.tests, 4), (world.tests, 64), (turned, 3)]
    ):
        assert (
            score(
                whole,
                "--data",
                folder,
                "--tasks",
                "boolq",
                "--batch-size",
                size,
                "--out",
                tmp_path / str(i),
            ).code
            == 0
        )
        answers = scoring.read_generations(tmp_path / str(i) / "boolq.jsonl")
        said.append([answers[n] for n in sorted(answers)])
    assert said[0] == said[1] == said[2] == said[3][::-1] and len(set(said[0])) > 1


# --- the table says what it is of -----------------------------------------------------------------


def cells(*folders) -> list[dict[str, str]]:
    lines = score("--table", *folders).out.splitlines()
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(split[0], row)) for row in split[2:]]


def test_the_table_tells_the_recipe_and_dora_from_dora_with_the_root(world, tmp_path):
    short = {"method": "dora", "max_steps": 2, "epochs": None, "lr": 3e-4}
    for name, scale in [("a", {}), ("b", {"scale": "sqrt"})]:
        assert run(*flags(world, tmp_path / name, **short, **scale)).code == 0
        assert score(tmp_path / name, "--data", world.tests, "--tasks", "piqa").code == 0
    a, b = cells(tmp_path / "a", tmp_path / "b")
    assert (a["method"], a["s"], b["method"], b["s"]) == ("dora", "2", "dora-sqrt", "4")
    assert {key: a[key] for key in ("α", "lr", "steps", "seed", "rank")} == {
        "α": "8",
        "lr": "0.0003",
        "steps": "2",
        "seed": "0",
        "rank": "4",
    }


def test_an_unfinished_run_is_called_so_and_its_old_score_is_not_shown_once_it_went_on(
    world, tmp_path
):
    folder = tmp_path / "run"
    wanted = flags(world, folder, eval_every=3)
    assert interrupt(4, *wanted).code == 130
    said = score(folder, "--data", world.tests, "--tasks", "piqa")
    assert said.code == 0 and "unfinished: 3 of 12" in said.out
    (row,) = cells(folder)
    assert row["steps"] == "unfinished: 3 of 12" and row["piqa"] != "–"
    assert run("--resume", folder).code == 0
    refused(score(folder, "--data", world.tests, "--tasks", "piqa"), 2, "another adapter")
    (row,) = cells(folder)
    assert row["steps"] == "12" and row["piqa"] == "–" and row["mean"] == "–"
    assert "since it was scored" in score("--table", folder).err
    step = runs.checkpoints(folder)[1]
    assert score(step, "--data", world.tests, "--tasks", "piqa").code == 0
    (row,) = cells(step)
    assert row["steps"] == "10 of 12" and row["method"] == "rora"


def test_the_table_takes_the_folder_that_out_named(benchmark, tmp_path):
    score_base(benchmark, tmp_path / "apart", "--limit", "2")
    (row,) = cells(tmp_path / "apart")
    assert row["run"] == "apart" and row["n"] == "16" and row["mean"] != "–"


def test_the_mean_is_of_the_scores_that_stand_beside_it(benchmark, tmp_path):
    score_base(benchmark, tmp_path / "run" / "eval", "--limit", "2")
    path = tmp_path / "run" / "eval" / "results.json"
    results = json.loads(path.read_text())
    results["mean"] = 99.0
    results["tasks"]["boolq"] |= {"correct": 2, "n": 2, "accuracy": 100.0}
    path.write_text(json.dumps(results))
    (row,) = cells(tmp_path / "run")
    scores = [float(row[task]) for task in results["tasks"]]
    assert float(row["mean"]) == pytest.approx(sum(scores) / 8, abs=0.06)
    assert row["boolq"] == "100.0" and row["method"] == "base"


def test_exact_asks_each_question_alone_and_is_kept_apart(world, whole, tmp_path, monkeypatch):
    """So in bf16, too, an answer is the same whatever else is asked, and in whatever order."""
    generate, asked = scoring.generate, []

    def watched(model, prompts, new, eos, draft):
        asked.append((len(prompts), draft))
        return generate(model, prompts, new, eos, draft)

    monkeypatch.setattr(scoring, "generate", watched)
    command = (whole, "--data", world.tests, "--tasks", "boolq", "--dtype", "bf16")
    once = (*command, "--exact", "--out", tmp_path / "once")
    assert score(*once).code == 0 and set(map(str, asked)) == {"(1, [])"}
    for n in (1, 3, 11):
        assert score(*command, "--exact", "--limit", n, "--out", tmp_path / "steps").code == 0
    answers = [tree(tmp_path / name)["boolq.jsonl"] for name in ("once", "steps")]
    said = [sorted(text.splitlines()) for text in answers]
    assert said[0] == said[1]
    facts = json.loads((tmp_path / "once" / "results.json").read_text())
    assert (facts["exact"], facts["batches"]) == (True, "each question alone")
    refused(score(*once[:-3], *once[-2:]), 2, "scores with --exact")
    refused(score(*once, "--batch-size", 3), 2, "--batch-size has no effect")


def test_one_long_question_makes_its_own_batch_small_not_all(tiny):
    batches = scoring.Batches(exact=False, most=None, room=40 * scoring.question_bytes(tiny, 100))
    assert batches.rows(tiny, 100) == 40
    assert batches.rows(tiny, 1000) < 6 and batches.rows(tiny, 10) == 64
    assert batches.rows(tiny, 10**6) == 1
    half = tiny.bfloat16()
    assert scoring.question_bytes(half, 100) < scoring.question_bytes(tiny.float(), 100)


def test_a_trained_model_s_answers_begin_as_the_draft_does(world, whole, tmp_path, monkeypatch):
    generate, drafts = scoring.generate, []
    watched = lambda *a: drafts.append(a[4]) or generate(*a)
    monkeypatch.setattr(scoring, "generate", watched)
    command = (whole, "--data", world.tests, "--tasks", "boolq", "--limit", 2, "--out", tmp_path)
    assert score(*command).code == 0
    tokenizer = scoring.find_tokenizer(str(world.base))
    assert tokenizer.decode(drafts[0]).strip() == scoring.OPENING
