"""Text to ids and back, and what the loss is allowed to see."""

import json
import re

import pytest
from conftest import real_data, words

from data import (
    HEAD,
    IGNORE,
    PAPER_TASKS,
    DataError,
    collate,
    encode_record,
    encode_records,
    epoch_order,
    extract_answer,
    find_test_file,
    format_prompt,
    load_examples,
    load_tokenizer,
    offered_answers,
    split_validation,
)

EXAMPLE = {
    "instruction": "Please answer the following question with true or false, "
    "question: is the sky blue?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return words(tmp_path_factory.mktemp("tokenizer"))


# --- prompt ---------------------------------------------------------------------------------------


def test_training_and_evaluation_see_the_same_prompt():
    assert format_prompt(EXAMPLE) == format_prompt(EXAMPLE, training=True)


def test_the_prompt_of_dora_is_theirs_byte_for_byte():
    """Their two scripts differ: two blanks or one behind "request.", sixteen or none in a line."""
    e, indent = {"instruction": "<INS>", "input": ""}, " " * 16
    head = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
    )
    assert format_prompt(e, "dora", training=True) == (
        f"{head}  \n\n"
        f"{indent}### Instruction:\n{indent}<INS>\n{indent}\n{indent}### Response:\n{indent}"
    )
    assert format_prompt(e, "dora") == (
        f"{head} \n\n{indent}### Instruction:\n{indent}<INS>\n\n{indent}### Response:\n{indent}"
    )


def test_an_input_stands_between_instruction_and_response():
    assert format_prompt(EXAMPLE | {"input": "context"}).endswith(
        "true/false\n\n### Input:\ncontext\n\n### Response:\n"
    )


def test_a_records_ids_begin_with_the_ids_of_its_prompt_alone(tokenizer):
    record, _ = encode_record(EXAMPLE, tokenizer, 256)
    prompt = tokenizer.encode(format_prompt(EXAMPLE), bos=True, eos=False)
    assert record.ids[: len(prompt)].tolist() == prompt


def test_a_split_inside_a_token_is_an_error_and_not_a_guess(tokenizer):
    class Merging:
        """A tokenizer that sees one token where prompt and output meet."""

        encode = staticmethod(lambda text, *, bos, eos: [len(line) for line in text.split("\n")])

    with pytest.raises(DataError, match="record 5: its output begins with 'the corr'.*--loss all"):
        encode_record(EXAMPLE, Merging, 256, loss="answer", number=5)
    assert encode_record(EXAMPLE, Merging, 256, loss="all")[0].split == 1  # nothing to split


# --- what is learned ------------------------------------------------------------------------------


def test_each_target_is_the_next_token_shifted_once(tokenizer):
    record, _ = encode_record(EXAMPLE, tokenizer, 256)
    batch = collate([record])
    assert batch.ids[0] == tokenizer.bos and batch.targets[-1] == tokenizer.eos
    assert batch.ids[1:].tolist() == batch.targets[:-1].tolist()


def test_loss_all_learns_prompt_and_answer(tokenizer):
    whole, _ = encode_record(EXAMPLE, tokenizer, 256, "all")
    assert IGNORE not in collate([whole]).targets


def test_loss_answer_learns_the_answer_and_the_end_alone(tokenizer):
    whole, _ = encode_record(EXAMPLE, tokenizer, 256, "all")
    answer, _ = encode_record(EXAMPLE, tokenizer, 256, "answer")
    assert whole.ids == answer.ids
    batch = collate([answer])
    learned = [t for t in batch.targets.tolist() if t != IGNORE]
    assert tokenizer.decode(learned).strip() == EXAMPLE["output"]
    assert learned[-1] == tokenizer.eos
    assert batch.learned == len(learned)


def test_the_rows_of_a_batch_lie_end_to_end(tokenizer):
    one, _ = encode_record(EXAMPLE | {"output": "true"}, tokenizer, 256)
    two, _ = encode_record(EXAMPLE | {"output": "the correct answer is false"}, tokenizer, 256)
    batch = collate([one, two])
    assert batch.lengths == [len(one.ids) - 1, len(two.ids) - 1]
    assert batch.ids.tolist() == [*one.ids[:-1], *two.ids[:-1]]


def test_the_last_token_of_a_row_predicts_nothing_of_the_next(tokenizer):
    record, _ = encode_record(EXAMPLE, tokenizer, 256)
    batch = collate([record, record])
    end_of_first = batch.lengths[0]
    assert batch.targets[end_of_first - 1] == tokenizer.eos
    assert batch.ids[end_of_first] == tokenizer.bos


def test_a_record_that_is_too_long_loses_the_start_of_its_instruction_and_nothing_else(tokenizer):
    full, _ = encode_record(EXAMPLE, tokenizer, 10_000, "answer")
    short, cut = encode_record(EXAMPLE, tokenizer, len(full.ids) - 5, "answer")
    head = len(tokenizer.encode(HEAD.format(gap="", indent=""), bos=True, eos=False))
    assert cut == 5
    assert short.ids == full.ids[:head] + full.ids[head + 5 :]
    assert short.ids[short.split :] == full.ids[full.split :]


def test_a_record_whose_instruction_would_vanish_is_dropped_and_counted(tokenizer):
    examples = [EXAMPLE, EXAMPLE | {"output": "word " * 300}]
    records, cut, dropped = encode_records(examples, tokenizer, 200)
    assert (len(records), cut, dropped) == (1, 0, 1)
    with pytest.raises(DataError, match="all 1 records are longer"):
        encode_records([EXAMPLE], tokenizer, 8)


def test_begin_and_end_markers_written_in_a_text_are_text(tokenizer):
    ids = tokenizer.encode("a <s> b </s>", bos=False, eos=False)
    assert tokenizer.bos not in ids and tokenizer.eos not in ids


