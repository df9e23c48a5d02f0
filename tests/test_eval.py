"""The judge: what counts as an answer, what a score says, and what it does not depend on."""

import json
import math
import re
import shutil

import pytest
import torch
from conftest import score_base, shake

import eval as judge
import rora
from eval import error_bar, mean_error_bar, score_task
from data import PAPER_TASKS, TASKS, Task, load_examples, load_tokenizer
from llama import generate, load_llama


def answered(instruction: str, answer: str, generation: str) -> dict:
    """A question, its right answer, and what the model said."""
    return {"instruction": instruction, "answer": answer, "generation": generation}


# --- counting -------------------------------------------------------------------------------------


def test_every_answer_is_correct_or_wrong_or_missing():
    three = "Answer format: answer1/answer2/answer3"
    r = score_task(
        "social_i_qa",
        [
            answered(three, "answer1", "the correct answer is answer1"),
            answered(three, "answer1", "answer5"),  # legal for the task, not offered here
            answered(three, "answer2", "answer1 or answer2"),  # the first one counts
            answered(three, "answer1", "no idea"),
        ],
    )
    assert (r["n"], r["correct"], r["wrong"], r["unanswered"], r["not_offered"]) == (4, 1, 2, 1, 1)
    assert r["accuracy"] == 25.0


def test_beside_the_accuracy_stands_that_of_always_giving_one_answer():
    questions = [answered("?", answer, "no idea") for answer in ("true", "true", "true", "false")]
    assert score_task("boolq", questions)["constant"] == 75.0


def test_only_what_the_model_says_is_judged_not_the_question():
    question = answered("is it true? ### Response: true", "false", "false")
    assert score_task("boolq", [question])["correct"] == 1


def test_the_error_bar_is_the_binomial_one():
    assert error_bar(50, 100) == pytest.approx(5)
    assert error_bar(100, 100) == 0


def test_the_error_bar_of_the_mean_is_that_of_eight_independent_tasks():
    tasks = {task: {"accuracy": 50, "n": 100} for task in PAPER_TASKS}
    assert mean_error_bar(tasks) == pytest.approx(5 / math.sqrt(8))
    assert mean_error_bar({"boolq": tasks["boolq"]}) is None


# --- a task of one's own --------------------------------------------------------------------------


@pytest.fixture
def sums(monkeypatch):
    """The one row that makes a task: the last number counts, in at most five tokens."""
    monkeypatch.setitem(TASKS, "sums", Task(r"-?\d+", counts="last", new_tokens=5))


def test_a_row_says_what_is_an_answer_and_whether_the_first_or_the_last_counts(sums):
    questions = [answered("2 + 3?", "5", "2 + 3 = 5"), answered("2 + 3?", "5", "5, not -1")]
    assert [judge.said("sums", question) for question in questions] == ["5", "-1"]
    assert score_task("sums", questions)["accuracy"] == 50


def test_a_row_says_how_much_the_model_may_say(sums, model_and_tokenizer, monkeypatch):
    asked_for = []
    monkeypatch.setattr(
        judge, "generate", lambda model, prompts, new, eos: asked_for.append(new) or [[3]]
    )
    judge.evaluate(*model_and_tokenizer, "sums", [{"instruction": "2 + 3?", "answer": "5"}])
    assert asked_for == [5]


def test_a_row_is_enough_to_score_the_task(sums, benchmark, tmp_path):
    tests = tmp_path / "tests"
    shutil.copytree(benchmark / "tests", tests)
    question = {"instruction": "2 + 3?", "input": "", "output": "5", "answer": "5"}
    (tests / "sums.json").write_text(json.dumps([question]))
    command = ["--ckpt", str(benchmark / "toy"), "--data", str(tests), "--out", str(tmp_path)]
    assert judge.main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["tasks"]) == [*PAPER_TASKS, "sums"]
    assert results["mean"] == mean_of_eight(results)


def test_the_mean_stays_that_of_the_papers_eight(sums):
    tasks = {task: {"accuracy": 50.0} for task in PAPER_TASKS}
    assert judge.mean(tasks | {"sums": {"accuracy": 0.0}}) == 50
    del tasks["piqa"]
    assert judge.mean(tasks | {"sums": {"accuracy": 0.0}}) is None


