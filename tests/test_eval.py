"""The judge: what counts, what is kept, and what a score does not depend on."""

import json
import re

import pytest
from plumbing import jobs
import torch
from conftest import write_checkpoint, write_records

import eval as judge
import rora
from eval import error_bar, score_task


def question(instruction, answer, generation, prompt="... ### Response:\n"):
    return {
        "instruction": instruction,
        "answer": answer,
        "generation": generation,
        "prompt": prompt,
    }


def test_correct_wrong_and_unanswered_add_up_and_the_constant_answer_stands_beside():
    three = "Answer format: answer1/answer2/answer3"
    r = score_task(
        "social_i_qa",
        [
            question(three, "answer1", "the correct answer is answer1"),
            question(three, "answer1", "answer5"),
            question(three, "answer2", "answer1 or answer2"),
            question(three, "answer1", "no idea"),
        ],
    )
    assert (r["n"], r["correct"], r["wrong"], r["unanswered"], r["not_offered"]) == (4, 1, 2, 1, 1)
    assert (r["accuracy"], r["constant"]) == (25.0, 75.0)


def test_only_what_follows_the_response_marker_is_judged():
    assert (
        score_task(
            "boolq",
            [question("true or false?", "false", "false", prompt="is it true? ### Response:\n")],
        )["correct"]
        == 1
    )


def test_the_error_bar_is_the_binomial_one():
    assert error_bar(50, 100) == pytest.approx(5) and error_bar(100, 100) == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A random base whose tokenizer and tests are real in form: all eight tasks have a file."""
    folder = tmp_path_factory.mktemp("home")
    write_checkpoint(folder / "toy")
    for i, task in enumerate(judge.TASKS):
        path = write_records(
            folder / (f"tests/{task}.json" if i % 2 else f"tests/{task}/test.json"), 7
        )
        legal = {"piqa": "solution1", "hellaswag": "ending3", "winogrande": "option2"}.get(
            task, "answer2"
        )
        if task != "boolq":
            path.write_text(
                path.read_text()
                .replace('"answer": "true"', f'"answer": "{legal}"')
                .replace('"answer": "false"', f'"answer": "{legal}"')
            )
    return folder


def score(home, out, *flags):
    assert (
        judge.main(
            ["--ckpt", str(home / "toy"), "--data", str(home / "tests"), "--out", str(out), *flags]
        )
        == 0
    )
    return json.loads((out / "results.json").read_text()), {
        p.name: p.read_text() for p in sorted(out.glob("*.jsonl"))
    }


def test_a_base_model_is_scored_on_all_eight_tasks_in_either_layout(home, tmp_path):
    results, _ = score(home, tmp_path)
    assert (
        list(results["tasks"]) == list(judge.TASKS)
        and results["mean"] == sum(r["accuracy"] for r in results["tasks"].values()) / 8
    )
    assert {"n", "correct", "wrong", "unanswered", "accuracy", "constant"} <= results["tasks"][
        "boolq"
    ].keys()
    assert (results["adapter_sha256"], results["merged"], results["limit"], results["prompt"]) == (
        None,
        False,
        None,
        "clean",
    )
    assert "greedy" in results["decode"] and "| boolq |" in (tmp_path / "results.md").read_text()


def test_the_mean_is_withheld_until_all_eight_are_scored(home, tmp_path):
    results, _ = score(home, tmp_path, "--tasks", "boolq", "piqa", "--limit", "3")
    assert results["mean"] is None and [r["n"] for r in results["tasks"].values()] == [3, 3]


def test_answers_do_not_depend_on_the_batch_size(home, tmp_path):
    by_number = lambda files: {name: sorted(text.splitlines()) for name, text in files.items()}
    (one, kept1), (many, kept7) = (
        score(home, tmp_path / "1", "--batch-size", "1"),
        score(home, tmp_path / "7", "--batch-size", "7"),
    )
    assert by_number(kept1) == by_number(kept7) and one["tasks"] == many["tasks"]


def test_every_generation_is_kept_and_scoring_again_generates_nothing(home, tmp_path, monkeypatch):
    first, kept = score(home, tmp_path)
    assert all(len(text.splitlines()) == 7 for text in kept.values())
    monkeypatch.setattr(judge, "generate", lambda *a: pytest.fail("an answer was generated twice"))
    assert score(home, tmp_path) == (first, kept)


def test_a_larger_limit_goes_on_from_the_smaller(home, tmp_path):
    score(home, tmp_path / "steps", "--limit", "3")
    steps, _ = score(home, tmp_path / "steps")
    assert steps["tasks"] == score(home, tmp_path / "once")[0]["tasks"]


def test_scoring_one_task_again_keeps_the_scores_of_the_others(home, tmp_path):
    whole, _ = score(home, tmp_path, "--limit", "2")
    assert score(home, tmp_path, "--limit", "2", "--tasks", "boolq")[0]["tasks"] == whole["tasks"]


def test_scores_of_another_prompt_or_precision_are_not_mixed(home, tmp_path, capsys):
    score(home, tmp_path, "--limit", "2")
    assert (
        judge.main(
            [
                "--ckpt",
                str(home / "toy"),
                "--data",
                str(home / "tests"),
                "--out",
                str(tmp_path),
                "--prompt",
                "dora",
            ]
        )
        == 2
    )
    assert "holds scores of" in capsys.readouterr().err


def test_the_table_has_a_line_a_run_and_a_dash_where_nothing_was_scored(home, tmp_path, capsys):
    score(home, tmp_path / "base" / "eval", "--tasks", "boolq")
    capsys.readouterr()
    assert judge.main(["--table", str(tmp_path / "base")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| base | base |") and line.count("–") >= 8


def test_merged_and_unmerged_models_give_the_same_answers(home):
    from llama import generate

    model = jobs.load_base(str(home / "toy"), torch.device("cpu"), torch.float32)
    rora.attach(model, "dora", 4)
    from conftest import shake

    shake(model, 0.02)
    prompts = [[1, 5, 6, 7], [1, 9, 8]]
    before = generate(model, prompts, 8, 2)
    rora.merge(model)
    assert generate(model, prompts, 8, 2) == before


def test_a_question_can_be_asked_and_the_offered_answers_share_one_probability(home, capsys):
    question = r"Is it so?\n\nAnswer format: true/false"
    assert judge.main(["--ckpt", str(home / "toy"), "--ask", question]) == 0
    chances = re.findall(r"(true|false) ([\d.]+)%", capsys.readouterr().out)
    assert {a for a, _ in chances} == {"true", "false"} and sum(
        float(p) for _, p in chances
    ) == pytest.approx(100, abs=0.2)