# --- order ----------------------------------------------------------------------------------------


def test_an_epochs_order_is_a_function_of_seed_and_epoch():
    assert epoch_order(100, seed=0, epoch=0) == epoch_order(100, seed=0, epoch=0)
    orders = {tuple(epoch_order(100, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(100)) for order in orders)


def test_the_validation_split_is_the_same_for_every_seed_and_loses_no_record():
    train, held = split_validation(list(range(50)), 7)
    assert (train, held) == split_validation(list(range(50)), 7)
    assert len(held) == 7
    assert sorted(train + held) == list(range(50))
    with pytest.raises(DataError, match="--val-size 50"):
        split_validation(list(range(50)), 50)


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, text, answer",
    [
        ("boolq", "the correct answer is true, not false", "true"),
        ("boolq", "True", ""),
        ("boolq", "untrue", "true"),
        ("piqa", "solution3 or solution2", "solution2"),
        ("social_i_qa", "answer5", "answer5"),
        ("winogrande", "answer1", ""),
        ("hellaswag", "ending4ever", "ending4"),
        ("openbookqa", "### Instruction: answer2 ### Response: answer3", "answer3"),
    ],
)
def test_the_first_legal_answer_counts_wherever_it_stands_and_only_in_this_spelling(
    task, text, answer
):
    assert extract_answer(task, text) == answer


def test_the_last_line_of_a_question_says_which_answers_are_offered():
    assert offered_answers(EXAMPLE) == {"true", "false"}
    assert offered_answers({"instruction": "no list"}) == set()


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, said",
    [
        ("[", "not valid JSON"),
        ("{}", 'record 1: no "instruction"'),  # JSON Lines of one line
        ("[]", "expected a non-empty JSON list"),
        ([EXAMPLE, 3], "record 2: expected an object"),
        ([EXAMPLE, {"instruction": "x", "output": "y"}], 'record 2: no "answer"'),
        ([EXAMPLE | {"answer": None}], 'record 1: "answer" is NoneType'),
        ([EXAMPLE | {"instruction": " "}], 'record 1: "instruction" is empty'),
        (
            [EXAMPLE | {"answer": "yes"}],
            "record 1: \"answer\" is 'yes', which is not legal for boolq",
        ),
        ([EXAMPLE | {"instruction": "\ud800"}], "surrogate"),
        (b"[\xff]", "not UTF-8 at byte 1"),
    ],
)
def test_a_bad_record_is_named_by_file_number_and_field(tmp_path, content, said):
    path = tmp_path / "records.json"
    if isinstance(content, list):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=re.escape(str(path))) as error:
        load_examples(path, "boolq")
    assert said in str(error.value)


def test_windows_line_ends_and_byte_order_marks_do_no_harm(tmp_path):
    text = json.dumps([EXAMPLE], indent=1).replace("\n", "\r\n")
    (tmp_path / "r.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_examples(tmp_path / "r.json") == [EXAMPLE]


def test_tests_are_found_in_either_layout(tmp_path):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq/test.json").write_text("[]")
    (tmp_path / "piqa.json").write_text("[]")
    assert find_test_file(tmp_path, "boolq") == tmp_path / "boolq/test.json"
    assert find_test_file(tmp_path, "piqa") == tmp_path / "piqa.json"
    assert find_test_file(tmp_path, "winogrande") is None


def test_a_file_that_is_no_tokenizer_is_said_to_be_none(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01garbage")
    with pytest.raises(DataError, match="neither a SentencePiece model nor"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIQ== 1\n")
    with pytest.raises(DataError, match="line 2"):
        load_tokenizer(tmp_path)


# --- the real thing -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return real_data()


def test_every_real_test_record_has_a_legal_and_offered_answer(real):
    for task in set(PAPER_TASKS) - {"hellaswag"}:  # whose records could not be had
        for e in load_examples(real / "eval" / f"{task}.json", task):
            assert e["answer"] in offered_answers(e)
            assert e["output"] == f"the correct answer is {e['answer']}"


def test_the_longest_real_prompt_has_641_tokens_in_our_wording_and_644_in_doras(real):
    tokenizer, piqa = load_tokenizer(real), load_examples(real / "eval/piqa.json")

    def longest(style):
        prompts = [format_prompt(e, style) for e in piqa]
        return max(len(tokenizer.encode(prompt, bos=True, eos=False)) for prompt in prompts)

    assert (longest("clean"), longest("dora")) == (641, 644)


@pytest.mark.parametrize("folder", [".", "llama3"])
def test_prompt_ids_are_a_prefix_on_real_records_with_both_real_tokenizers(real, folder):
    examples = load_examples(real / "train/commonsense_mini.json")[:1500]
    tokenizer = load_tokenizer(real / folder)
    records, cut, dropped = encode_records(examples, tokenizer, 256, "answer")  # or it raises
    assert (len(records), dropped) == (1500, 0)
    assert cut <= 1


def test_llama_3_cuts_text_into_the_pieces_that_meta_says(real):
    """The crosscheck suite compares with tiktoken at length; these ids were read off it."""
    tokenizer = load_tokenizer(real / "llama3")
    pieces = ["Hello", " world", " <", "s", ">", " ", "123", "456"]
    ids = [9906, 1917, 366, 82, 29, 220, 4513, 10961]
    assert [tokenizer.decode([i]) for i in ids] == pieces
    said = tokenizer.encode("Hello world <s> 123456", bos=True, eos=True)
    assert said == [128000, *ids, 128001]
    text = "l'été, 12345 naïve 漢字\r\n\n  <|end_of_text|> ſs"
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text
    assert max(tokenizer.encode(text, bos=False, eos=False)) < 128000
