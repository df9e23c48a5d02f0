"""data.py's tokenizers against SentencePiece, tiktoken and the tokenizers library.

On every record there is, and on random text.
"""

import base64
import json
import random
import unicodedata

import pytest
import sentencepiece
import tiktoken
from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers.convert_slow_tokenizer import TikTokenConverter

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
    """Text that no one writes, of characters that this Python's Unicode tables know.

    The others' tables may be newer.
    """
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


# --- tokenizer.json -------------------------------------------------------------------------------


def theirs_from(path) -> Tokenizer:
    """The library's tokenizer, told that the names of special tokens are only text, as here."""
    theirs = Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True
    return theirs


@pytest.fixture(scope="module")
def llama_3_json(data_folder, tmp_path_factory):
    """Meta's ranks as the tokenizer.json that transformers makes of them; bos in a template."""
    ranks = str(data_folder / "llama3" / "tokenizer.model")
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{i}|>" for i in range(254))]
    made = TikTokenConverter(vocab_file=ranks, extra_special_tokens=names).converted()
    made.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    folder = tmp_path_factory.mktemp("llama-3")
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [128001, 128009]}))
    return folder


def test_llama_3_has_the_same_ids_from_either_file(llama_3, llama_3_json, texts, mismatches):
    ours, from_ranks = load_tokenizer(llama_3_json), llama_3[0]
    assert (ours.bos, ours.eos, ours.vocab_size) == (128000, 128001, 128256)
    both = {"bos": True, "eos": True}
    pairs = ((ours.encode(t, **both), from_ranks.encode(t, **both)) for t in texts)
    assert mismatches("ids of records, Llama-3's tokenizer.json", "its ranks", pairs) == 0


@pytest.fixture(scope="module", params=["Llama-3", "SmolLM2", "GPT-2's split", "whole words first"])
def from_json(request, tmp_path_factory):
    """(name, ours, the library's) of one tokenizer.json."""
    if request.param == "Llama-3":
        path = request.getfixturevalue("llama_3_json") / "tokenizer.json"
        return request.param, load_tokenizer(path), theirs_from(path)
    source = request.getfixturevalue("smollm2") / "tokenizer.json"
    made = Tokenizer.from_file(str(source))
    if request.param == "GPT-2's split":
        made.pre_tokenizer = ByteLevel(add_prefix_space=False)
        made.add_tokens(
            [AddedToken("the sky", normalized=True), AddedToken("the", normalized=True)]
        )
    if request.param == "whole words first":
        made.model.ignore_merges = True
    path = tmp_path_factory.mktemp("made") / "tokenizer.json"
    made.save(str(path))
    (path.parent / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return request.param, load_tokenizer(path), theirs_from(path)


def same_ids(from_json, texts):
    _, ours, theirs = from_json
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        yield ours.encode(text, bos=False, eos=False), expected


def test_ids_from_tokenizer_json_are_the_librarys_on_every_record(from_json, texts, mismatches):
    what = f"ids of records, tokenizer.json: {from_json[0]}"
    assert mismatches(what, "tokenizers", same_ids(from_json, texts)) == 0


def test_ids_from_tokenizer_json_are_the_librarys_on_random_unicode(from_json, mismatches):
    what = f"ids of random Unicode, tokenizer.json: {from_json[0]}"
    assert mismatches(what, "tokenizers", same_ids(from_json, random_texts(20_000))) == 0


@pytest.mark.parametrize("text", ["中文字" * 3000, "ab" * 5000, " " * 3000, "!?" * 3000], ids=ascii)
def test_ids_of_long_unbroken_text_are_the_librarys(text, from_json):
    (ours, theirs), *_ = same_ids(from_json, [text])
    assert ours == theirs


def test_decoded_text_is_the_librarys(from_json, texts):
    _, ours, theirs = from_json
    for text in texts[::50] + random_texts(500):
        ids = ours.encode(text, bos=False, eos=False)
        assert ours.decode(ids) == theirs.decode(ids)