# --- scoring a model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_and_tokenizer(benchmark):
    model = load_llama(benchmark / "toy", dtype=torch.float32)
    return model, load_tokenizer(benchmark / "toy")


def mean_of_eight(results: dict) -> float:
    return sum(results["tasks"][task]["accuracy"] for task in PAPER_TASKS) / 8


@pytest.fixture(scope="module")
def scored(benchmark, tmp_path_factory):
    """A folder that holds the base model's answers and scores in all eight tasks."""
    folder = tmp_path_factory.mktemp("scored")
    score_base(benchmark, folder)
    return folder


def test_a_base_model_is_scored_on_all_eight_tasks_in_the_papers_order(scored):
    results = json.loads((scored / "results.json").read_text())
    assert list(results["tasks"]) == list(TASKS) == list(PAPER_TASKS)
    assert all(r["n"] == 7 for r in results["tasks"].values())
    assert "| boolq |" in (scored / "results.md").read_text()


def test_the_mean_is_the_plain_mean_of_the_eight_accuracies(scored):
    results = json.loads((scored / "results.json").read_text())
    assert results["mean"] == mean_of_eight(results)


def test_the_mean_is_withheld_until_all_eight_are_scored(benchmark, tmp_path):
    results, _ = score_base(benchmark, tmp_path, "--tasks", "boolq", "piqa", "--limit", "3")
    assert results["mean"] is None
    assert [r["n"] for r in results["tasks"].values()] == [3, 3]


def test_beside_the_scores_stands_how_they_were_made(benchmark, tmp_path):
    results, _ = score_base(benchmark, tmp_path, "--tasks", "boolq")
    assert "greedy" in results["decode"]
    assert (results["prompt"], results["limit"]) == ("clean", None)
    assert (results["adapter_sha256"], results["merged"]) == (None, False)
    counted = {"n", "correct", "wrong", "unanswered", "accuracy", "constant"}
    assert counted <= results["tasks"]["boolq"].keys()


def test_answers_do_not_depend_on_the_batch_size(benchmark, model_and_tokenizer):
    questions = load_examples(benchmark / "tests" / "boolq" / "test.json", "boolq")
    said = []
    for size in (1, 3, 7):
        judge.evaluate(*model_and_tokenizer, "boolq", questions, batch_size=size)
        said.append([question["generation"] for question in questions])
    assert said[0] == said[1] == said[2]
    assert len(set(said[0])) > 1


def test_the_plain_way_and_the_one_that_keeps_its_answers_give_the_same_score(
    benchmark, model_and_tokenizer, scored
):
    questions = load_examples(benchmark / "tests" / "boolq" / "test.json", "boolq")
    plain = judge.evaluate(*model_and_tokenizer, "boolq", questions)
    kept = [json.loads(line) for line in (scored / "boolq.jsonl").read_text().splitlines()]
    kept.sort(key=lambda row: row["number"])
    assert [row["generation"] for row in kept] == [q["generation"] for q in questions]
    assert json.loads((scored / "results.json").read_text())["tasks"]["boolq"] == plain


def test_merged_and_unmerged_models_give_the_same_answers(benchmark):
    model = load_llama(benchmark / "toy", dtype=torch.float32)
    rora.attach(model, "dora", 4)
    shake(model, 0.02)
    prompts = [[1, 5, 6, 7], [1, 9, 8]]
    before = generate(model, prompts, 8, 2)
    rora.merge(model)
    assert generate(model, prompts, 8, 2) == before


def test_asked_one_question_the_offered_answers_share_one_probability(benchmark, capsys):
    question = r"Is it so?\n\nAnswer format: true/false"
    assert judge.main(["--ckpt", str(benchmark / "toy"), "--ask", question]) == 0
    chances = re.findall(r"(true|false) ([\d.]+)%", capsys.readouterr().out)
    assert {answer for answer, _ in chances} == {"true", "false"}
    assert sum(float(chance) for _, chance in chances) == pytest.approx(100, abs=0.2)


# --- tables ---------------------------------------------------------------------------------------


def test_the_table_has_a_line_per_run_and_a_dash_where_nothing_was_scored(
    benchmark, tmp_path, capsys
):
    score_base(benchmark, tmp_path / "base" / "eval", "--tasks", "boolq")
    capsys.readouterr()
    assert judge.main(["--table", str(tmp_path / "base")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| base | base |")
    assert line.count("–") >= 8
