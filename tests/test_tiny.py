"""What makes the embedded world an honest test: its questions, its facts, its corpus, its size."""

import json
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny"
sys.path[:0] = [str(ROOT), str(TINY)]

import corpus
import pretrain
import world

from data import PAPER_TASKS, TASKS, format_prompt, load_tokenizer


# The wording of the real records, as full matches.


def opt(label: str, n: int, gap: str = " ", end: str = "\n\n") -> str:
    """A list of n options, and what may be answered."""
    listed = gap.join(rf"{label.capitalize()}{i}: [^\n]+?" for i in range(1, n + 1))
    return rf"{listed}{end}Answer format: {'/'.join(f'{label}{i}' for i in range(1, n + 1))}"


CHOOSE = r"Please choose the correct answer to the question: [^\n]+\n\n"
FORMATS = {
    "boolq": r"Please answer the following question with true or false, question: [^\n]+\?\n\n"
    r"Answer format: true/false",
    "piqa": r"Please choose the correct solution to the question: [^\n]+\n\n"
    + opt("solution", 2, gap="\n\n"),
    "social_i_qa": CHOOSE + opt("answer", 3),
    "hellaswag": r"Please choose the correct ending to complete the given sentence: "
    r"[^\n:]+: [^\n]+\n\n" + opt("ending", 4),
    "winogrande": r"Please choose the correct answer to fill in the blank to complete the given "
    r"sentence: [^\n]*_[^\n]*\n\n" + opt("option", 2, end=" "),
    "ARC-Easy": CHOOSE + f"({opt('answer', 3)}|{opt('answer', 4)}|{opt('answer', 5)})",
    "ARC-Challenge": CHOOSE + f"({opt('answer', 3)}|{opt('answer', 4)}|{opt('answer', 5)})",
    "openbookqa": CHOOSE + opt("answer", 4),
}
HOMES = {"test": "data", "strict": "strict", "val": "val"}
FORBIDDEN = [
    "answer1",
    "answer2",
    "solution1",
    "option1",
    "ending1",
    "please",
    "choose",
    "correct",
    "true",
    "false",
    "answer format",
    "below is",
    "instruction",
    "response",
    "complete the given",
    "fill in the blank",
]


def records(split: str, task: str) -> list[dict]:
    return json.loads((TINY / HOMES[split] / task / "test.json").read_text())


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return json.loads((TINY / "data/train.json").read_text())


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    readers = [
        corpus.Corpus(world.build_world(), seed=1, hint=0.5, noise=noise, phrases=noise)
        for noise in (0.0, 0.7)
    ]
    return [
        d.replace("^", "")
        for r in readers
        for d in islice(r.documents({kind: 1.0 for kind in r.kinds}), 10_000)
    ]


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_records_have_the_wording_of_the_real_benchmark(task):
    for split in HOMES:
        for r in records(split, task):
            assert list(r) == ["instruction", "input", "output", "answer"] and r["input"] == ""
            assert re.fullmatch(FORMATS[task], r["instruction"]), r["instruction"]
            assert re.fullmatch(TASKS[task].answers, r["answer"])
            assert r["output"] == f"the correct answer is {r['answer']}"
            assert r["answer"] in r["instruction"].split("Answer format: ")[1].split("/")


def test_training_records_mix_all_eight_tasks_in_the_same_wording(train):
    def task_of(record):
        fits = (t for t, form in FORMATS.items() if re.fullmatch(form, record["instruction"]))
        return next(fits)  # raises where none fits

    assert len(train) >= 1000
    found = Counter(task_of(record) for record in train)
    assert len(found) >= 6  # openbookqa and both ARCs share one pattern


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_there_are_a_hundred_test_questions_per_task(task):
    assert len(records("test", task)) >= 100


def test_no_question_is_asked_twice_or_in_two_splits(train):
    asked = [r["instruction"] for r in train]
    for split in HOMES:
        for task in PAPER_TASKS:
            asked += [r["instruction"] for r in records(split, task)]
    # Three tasks share a wording but never facts of one kind: no question repeats across them.
    assert len(asked) == len(set(asked))


