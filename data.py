"""Text to token ids and back: tokenizers, the prompt, the eight commonsense tasks, training
batches.

This file knows text and ids. It knows nothing of models and devices.

A record is what commonsense_170k.json of AGI-Edgerunners/LLM-Adapters holds:
    {"instruction": "Please answer ... true/false", "input": "", "output": "the correct answer is
    true", "answer": "true"}
"""

import functools
import heapq
import json
import random
import re
import sys
import unicodedata
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from torch import Tensor

from plumbing.hf_files import CheckpointError
from plumbing.tokenizer_files import BPE, find_tokenizer_file, read_ranks, read_tokenizer_json

IGNORE = -100  # a target that the loss skips; the value that F.cross_entropy skips by itself


class Task(NamedTuple):
    """A row of TASKS."""

    answers: str  # a pattern: what is a legal answer
    counts: str = "first"  # of several in what the model says, the "first" or the "last"
    new_tokens: int = 32  # how many the model may say; 32 in the paper's scripts


# As LLM-Adapters' scorer has it: answer4 and answer5 are legal even where three were offered.
# In the order of the paper's tables.
TASKS = {
    "boolq": Task(r"true|false"),
    "piqa": Task(r"solution[12]"),
    "social_i_qa": Task(r"answer[1-5]"),
    "hellaswag": Task(r"ending[1-4]"),
    "winogrande": Task(r"option[12]"),
    "ARC-Easy": Task(r"answer[1-5]"),
    "ARC-Challenge": Task(r"answer[1-5]"),
    "openbookqa": Task(r"answer[1-5]"),
}
# A row more is a task more for eval.py. The mean stays that of the paper's eight:
PAPER_TASKS = (
    *("boolq", "piqa", "social_i_qa", "hellaswag"),
    *("winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"),
)


class DataError(ValueError):
    """Records or a tokenizer that cannot be used; the message says where, what, and what to do."""


# --- tokenizers -----------------------------------------------------------------------------------


class SentencePieceTokenizer:
    """LLaMA-1 and -2. Begin and end are explicit at each call; "<s>" in a text is three letters."""

    def __init__(self, model: bytes):
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.bos, self.eos = self.sp.bos_id(), self.sp.eos_id()
        self.vocab_size = self.sp.vocab_size()

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        return [self.bos] * bos + self.sp.encode(text) + [self.eos] * eos

    def decode(self, ids: list[int]) -> str:  # a padded vocabulary has ids without a text
        return self.sp.decode([i for i in ids if i < self.vocab_size])


# How a text is cut into pieces before any merging, as the models' own files write it, but for the
# brackets: \p{L} a letter, \p{N} a number, \s a blank. The last blank before a word is the word's.
SPLITS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+"
    r"|[\s]+(?![^\s])|[\s]+",
    # Numbers are cut out first, digit by digit, and GPT-2's rule sees what lies between them.
    "smollm2": r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+|[\p{N}]| ?[^\s\p{L}\p{N}]+"
    r"|[\s]+(?![^\s\p{N}])|[\s]+",
    "llama-3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|[\s]*[\r\n]+|[\s]+(?![^\s])|[\s]+",
}


@functools.cache
def split_pattern(rule: str) -> re.Pattern:
    r"""A rule of SPLITS in the standard library's dialect.

    `re` has no \p{L} and \p{N} ([^\W\d_] is not \p{L}: it takes ² and Ⅷ), so both are listed from
    unicodedata; a character younger than this Python's Unicode tables counts as neither. Python's
    \s takes U+001C-1F too, so that Unicode's White_Space is written out.
    """
    runs: dict[str, list[list[int]]] = {"L": [], "N": []}  # [first, last] of each unbroken stretch
    for code in range(sys.maxunicode + 1):
        stretches = runs.get(unicodedata.category(chr(code))[0])
        if stretches and stretches[-1][1] == code - 1:
            stretches[-1][1] = code
        elif stretches is not None:
            stretches.append([code, code])
    pattern = SPLITS[rule]
    for kind, stretches in runs.items():
        listed = "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in stretches)
        pattern = pattern.replace(rf"\p{{{kind}}}", listed)
    blanks = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(pattern.replace(r"\s", blanks))


