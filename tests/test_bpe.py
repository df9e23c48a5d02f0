"""Byte-level BPE: how text becomes the ids of SmolLM2 and Llama-3, and what its files may hold."""

import base64
import json
import random

import pytest

from data import DataError, load_tokenizer
from plumbing.tokenizer_files import BYTE_OF, BYTES, DIGITS, LLAMA_3

LETTER = {byte: letter for letter, byte in BYTE_OF.items()}
GPT_2 = BYTES | {"trim_offsets": True}
SMOLLM2 = {"type": "Sequence", "pretokenizers": [DIGITS, GPT_2]}
LLAMA3 = {"type": "Sequence", "pretokenizers": [LLAMA_3, GPT_2 | {"use_regex": False}]}
END = {"id": 900, "content": "<|end|>", "special": True}


def letters(text: str) -> str:
    """A text as tokenizer.json spells it: a letter for each byte, Ġ for a blank."""
    return "".join(LETTER[byte] for byte in text.encode())


def write(folder, merges="", whole=(), model=(), missing="", **changes):
    """A tokenizer.json of the 256 bytes, what `merges` ("t h,th e") make, and `whole` words."""
    vocab = [LETTER[byte] for byte in range(256) if byte not in missing.encode()]
    pairs = [list(map(letters, pair.split())) for pair in merges.split(",") if pair]
    vocab += [*map("".join, pairs), *map(letters, whole)]
    bpe = {"type": "BPE", "vocab": {t: i for i, t in enumerate(dict.fromkeys(vocab))}}
    bpe |= {"merges": [" ".join(pair) for pair in pairs]}
    file = {
        "added_tokens": [END],
        "normalizer": None,
        "pre_tokenizer": GPT_2,
        "post_processor": None,
    }
    file |= {"decoder": GPT_2, "model": bpe | dict(model)} | changes
    (folder / "tokenizer.json").write_text(json.dumps(file))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 900, "eos_token_id": [900, 1]}))
    return folder


def pieces(tokenizer, text):
    """What each id of a text stands for."""
    return [tokenizer.decode([i]) for i in tokenizer.encode(text, bos=False, eos=False)]


# --- merging --------------------------------------------------------------------------------------


def test_pairs_are_joined_in_the_order_of_the_merges_and_the_leftmost_first(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, "a a,b a,aa b"))
    assert pieces(tokenizer, "aaa") == ["aa", "a"]
    assert pieces(tokenizer, "aaba") == ["aa", "ba"]  # "b a" comes before "aa b"


def test_a_list_of_pairs_and_a_list_of_tokens_say_different_things(tmp_path):
    """Once b and c are joined, a and bc are no listed pair; yet they make a listed token."""
    of_pairs = load_tokenizer(write(tmp_path, "b c,a b,ab c"))
    assert pieces(of_pairs, "abc") == ["a", "bc"]
    tokens = [*(bytes([i]) for i in range(256)), b"bc", b"ab", b"abc"]
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    assert pieces(load_tokenizer(tmp_path), "abc") == ["abc"]
    assert pieces(load_tokenizer(tmp_path / "tokenizer.model"), "xabc") == ["x", "abc"]


def test_ignore_merges_takes_a_whole_word_that_no_merge_makes(tmp_path):
    for ignore, expected in ((False, ["t", "h", "e"]), (True, ["the"])):
        folder = write(tmp_path, whole=["the"], model={"ignore_merges": ignore})
        assert pieces(load_tokenizer(folder), "the") == expected


def plainly(word: bytes, ranks: dict) -> list[bytes]:
    """The rule without heap or links: look at all pairs each time."""
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = list(zip(parts, parts[1:]))
        best = min(pairs, key=lambda pair: ranks.get(pair, 10**9), default=None)
        if best not in ranks:
            return parts
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_the_heap_joins_what_looking_at_all_pairs_each_time_joins(tmp_path):
    rng = random.Random(0)
    tokens, merges = list("abc"), []
    while len(merges) < 60:
        pair = rng.choice(tokens), rng.choice(tokens)
        if "".join(pair) not in tokens:
            merges.append(pair)
            tokens.append("".join(pair))
    tokenizer = load_tokenizer(write(tmp_path, ",".join(map(" ".join, merges))))
    ranks = {(a.encode(), b.encode()): rank for rank, (a, b) in enumerate(merges)}
    for _ in range(500):
        word = "".join(rng.choices("abc", k=rng.randint(1, 40)))
        assert pieces(tokenizer, word) == [part.decode() for part in plainly(word.encode(), ranks)]


def test_twice_the_unbroken_text_is_twice_the_work(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(write(tmp_path, "a b,ab ab,abab abab"))
    asked, rank = [], tokenizer._rank
    monkeypatch.setattr(tokenizer, "_rank", lambda *pair: asked.append(pair) or rank(*pair))
    work = []
    for n in (1000, 2000):
        asked.clear()
        tokenizer.encode("ab" * n, bos=False, eos=False)
        work.append(len(asked))
    assert work[1] < 2.1 * work[0] < 20_000


# --- splitting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, expected",
    [
        (GPT_2, ["a", " 12345", "'s", " b", "  ", " c"]),
        (SMOLLM2, ["a", " ", "1", "2", "3", "4", "5", "'s", " b", "  ", " c"]),
        (LLAMA3, ["a", " ", "123", "45", "'s", " b", "  ", " c"]),
    ],
    ids=["gpt-2", "smollm2", "llama-3"],
)
def test_numbers_are_what_the_three_splitting_rules_disagree_about(tmp_path, rule, expected):
    changes = {"whole": expected, "model": {"ignore_merges": True}, "pre_tokenizer": rule}
    assert pieces(load_tokenizer(write(tmp_path, **changes)), "a 12345's b   c") == expected


