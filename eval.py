"""The judge: what counts as an answer, exact match, tables.

    python eval.py runs/tiny-rora-r32-s0      a run, one of its checkpoints/step-*, any PEFT folder
    python eval.py --ckpt tiny                the base model, for comparison
    python eval.py --table runs/*             what was scored so far, one line per run
    python eval.py --plot runs/*              loss, rate, gradient norm and accuracy, in a picture

The model goes on greedily behind each question's prompt. It is right if the first legal answer in
what it says is the record's: the rule of LLM-Adapters' scorer. (The paper's scripts decode with
four beams; every result here says "greedy".) This file knows models and questions.
plumbing/scoring.py calls it for whole test sets: it keeps every generation in eval/<task>.jsonl and
goes on where it stopped. In fp32 an answer does not depend on the questions beside it; in bf16,
where two tokens nearly tie, it can: --exact asks each question alone.
"""

import math
import sys
from collections import Counter

from data import PAPER_TASKS, TASKS, extract_answer, format_prompt, offered_answers
from llama import Llama, generate


def evaluate(
    model: Llama, tokenizer, task: str, examples: list[dict], batch_size=32, style="clean"
) -> dict:
    """Answer and score one task, in the plainest way. Puts each answer into its example."""
    model.eval()
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        prompts = [encode_question(e, tokenizer, style) for e in batch]
        answers = generate(model, prompts, TASKS[task].new_tokens, tokenizer.eos)
        for example, ids in zip(batch, answers):
            example["generation"] = tokenizer.decode(ids)
    return score_task(task, examples)


def encode_question(example: dict, tokenizer, style: str) -> list[int]:
    return tokenizer.encode(format_prompt(example, style), bos=True, eos=False)


def right(task: str, example: dict) -> bool:
    return said(task, example) == example["answer"]


def said(task: str, example: dict) -> str:
    """The answer that counts in an example's "generation"; "" if there is none.

    The marker goes before it, so that a question which contains the marker is not judged itself.
    """
    return extract_answer(task, "### Response:" + example["generation"])


def score_task(task: str, examples: list[dict]) -> dict:
    """Counts and percentages. Each example: its record's fields and the model's "generation"."""
    n = len(examples)
    answers = [said(task, e) for e in examples]
    correct = sum(answer == e["answer"] for answer, e in zip(answers, examples))
    unanswered = answers.count("")
    not_offered = 0
    for answer, e in zip(answers, examples):
        offered = offered_answers(e)
        not_offered += bool(answer and offered and answer not in offered)
    constant = Counter(e["answer"] for e in examples).most_common(1)[0][1]
    return {
        "n": n,
        "correct": correct,
        "wrong": n - correct - unanswered,
        "unanswered": unanswered,
        "not_offered": not_offered,
        "accuracy": 100 * correct / n,
        "constant": 100 * constant / n,  # always giving the most frequent answer
    }


def error_bar(accuracy: float, n: int) -> float:
    """One binomial standard error, in percentage points."""
    p = accuracy / 100
    return 100 * math.sqrt(p * (1 - p) / n)


def mean(tasks: dict[str, dict], key: str = "accuracy") -> float | None:
    """The unweighted mean of the paper's eight tasks; None unless all eight were scored.

    Tasks of your own stand in the table and leave this number the paper's.
    """
    if not all(task in tasks for task in PAPER_TASKS):
        return None
    return sum(tasks[task][key] for task in PAPER_TASKS) / len(PAPER_TASKS)


def mean_error_bar(tasks: dict[str, dict]) -> float | None:
    """One standard error of `mean`, of eight independent tasks."""
    if mean(tasks) is None:
        return None
    bars = [error_bar(tasks[task]["accuracy"], tasks[task]["n"]) for task in PAPER_TASKS]
    return math.hypot(*bars) / len(bars)


def task_table(tasks: dict[str, dict]) -> str:
    """Markdown, a line per task, as printed and kept in results.md."""
    lines = [
        "| task | accuracy | ± | constant answer | correct | wrong | unanswered | n |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for task, r in tasks.items():
        bar = error_bar(r["accuracy"], r["n"])
        cells = [f"{r['accuracy']:.1f}", f"{bar:.1f}", f"{r['constant']:.1f}"]
        counts = [str(r[key]) for key in ("correct", "wrong", "unanswered", "n")]
        lines.append("| " + " | ".join([task, *cells, *counts]) + " |")
    average, constant = mean(tasks), mean(tasks, "constant")
    if average is not None and constant is not None:
        lines.append(f"| **mean of the eight** | **{average:.1f}** | | {constant:.1f} | | | | |")
    return "\n".join(lines)


def show_answer(task: str, examples: list[dict], good: bool) -> str | None:
    """The first question that was answered right, or wrong, on a few short lines."""
    for e in examples:
        if right(task, e) == good:
            verdict = f"-> {e['generation'].strip()!r}"
            if not good:
                verdict += f", expected {e['answer']}"
            question = [line for line in e["instruction"].split("\n") if line]
            title = f"{task}, {'right' if good else 'wrong'}:"
            return "\n    ".join([title, *question, verdict])
    return None


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see README. Never raises SystemExit."""
    from plumbing.scoring import main  # not above: scoring.py imports this file

    return main(argv)


if __name__ == "__main__":
    from eval import main  # as in rora.py

    sys.exit(main())