class BPETokenizer:
    """Byte-level BPE, the tokenizer of GPT-2, SmolLM2 and Llama-3, in the standard library.

    Special tokens are ids alone: "<|end_of_text|>" written in a text is text, whatever other
    libraries make of it, and special ids decode to nothing.
    """

    def __init__(self, bpe: BPE):
        self.bos, self.eos, self.vocab_size = bpe.bos, bpe.eos, bpe.vocab_size
        self.tokens, self.merges, self.whole_first = bpe.tokens, bpe.merges, bpe.whole_first
        self.pieces = split_pattern(bpe.split).findall  # every character lies in some piece
        self.added = bpe.added
        longest_first = sorted(map(re.escape, bpe.added), key=len, reverse=True)
        self.find_added = re.compile(f"({'|'.join(longest_first)})").split if bpe.added else None
        self.bytes_of = {i: token for token, i in bpe.tokens.items()}
        self.bytes_of |= {i: content.encode() for content, i in bpe.added.items()}
        # Words repeat: this answers 98% of a corpus's pieces. Bounded, for a corpus full of URLs.
        self._ids_of = functools.lru_cache(maxsize=2**17)(self._encode_piece)

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Raises UnicodeEncodeError, a ValueError, for a lone surrogate: no bytes stand for it."""
        text.encode()
        ids = [self.bos] * bos
        for i, part in enumerate(self.find_added(text) if self.find_added else [text]):
            if i % 2:  # re.split puts what it found between what it did not
                ids.append(self.added[part])
                continue
            for piece in self.pieces(part):
                ids += self._ids_of(piece)
        return ids + [self.eos] * eos

    def decode(self, ids: list[int]) -> str:
        """A character that the ids break off in the middle becomes U+FFFD."""
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode(errors="replace")

    def _rank(self, left: bytes, right: bytes) -> int | None:
        """How early two neighbours are joined; None where they make no token.

        tokenizer.json lists pairs in their order. Meta's file lists tokens: any two that make one.
        """
        if self.merges is None:
            return self.tokens.get(left + right)
        return self.merges.get((left, right))

    def _encode_piece(self, piece: str) -> list[int]:
        """Join the two neighbours of lowest rank, the leftmost on ties, until none make a token.

        A part that was joined to its left neighbour leaves an empty place, which the links of the
        others skip. A heap knows the lowest rank: text without blanks is one piece of any length.
        """
        whole = piece.encode()
        if self.whole_first and whole in self.tokens:  # merging misses some: Llama-3's " việc"
            return [self.tokens[whole]]
        parts = [bytes([byte]) for byte in whole]
        if (
            self.merges is not None
        ):  # a byte without a token is dropped, as the tokenizers library does
            parts = [part for part in parts if part in self.tokens]
        n = len(parts)
        left, right = list(range(-1, n - 1)), list(range(1, n + 1))
        heap: list[tuple[int, int]] = []  # (rank, place) of a part and its right neighbour

        def consider(i: int) -> None:
            if i >= 0 and right[i] < n:
                rank = self._rank(parts[i], parts[right[i]])
                if rank is not None:
                    heapq.heappush(heap, (rank, i))

        for i in range(n):
            consider(i)
        while heap:
            rank, i = heapq.heappop(heap)
            j = right[i]
            if not parts[i] or j == n or self._rank(parts[i], parts[j]) != rank:
                continue  # one of the two has been joined to another part since
            parts[i], parts[j], right[i] = parts[i] + parts[j], b"", right[j]
            if right[i] < n:
                left[right[i]] = i
            consider(left[i])
            consider(i)
        return [self.tokens[part] for part in parts if part]


Tokenizer = SentencePieceTokenizer | BPETokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or that file. Raises DataError."""
    try:
        path = find_tokenizer_file(Path(path))
        if path.suffix == ".json":
            return BPETokenizer(read_tokenizer_json(path))
        model = path.read_bytes()
        # Llama-3's file is lines of text, SentencePiece's begins with a byte that no base64 has.
        if re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", model):
            return BPETokenizer(read_ranks(path))
        tokenizer = SentencePieceTokenizer(model)
    except CheckpointError as e:
        raise DataError(str(e)) from None
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    except (RuntimeError, UnicodeDecodeError):  # or a garbled complaint
        raise DataError(
            f"{path}: neither a SentencePiece model nor Llama-3's ranks; download it again"
        ) from None
    if min(tokenizer.bos, tokenizer.eos) < 0:
        raise DataError(f"{path}: has no begin or no end token")
    return tokenizer


# --- prompt and answer ----------------------------------------------------------------------------

