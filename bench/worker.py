"""One measured thing in a process of its own, so that its peak memory is its own:
python bench/worker.py SPEC

SPEC and every turn are JSON objects. The process builds what SPEC names, says so in a line, and
then answers each line on its standard input, a turn, with a line: what was done and how long it
took. bench/turns.py is the other end.

Both sides get the same records, the same precision (a base of bf16 unless said, fp32 adapters),
fused AdamW and clipping. transformers + PEFT run as their documentation has it: SDPA attention (to
answer, eager attention beside it), right padding to the longest record of the batch with labels
-100 (left padding to generate), adapters kept in fp32; "autocast" is what Trainer(bf16=True) adds.
"""

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fast
import rora
from data import (
    TASKS,
    Record,
    collate,
    encode_records,
    epoch_order,
    find_test_file,
    format_prompt,
    load_examples,
    load_tokenizer,
)
from llama import Llama, LlamaConfig, compile_blocks, generate, load_llama, save_llama
from plumbing import jobs, memory
from plumbing.scoring import opening_tokens

SHAPES = {
    "toy": LlamaConfig(64, 2, 4, 4, 172),  # to see that all of it runs
    "small": LlamaConfig(512, 8, 8, 8, 1376),  # LLaMA-7B's proportions at an eighth of its width
    "wide": LlamaConfig(2048, 8, 16, 16, 5504),  # a gigabyte: for loading
    "small-135m": LlamaConfig(576, 30, 9, 3, 1536, 32000),  # launches, not products, take its step
    "llama-7b": LlamaConfig(),
    "llama-13b": LlamaConfig(5120, 40, 40, 40, 13824),
    "llama3-8b": LlamaConfig(4096, 32, 32, 8, 14336, 128256, 1e-5, 500000.0, 8192),
}
LR, ALPHA, NEW_TOKENS = 2e-4, 64, 32
Job = Callable[[dict], dict]  # a turn -> what was done in it

# --- the same work for both -----------------------------------------------------------------------


def config(spec: dict) -> LlamaConfig:
    cfg = SHAPES[spec["shape"]]
    return LlamaConfig(**{**vars(cfg), "n_layers": spec.get("layers", cfg.n_layers)})


def base_dtype(spec: dict) -> torch.dtype:
    return getattr(torch, spec.get("base_dtype", "bfloat16"))


def linear_weights(cfg: LlamaConfig) -> int:
    """N of the 4N FLOPs a token: all matrices that multiply, the head too, the embedding not."""
    kv = cfg.n_kv_heads * cfg.head_dim
    return (
        cfg.n_layers * cfg.dim * (2 * cfg.dim + 2 * kv + 3 * cfg.hidden_dim)
        + cfg.vocab_size * cfg.dim
    )