def test_facts_behind_test_questions_are_in_no_fine_tuning_record():
    w = world.build_world()
    known = {
        split: {
            f for task in world.STEMS for q in world.questions(w, task, split, n) for f in q.facts
        }
        for split, n in world.SIZES.items()
    }
    assert not known["train"] & (known["test"] | known["strict"])
    assert not known["val"] & (known["test"] | known["strict"])
    # A rule such as (gear, barber, razor) may serve both.
    rules = {fact for fact in known["test"] if fact[0] in w.parent}
    assert not known["test"] & known["strict"] - rules


def test_no_training_record_names_a_test_subject_together_with_its_value(train):
    w = world.build_world()
    texts = [set(re.findall("[A-Za-z]+", r["instruction"])) for r in train]
    for relation, subjects in w.facts.items():
        for subject, value in subjects.items():
            if w.split[relation, subject] in ("test", "strict"):
                pair = {*subject.split(), value}
                assert not any(pair <= words for words in texts), (relation, subject, value)


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_each_of_the_offered_answers_is_right_equally_often(task):
    for split in HOMES:
        right: dict[int, Counter] = {}  # by how many answers are offered
        for r in records(split, task):
            offered = len(r["instruction"].split("Answer format: ")[1].split("/"))
            right.setdefault(offered, Counter())[r["answer"]] += 1
        for offered, counts in right.items():
            assert len(counts) == offered
            assert max(counts.values()) - min(counts.values()) <= 5


def test_the_corpus_never_speaks_like_the_tasks(sentences):
    text = "\n".join(sentences).lower()
    assert not [phrase for phrase in FORBIDDEN if phrase in text]


def test_the_corpus_never_asks_a_question_in_a_tasks_words(sentences):
    text = "\n".join(sentences).lower()
    w = world.build_world()
    stems = {
        r["instruction"].split("\n\n")[0].split(": ", 1)[1].lower()
        for task in PAPER_TASKS
        for r in records("test", task)
    }
    assert w and not [stem for stem in stems if stem in text]


def test_strict_facts_are_stated_and_never_asked():
    reader = corpus.Corpus(world.build_world(), seed=2)
    strict = {(r, s) for (r, s), split in reader.world.split.items() if split == "strict"}
    for _ in range(3000):
        _, relation, subject, _ = reader.question()
        assert (relation, subject) not in strict
    assert not {(r, s) for r, subjects in reader.asked.items() for s in subjects} & strict


def test_the_script_makes_the_committed_data_again(tmp_path):
    world.write_data(tmp_path)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.json"))
    assert len(made) == 1 + 3 * len(PAPER_TASKS)
    for name in made:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name


def test_the_script_makes_the_committed_tokenizer_again():
    assert pretrain.train_tokenizer(world.build_world()) == (TINY / "tokenizer.model").read_bytes()


def test_the_committed_log_is_of_the_stages_as_they_are():
    log = [json.loads(line) for line in (TINY / "pretrain.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["stage"] for row in log)) == list(pretrain.STAGES)
    for stage, (millions, _, _) in pretrain.STAGES.items():
        rows = [row for row in log if row["stage"] == stage]
        began = next((row["tokens"] for row in reversed(log[: log.index(rows[0])])), 0)
        spent = (rows[-1]["tokens"] - began) / 1e6
        probe, percent = pretrain.UNTIL.get(stage, ("loss", 0))
        assert spent == pytest.approx(millions, abs=0.01) or (
            millions < spent < 3 * millions and rows[-1][probe] >= percent
        ), stage


def test_the_checkpoint_is_small():
    files = [TINY / name for name in ("config.json", "model.safetensors", "tokenizer.model")]
    files += [p for home in HOMES.values() for p in (TINY / home).rglob("*.json")]
    assert sum(f.stat().st_size for f in files) <= 8e6
    header = (TINY / "model.safetensors").read_bytes()
    tensors = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    sizes = [t["shape"] for name, t in tensors.items() if name != "__metadata__"]
    assert sum(s[0] * (s[1] if len(s) > 1 else 1) for s in sizes) <= 4_000_000


def test_every_name_is_one_token_and_no_record_is_long(train):
    tokenizer = load_tokenizer(TINY)
    names = [name for name in corpus.Corpus(world.build_world(), 0).words if " " not in name]
    assert all(len(tokenizer.encode(name, bos=False, eos=False)) == 1 for name in names)
    texts = [format_prompt(r) + r["output"] for r in train]
    assert max(len(tokenizer.encode(text, bos=True, eos=True)) for text in texts) <= 128