HEAD = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.{gap}\n\n"
    "{indent}### Instruction:\n{indent}"
)
INDENT = " " * 16


def format_prompt(example: dict, style: str = "clean", training: bool = False) -> str:
    """The text before the answer. Training and evaluation both call this: they must not drift
    apart.

    style "clean": the same bytes for both. style "dora": the bytes of NVlabs/DoRA and LLM-Adapters,
    whose indentation got into the text, and whose two scripts differ: `training` chooses which. (In
    theirs, the evaluation prompt ends in a token, sixteen spaces, that training never showed in
    that place.)
    """
    head, rest = _prompt_parts(example, style, training)
    return head + example["instruction"] + rest


def _prompt_parts(example: dict, style: str, training: bool) -> tuple[str, str]:
    """What stands before and after the instruction."""
    if style == "clean":
        context = f"\n\n### Input:\n{example['input']}" if example.get("input") else ""
        return HEAD.format(gap="", indent=""), f"{context}\n\n### Response:\n"
    if example.get("input"):
        raise DataError(
            '--prompt dora is known only for records with an empty "input"; use --prompt clean'
        )
    head = HEAD.format(gap="  " if training else " ", indent=INDENT)
    return head, f"\n{INDENT if training else ''}\n{INDENT}### Response:\n{INDENT}"


def extract_answer(task: str, text: str) -> str:
    """The first legal answer after "### Response:" (or in the whole text where that is absent); ""
    if there is none.

    An answer counts wherever it stands and in exactly this spelling: the rule of LLM-Adapters'
    scorer.
    """
    parts = text.split("### Response:")
    row = TASKS[task]
    found = [m.group() for m in re.finditer(row.answers, parts[1] if len(parts) > 1 else text)]
    if not found:
        return ""
    return found[0] if row.counts == "first" else found[-1]


def offered_answers(example: dict) -> set[str]:
    """What the instruction's last line, "Answer format: a/b", allows; empty where it has none."""
    match = re.search(r"Answer format: (\S+)\s*$", example["instruction"])
    return set(match[1].split("/")) if match else set()


# --- records --------------------------------------------------------------------------------------