def test_text_survives_the_way_to_ids_and_back(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, "t h,th e"))
    for text in ("the  sky\n", "中文 ½ e\u0301 \U0001f600", "", "<|end|>"):
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_a_byte_that_has_no_token_is_dropped_as_the_tokenizers_library_drops_it(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, "a b", missing="é"))
    assert pieces(tokenizer, "aéb") == ["ab"]


# --- special and added tokens ---------------------------------------------------------------------


def test_the_name_of_a_special_token_is_only_text(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path))
    ids = tokenizer.encode("<|end|>", bos=False, eos=True)
    assert len(ids) == len("<|end|>") + 1 and ids[-1] == tokenizer.eos == 900
    assert tokenizer.decode([900]) == "" and tokenizer.vocab_size == 901


def test_an_added_token_that_is_not_special_is_found_in_a_text_the_longest_first(tmp_path):
    added = [{"id": 901 + i, "content": c, "special": False} for i, c in enumerate(["(a", "(a)"])]
    tokenizer = load_tokenizer(write(tmp_path, added_tokens=[END, *added]))
    assert tokenizer.encode("(a)(a", bos=False, eos=False) == [902, 901]
    assert pieces(tokenizer, "x(a)y") == ["x", "(a)", "y"]


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|begin|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [],
    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [901], "tokens": ["<|begin|>"]}},
}
BEGIN = {"id": 901, "content": "<|begin|>", "special": True}


def test_the_begin_token_is_the_templates_and_the_end_token_configs_first(tmp_path):
    both = {"type": "Sequence", "processors": [GPT_2, TEMPLATE]}
    for post_processor in (TEMPLATE, both):
        write(tmp_path, post_processor=post_processor, added_tokens=[END, BEGIN])
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.bos, tokenizer.eos) == (901, 900)


def test_without_config_json_the_ends_are_those_of_tokenizer_config_json(tmp_path):
    write(tmp_path, added_tokens=[END, BEGIN])
    (tmp_path / "config.json").unlink()
    with pytest.raises(DataError, match="no bos token"):
        load_tokenizer(tmp_path)
    names = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert load_tokenizer(tmp_path).encode("", bos=True, eos=True) == [901, 900]


# --- which file -----------------------------------------------------------------------------------


def test_metas_ranks_are_found_where_llama_3_keeps_them(tmp_path):
    (tmp_path / "original").mkdir()
    lines = [b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    (tmp_path / "original/tokenizer.model").write_bytes(b"".join(lines))
    assert load_tokenizer(tmp_path).bos == 256


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_git_lfs_pointer_is_called_one(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DataError, match=f"{name}: a git-lfs pointer"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_told_what_it_may_have(tmp_path):
    with pytest.raises(DataError, match="tokenizer.model or tokenizer.json or original"):
        load_tokenizer(tmp_path)


# --- what would change an id and is not done here -------------------------------------------------

LLAMA_2_MODEL = {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
ENDING = TEMPLATE | {"single": TEMPLATE["single"] * 2}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"truncation": {"max_length": 9}}, "truncation"),
        ({"padding": {"strategy": "BatchLongest"}}, "padding"),
        ({"decoder": {"type": "WordPiece"}}, "decoder"),
        ({"something_new": 1}, "something_new"),
        ({"model": {"type": "WordPiece"}}, "WordPiece"),
        ({"model": {"dropout": 0.1}}, "dropout"),
        ({"model": {"fuse_unk": True}}, "fuse_unk"),
        ({"model": {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"something_new": 1}}, "something_new"),
        ({"model": {"unk_token": "<unk>"}, "missing": "\x04"}, "unk_token"),
        ({"model": {"vocab": {"a": 0, "b": 0}}}, "vocab"),
        ({"model": {"vocab": None}}, "vocab"),
        ({"model": {"merges": ["a b"]}}, "merge 1"),
        ({"model": {"merges": ["a  b"]}}, "merge 1"),
        ({"model": {"merges": [7]}}, "merge 1"),
        ({"model": {"merges": None}}, "merges"),
        ({"pre_tokenizer": None}, "pre_tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": GPT_2 | {"add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": GPT_2 | {"use_regex": False}}, "use_regex"),
        ({"pre_tokenizer": SMOLLM2 | {"pretokenizers": [GPT_2, DIGITS]}}, "Digits"),
        ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
        ({"post_processor": ENDING}, "TemplateProcessing"),
        ({"added_tokens": [END | {"special": False, "lstrip": True}]}, "lstrip"),
        ({"added_tokens": [END | {"special": False, "single_word": True}]}, "single_word"),
        (
            {
                "added_tokens": [
                    END | {"special": False, "normalized": True},
                    BEGIN | {"special": False, "normalized": False},
                ]
            },
            "normalized",
        ),
        ({"added_tokens": [{"content": "x"}]}, "added_tokens"),
        ({"added_tokens": [END | {"id": 5}]}, "another id"),
    ],
    ids=str,
)
def test_a_tokenizer_json_that_would_give_other_ids_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(DataError, match=f"tokenizer.json: .*{named}"):
        load_tokenizer(write(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": LLAMA_2_MODEL},
        {"model": {"type": "Unigram"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}},
    ],
    ids=str,
)
def test_sentencepieces_kind_of_tokenizer_json_is_refused_with_advice(tmp_path, changes):
    with pytest.raises(DataError, match="SentencePiece.* fetch tokenizer.model"):
        load_tokenizer(write(tmp_path, **changes))
