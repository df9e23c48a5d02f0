"""What every test needs: a tiny LLaMA, a tiny checkpoint folder in the true format, a little data.

Big enough to have heads, groups and layers, small enough for a laptop.
"""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import sentencepiece
import torch

import eval as judge
from data import PAPER_TASKS, format_prompt, load_tokenizer
from llama import Llama, LlamaConfig, save_llama

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # tensors this small are slower when two cores share them

SMALL = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64)


@pytest.fixture
def tiny() -> Llama:
    torch.manual_seed(0)
    return Llama(SMALL)


def shake(model: torch.nn.Module, size: float = 0.1) -> None:
    """Move every adapter off its starting point, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))


def real_data() -> Path:
    """The real records and tokenizers: $RORA_DATA, or the folder beside the checkout.

    Where there are none, the test is skipped and says so; where $CI is set, it fails.
    """
    folder = Path(os.environ.get("RORA_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "tokenizer.model").is_file():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"no real records in {folder}; set RORA_DATA"
        )
    return folder


ANSWERS = (
    "true/false",
    "solution1/solution2",
    "answer1/answer2/answer3/answer4/answer5",
    "ending1/ending2/ending3/ending4",
    "option1/option2",
)


def words(folder: Path):
    """A SentencePiece tokenizer of LLaMA's kind, of about 300 pieces, trained in a blink on the
    tasks' wording."""
    question = "Please answer the following question: is the sky blue? Answer format: "
    output = "the correct answer is true false"
    lines = []
    for answers in ANSWERS:
        lines += (format_prompt({"instruction": question + answers}) + output).split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    return load_tokenizer(folder)


def write_checkpoint(folder: Path, cfg: LlamaConfig = SMALL, tokenizer: Path | None = None) -> Path:
    """A random model in the true format: config.json, model.safetensors, tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        vocab_size = words(folder).vocab_size
    else:
        (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
        vocab_size = cfg.vocab_size
    torch.manual_seed(0)
    model = Llama(dataclasses.replace(cfg, vocab_size=vocab_size))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, 0, 0.02)
    save_llama(model, folder)
    return folder


def write_records(path: Path, n: int = 40) -> Path:
    """n records in the format of commonsense_170k.json: is one number larger than another?"""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(n):
        a, b = (7 * i + 3) % 10, (3 * i + 5) % 11
        answer = "true" if a > b else "false"
        instruction = (
            "Please answer the following question with true or false, "
            f"question: is {a} larger than {b}?{' please' * (i % 5)}\n\nAnswer format: true/false"
        )
        output = f"the correct answer is {answer}"
        records.append(
            {"instruction": instruction, "input": "", "output": output, "answer": answer}
        )
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory) -> Path:
    """A folder with a random base, toy/, and 7 questions of each of the eight tasks, tests/.

    Every other task lies in LLM-Adapters' layout, <task>/test.json, the rest in <task>.json.
    """
    folder = tmp_path_factory.mktemp("benchmark")
    write_checkpoint(folder / "toy")
    legal = {"piqa": "solution1", "hellaswag": "ending3", "winogrande": "option2"}
    for i, task in enumerate(PAPER_TASKS):
        name = f"{task}.json" if i % 2 else f"{task}/test.json"
        path = write_records(folder / "tests" / name, 7)
        if task != "boolq":
            answer = {"answer": legal.get(task, "answer2")}
            records = [record | answer for record in json.loads(path.read_text())]
            path.write_text(json.dumps(records))
    return folder


def score_base(benchmark: Path, out: Path, *flags: str) -> tuple[dict, dict[str, str]]:
    """Score the benchmark's base model into `out`. Returns (results.json, the files of answers)."""
    base, tests = str(benchmark / "toy"), str(benchmark / "tests")
    assert judge.main(["--ckpt", base, "--data", tests, "--out", str(out), *flags]) == 0
    answers = {path.name: path.read_text() for path in sorted(out.glob("*.jsonl"))}
    return json.loads((out / "results.json").read_text()), answers