def load_examples(path: str | Path, task: str | None = None) -> list[dict]:
    """Read and check records: a JSON list, or JSON Lines. Raises DataError naming file, record and
    field.

    task: a key of TASKS, for questions to be judged: each record then needs an answer that is legal
    for it, and no output.
    """
    path = Path(path)
    try:
        # "utf-8-sig" would count bytes from behind the BOM
        text = path.read_bytes().decode().removeprefix("\ufeff")
    except FileNotFoundError:
        paper = path.name.startswith("commonsense")
        hint = "; ./weights_download.sh data fetches the paper's records" if paper else ""
        raise DataError(f"{path}: no such file{hint}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder; name the file of records that is in it") from None
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 at byte {e.start}") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    examples = parse_lines(path, text) if text.lstrip().startswith("{") else parse(path, text)
    if not isinstance(examples, list) or not examples:
        raise DataError(f"{path}: expected a non-empty JSON list of records, or JSON Lines")
    for number, example in enumerate(examples, 1):
        problem = _problem(example, task)
        if problem:
            raise DataError(f"{path}: record {number}: {problem}")
    return examples


def parse(where: object, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not valid JSON ({e})") from None


def parse_lines(path: Path, text: str) -> list:
    """JSON Lines: an object a line."""
    lines = enumerate(text.split("\n"), 1)  # a string may hold what splitlines() takes for an end
    return [parse(f"{path}: line {number}", line) for number, line in lines if line.strip()]


def _problem(example: object, task: str | None) -> str | None:
    if not isinstance(example, dict):
        return f"expected an object, found {type(example).__name__}"
    needed = ("instruction", "answer") if task else ("instruction", "output")
    for field in ("instruction", "output", "answer", "input"):
        value = example.get(field)
        if field in needed and field not in example:
            found = ", ".join(map(str, example)) or "nothing"
            return f'no "{field}"; it has {found[:200]}'
        if value is None and field not in needed:
            continue
        if not isinstance(value, str):
            return f'"{field}" is {type(value).__name__}, expected text'
        if field in needed and not value.strip():
            return f'"{field}" is empty'
        if re.search("[\ud800-\udfff]", value):
            return f'"{field}" holds half of a surrogate pair, which no tokenizer can encode'
    if task and not re.fullmatch(TASKS[task].answers, example["answer"]):
        legal = TASKS[task].answers
        return f'"answer" is {example["answer"]!r}, which is not legal for {task} ({legal})'
    return None


def find_test_file(folder: str | Path, task: str) -> Path | None:
    """<task>/test.json, LLM-Adapters' layout, or <task>.json; None where there is neither."""
    for path in (Path(folder) / task / "test.json", Path(folder) / f"{task}.json"):
        if path.is_file():
            return path
    return None


# --- training batches -----------------------------------------------------------------------------


class Record(NamedTuple):
    ids: array  # BOS ... EOS, at most max_len of them
    split: int  # ids[split:] are learned: 1 for the whole text, the prompt's length for the answer
    number: int  # in the file, from 1


def encode_record(
    example: dict, tokenizer, max_len: int, loss: str = "all", style: str = "clean", number: int = 1
) -> tuple[Record | None, int]:
    """(record, tokens cut). Prompt and output are encoded together, as the model will meet them
    when it answers.

    The answer is never cut: a record that is too long loses tokens from the left of its
    instruction, and is dropped (None) if that is not enough. Raises DataError where the answer
    alone is to be learned and the prompt's ids are not a prefix of the whole's: no split between
    prompt and answer would be true.
    """
    head, rest = _prompt_parts(example, style, training=True)
    prompt = head + example["instruction"] + rest
    ids = tokenizer.encode(prompt + example["output"], bos=True, eos=True)
    prompt_ids = tokenizer.encode(prompt, bos=True, eos=False)
    if loss == "answer" and style == "clean" and ids[: len(prompt_ids)] != prompt_ids:
        raise DataError(
            f"record {number}: its output begins with {example['output'][:8]!r}, which makes a "
            "token with the prompt's end: begin it with a letter, or learn all (--loss all)"
        )
    cut = max(0, len(ids) - max_len)
    split = len(prompt_ids)
    if cut:
        begin = _shared(ids, tokenizer.encode(head, bos=True, eos=False))
        end = _shared(ids, tokenizer.encode(head + example["instruction"], bos=True, eos=False))
        if cut >= end - begin:
            return None, cut
        del ids[begin : begin + cut]
        split -= cut
    return Record(array("i", ids), split if loss == "answer" else 1, number), cut


def _shared(a: list[int], b: list[int]) -> int:
    """How many leading ids agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def encode_records(
    examples: list[dict],
    tokenizer,
    max_len: int,
    loss: str = "all",
    style: str = "clean",
    bar: Callable[[Iterable], Iterable] = iter,
) -> tuple[list[Record], int, int]:
    """(records, how many lost tokens, how many were dropped). Raises DataError if none is left."""
    records, cut, dropped = [], 0, 0
    for number, example in enumerate(bar(examples), 1):
        record, tokens = encode_record(example, tokenizer, max_len, loss, style, number)
        if record is None:
            dropped += 1
        else:
            records.append(record)
            cut += tokens > 0
    if not records:
        raise DataError(
            f"all {dropped} records are longer than --max-len {max_len} "
            "even without their instruction"
        )
    return records, cut, dropped


def split_validation(records: list, val_size: int) -> tuple[list, list]:
    """(training, validation). The split is the same for every seed: runs are then comparable."""
    if val_size >= len(records):
        raise DataError(
            f"--val-size {val_size} leaves nothing of {len(records)} records to train on; "
            "--val-size 0 holds none out"
        )
    held = set(random.Random(42).sample(range(len(records)), val_size))
    return ([r for i, r in enumerate(records) if i not in held], [records[i] for i in sorted(held)])


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n records in one epoch: of (seed, epoch) alone, so that a run can resume."""
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


class Batch(NamedTuple):
    """Rows laid end to end, without padding. targets[n] is the token after ids[n], or IGNORE."""

    ids: Tensor  # (N,)
    targets: Tensor  # (N,)
    lengths: list[int]

    @property
    def learned(self) -> int:
        """How many targets the loss counts."""
        return int((self.targets != IGNORE).sum())


def collate(records: list[Record]) -> Batch:
    ids, targets = array("i"), array("i")
    for r in records:
        ids.extend(r.ids[:-1])
        targets.extend([IGNORE] * (r.split - 1))
        targets.extend(r.ids[r.split :])
    as_tensor = lambda a: torch.tensor(a, dtype=torch.long)
    return Batch(as_tensor(ids), as_tensor(targets), [len(r.ids) - 1 for r in records])