def real_data(cfg: LlamaConfig):
    """(folder, tokenizer)"""
    folder = Path(os.environ.get("RORA_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "train" / "commonsense_mini.json").is_file():
        sys.exit(
            f"bench: no train/commonsense_mini.json in {folder}: RORA_DATA must name the folder of "
            "records and tokenizers"
        )
    return folder, load_tokenizer(
        folder / ("llama3" if cfg.vocab_size > 32000 else "") / "tokenizer.model"
    )


def training_batches(cfg: LlamaConfig, n: int = 800) -> Callable[[dict], list[Record]]:
    """batch(turn): that round's records. Grouped: neighbours in length, as transformers'
    group_by_length makes them."""
    folder, tokenizer = real_data(cfg)
    examples = load_examples(folder / "train" / "commonsense_mini.json")
    shuffled = encode_records(
        [examples[i] for i in epoch_order(len(examples), 0, 0)[:n]], tokenizer, 256
    )[0]
    by_length = sorted(shuffled, key=lambda r: -len(r.ids))

    def batch(turn: dict) -> list[Record]:
        size, place = turn.get("records", 16), turn["round"]
        if turn.get("grouped"):
            place = random.Random(place).randrange(len(by_length) // size)
            return by_length[place * size : (place + 1) * size]
        return [shuffled[j % len(shuffled)] for j in range(place * size, (place + 1) * size)]

    return batch


def test_prompts(cfg: LlamaConfig, n: int) -> list[list[int]]:
    """n real questions, as many of every task there is, longest first."""
    folder, tokenizer = real_data(cfg)
    files = [(task, path) for task in TASKS if (path := find_test_file(folder / "eval", task))]
    examples = [
        e for task, path in files for e in load_examples(path, task)[: -(-n // len(files))]
    ][:n]
    return sorted(
        (tokenizer.encode(format_prompt(e), bos=True, eos=False) for e in examples),
        key=len,
        reverse=True,
    )


# --- ours -----------------------------------------------------------------------------------------


def our_model(spec: dict, device: torch.device) -> Llama:
    """Random weights, made where they are used."""
    with torch.device("meta"):
        model = Llama(config(spec)).to(base_dtype(spec))
    model.to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1) if "norm" in name else p.normal_(std=0.02)
    return model


def our_training(spec: dict, device: torch.device) -> Job:
    model, batch = our_model(spec, device), training_batches(config(spec))
    rora.attach(model, spec["method"], spec["rank"], ALPHA, spec["dropout"])
    model.train()
    if spec.get("compile"):
        compile_blocks(model)
    optimizer = rora.new_optimizer(model, LR)
    recomputed = {"none": 0, "all": len(model.layers)}
    if (
        spec.get("recompute") == "auto"
    ):  # as rora.py does, with room for larger batches than the first
        plan = memory.plan(model, collate(batch({"round": 0})), fast.logit_bytes(device))
        recomputed["auto"] = plan.fewest_recomputed(int(0.8 * memory.available(device)))

    def step(turn: dict) -> dict:
        records = batch(turn)
        rora.train_step(
            model, records, optimizer, LR, len(records), recomputed[spec.get("recompute", "none")]
        )
        optimizer.zero_grad()
        return {"tokens": sum(len(r.ids) for r in records)}

    return step


def our_answers(spec: dict, device: torch.device) -> Job:
    model = (
        load_llama(spec["folder"], device, base_dtype(spec))
        if "folder" in spec
        else our_model(spec, device)
    ).eval()
    prompts, n, new = (
        test_prompts(model.cfg, spec["questions"]),
        spec["batch"],
        spec.get("new", NEW_TOKENS),
    )

    def answer(turn: dict) -> dict:
        for i in range(0, len(prompts), n):
            answers = generate(
                model, prompts[i : i + n], new, eos=-1
            )  # no token is -1: every row runs to the end
            assert all(len(a) == new for a in answers)
        return {"questions": len(prompts)}

    return answer


# --- transformers + PEFT --------------------------------------------------------------------------


def padded(rows: list, side: str, fill: int, device: torch.device) -> torch.Tensor:  # -> (B, T)
    T = max(map(len, rows))
    fills = [[fill] * (T - len(r)) for r in rows]
    return torch.tensor(
        [[*f, *r] if side == "left" else [*r, *f] for f, r in zip(fills, rows)], device=device
    )


def mask(rows: list, side: str, device: torch.device) -> torch.Tensor:  # -> (B, T)
    return padded([[1] * len(r) for r in rows], side, 0, device)


def their_model(spec: dict, device: torch.device):
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"dtype": base_dtype(spec), "attn_implementation": spec.get("attention", "sdpa")}
    if "folder" in spec:
        return AutoModelForCausalLM.from_pretrained(spec["folder"], **options).to(device)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config(spec).to_json(base_dtype(spec))), **options
        )


def their_training(spec: dict, device: torch.device) -> Job:
    batch = training_batches(config(spec))
    train, _ = their_step(spec, their_model(spec, device), device)

    def step(turn: dict) -> dict:
        records = batch(turn)
        padded_tokens = train(records)
        return {"tokens": sum(len(r.ids) for r in records), "padded": padded_tokens}

    return step


def their_step(spec: dict, base, device: torch.device):
    """(a step on a list of records, which says how many tokens it computed; the PEFT model)."""
    from peft import LoraConfig, get_peft_model

    if spec.get("recompute"):
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(
        base,
        LoraConfig(
            r=spec["rank"],
            lora_alpha=ALPHA,
            lora_dropout=spec["dropout"],
            target_modules=list(rora.LoRALinear.targets),
            task_type="CAUSAL_LM",
            use_rslora=spec["method"] == "rora",
            use_dora=spec["method"] == "dora",
        ),
    ).train()
    params = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in params} == {torch.float32}
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=True)

    def step(records: list[Record]) -> int:
        rows = [r.ids for r in records]
        ids, labels = (padded(rows, "right", fill, device) for fill in (0, -100))
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(spec.get("autocast"))):
            loss = model(
                input_ids=ids,
                attention_mask=mask(rows, "right", device),
                labels=labels,
                use_cache=False,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()  # waits for the device, as ours does
        return ids.numel()

    return step, model


def their_answers(spec: dict, device: torch.device) -> Job:
    model, prompts, n = (
        their_model(spec, device).eval(),
        test_prompts(config(spec), spec["questions"]),
        spec["batch"],
    )
    model.generation_config.eos_token_id, new = (
        None,
        spec.get("new", NEW_TOKENS),
    )  # every row runs to the end
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
    options |= {"cache_implementation": "static"} if spec.get("static") else {}

    def answer(turn: dict) -> dict:
        for rows in (prompts[i : i + n] for i in range(0, len(prompts), n)):
            ids = padded(rows, "left", 0, device)
            out = model.generate(ids, attention_mask=mask(rows, "left", device), **options)
            assert out.shape == (len(rows), ids.size(1) + new)
        return {"questions": len(prompts)}

    return answer


# --- the embedded model, scored by both -----------------------------------------------------------


def embedded_batches(limit: int | None) -> tuple[list[list[list[int]]], list[int], int]:
    """(its test questions, task after task in batches of 64, longest first; the opening as a draft;
    the end token)."""
    tokenizer, batches = load_tokenizer(ROOT / "tiny"), []
    for task in TASKS:
        examples = load_examples(find_test_file(ROOT / "tiny" / "data", task), task)[:limit]
        prompts = [tokenizer.encode(format_prompt(e), bos=True, eos=False) for e in examples]
        prompts.sort(key=len, reverse=True)
        batches += [prompts[i : i + 64] for i in range(0, len(prompts), 64)]
    return batches, opening_tokens(tokenizer, examples[0], "clean"), tokenizer.eos


def scored(answer: Callable[[list[list[int]]], list[list[int]]], batches: list) -> Job:
    def turn(_: dict) -> dict:
        said = [ids for prompts in batches for ids in answer(prompts)]
        return {"questions": len(said), "said": hashlib.sha256(repr(said).encode()).hexdigest()}

    return turn


def our_scoring(spec: dict, device: torch.device) -> Job:
    model = load_llama(spec["folder"], device, torch.float32).eval()
    batches, draft, eos = embedded_batches(spec["limit"])
    return scored(lambda prompts: generate(model, prompts, NEW_TOKENS, eos, draft), batches)


def their_scoring(spec: dict, device: torch.device) -> Job:
    model = their_model({**spec, "base_dtype": "float32"}, device).eval()
    batches, _, eos = embedded_batches(spec["limit"])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 0

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        ids = padded(prompts, "left", 0, device)
        seen = mask(prompts, "left", device)
        out = model.generate(ids, attention_mask=seen, do_sample=False, max_new_tokens=NEW_TOKENS)
        rows = out[:, ids.size(1) :].tolist()
        return [row[: row.index(eos)] if eos in row else row for row in rows]

    return scored(answer, batches)


# --- beside them ----------------------------------------------------------------------------------


def loading(spec: dict, device: torch.device) -> Job:
    if spec["job"] == "peft load":
        import transformers  # noqa: F401  the import is not the load
    load = {
        "ours load": lambda: load_llama(spec["folder"], device),
        "peft load": lambda: their_model(spec, device),
    }[spec["job"]]

    def once(turn: dict) -> dict:
        sizes = [p.nbytes / 1e6 for p in load().parameters()]
        return {"model_mb": sum(sizes), "largest_tensor_mb": max(sizes)}

    return once


def writing(spec: dict, device: torch.device) -> Job:
    """A folder for both sides: a random base, with a trained-looking adapter merged in where a rank
    is given."""

    def once(turn: dict) -> dict:
        model = our_model(spec, device)
        if "rank" in spec:
            rora.attach(model, "rora", spec["rank"], ALPHA)
            for p in rora.trainable(model).values():
                p.detach().normal_(std=0.01)
            rora.merge(model)
        save_llama(model.to(getattr(torch, spec["dtype"])), spec["folder"])
        return {}

    return once


def product(spec: dict, device: torch.device) -> Job:
    """The rate that steps are compared with: large square products in bf16."""
    a, b = torch.randn(2, spec["n"], spec["n"], device=device).to(base_dtype(spec))
    return lambda turn: {"flops": sum(2 * spec["n"] * (a @ b).numel() for _ in range(10))}


JOBS = {
    "ours train": our_training,
    "peft train": their_training,
    "ours answer": our_answers,
    "peft answer": their_answers,
    "ours score": our_scoring,
    "peft score": their_scoring,
    "ours load": loading,
    "peft load": loading,
    "write": writing,
    "product": product,
}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print; the other end reads JSON
    spec = json.loads(sys.argv[1])
    device = torch.device(spec.get("device", "cpu"))
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else "cpu"
    host = lambda: jobs.peak_memory(torch.device("cpu")) / 1e6
    peak = lambda: torch.cuda.max_memory_allocated() / 1e6 if cuda else host()
    wait = torch.cuda.synchronize if cuda else lambda: None
    clock = time.process_time if spec.get("clock") == "cpu" else time.perf_counter
    say = lambda **facts: print(json.dumps(facts), file=answers, flush=True)
    if "peft" in spec["job"]:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    torch.manual_seed(0)
    job = JOBS[spec["job"]](spec, device)
    say(
        threads=torch.get_num_threads(),
        device=name,
        built_mb=peak(),
        host_mb=host(),
        linear_weights=linear_weights(config({"shape": "small", **spec})),
    )
    for line in sys.stdin:
        wait()
        began = clock()
        done = job(json.loads(line))
        wait()
        say(seconds=clock() - began, peak_mb=peak(), host_mb=host(), **done)


if __name__ == "__main__":
    main()
