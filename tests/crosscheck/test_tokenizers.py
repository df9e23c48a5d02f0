"""data.py's tokenizers against SentencePiece and tiktoken, on every record there is and on random text."""

import base64
import random
import unicodedata

import pytest
import sentencepiece
import tiktoken

from data import format_prompt, load_tokenizer

pytestmark = pytest.mark.crosscheck

LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def texts(records) -> list[str]:
    """Each record as training sees it, and its bare instruction; each text once."""
    return list(
        {
            text: None
            for task in records.values()
            for r in task
            for text in (format_prompt(r) + r["output"], r["instruction"])
        }
    )


@pytest.fixture(scope="module")
def llama_3(data_folder):
    """(ours, tiktoken's), from the same file."""
    path = data_folder / "llama3" / "tokenizer.model"
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in map(bytes.split, path.read_bytes().splitlines())
    }
    theirs = tiktoken.Encoding(
        "llama-3", pat_str=LLAMA_3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    return load_tokenizer(path), theirs


def random_texts(n: int) -> list[str]:
    """Text that no one writes. Only characters that this Python's Unicode tables know: tiktoken's may be newer."""
    rng = random.Random(0)
    known = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    kinds = [
        known,
        [c for c in known if c < "\u3000"],
        [c for c in known if c < "\x80"],
        [c for c in known if unicodedata.category(c)[0] in "NZPS"],
        list("'ſsStTmMdDrReEvVlL  \n"),
    ]
    blanks = "\t\n\r \x0b\x0c\x1c\x1f\x85\xa0\u2028\u3000'"  # where splitting rules differ
    texts = []
    for _ in range(n):
        kind = rng.choice(kinds)
        texts.append(
            "".join(
                rng.choice(blanks if rng.random() < 0.2 else kind)
                for _ in range(rng.randint(1, 40))
            )
        )
    return texts


def test_llama_1_and_2_ids_are_sentencepieces_on_every_record(data_folder, texts, mismatches):
    ours = load_tokenizer(data_folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(data_folder / "tokenizer.model"))
    pairs = ((ours.encode(t, bos=True, eos=True), [1, *theirs.encode(t), 2]) for t in texts)
    assert mismatches("ids of records, LLaMA-1 and 2", "SentencePiece", pairs) == 0


def test_llama_3_ids_are_tiktokens_on_every_record(llama_3, texts, mismatches):
    ours, theirs = llama_3
    pairs = (
        (ours.encode(t, bos=True, eos=True), [128000, *theirs.encode_ordinary(t), 128001])
        for t in texts
    )
    assert mismatches("ids of records, Llama-3", "tiktoken", pairs) == 0


def test_llama_3_ids_are_tiktokens_on_random_unicode(llama_3, mismatches):
    ours, theirs = llama_3
    pairs = (
        (ours.encode(t, bos=False, eos=False), theirs.encode_ordinary(t))
        for t in random_texts(20_000)
    )
    assert mismatches("ids of random Unicode, Llama-3", "tiktoken", pairs) == 0


@pytest.mark.parametrize(
    "text",
    [
        "<|begin_of_text|>",
        "<|end_of_text|> <|eot_id|>",
        "don'T we'LL it'ſ",
        "²Ⅷ½ x²",
        "a\x1cb \x1f",
        "\u3000\n x",
        "  \r\n\r\n  x",
        "",
        " ",
        "e\u0301",
        "中文字" * 300,
        "ab" * 500,
    ],
)
def test_llama_3_ids_are_tiktokens_where_the_rules_are_subtle(text, llama_3):
    ours, theirs = llama_3
    assert ours.encode(text, bos=False, eos=False) == theirs.encode_ordinary(text)


def test_llama_3_text_survives_the_way_to_ids_and_back(llama_3, texts):
    ours, _ = llama_3
    for text in texts[::20] + random_texts(1_000):
        assert ours.decode(ours.encode(text, bos=True, eos=True)) == text
