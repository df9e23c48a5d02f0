"""What `python eval.py` does around the judge: find the model, answer, keep and go on, --ask."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

import eval as judge
from data import (
    TASKS,
    DataError,
    Record,
    Task,
    collate,
    find_test_file,
    format_prompt,
    load_examples,
    offered_answers,
)
from llama import Llama, generate
from plumbing import memory, processes, run_folder
from plumbing.finding import (
    base_identity,
    find_adapter,
    find_tokenizer,
    load_base,
    read_run,
    refuse_strangers,
    run_of,
    tokenizer_identity,
)
from plumbing.flags import (
    DTYPES,
    FlagError,
    Parser,
    at_least,
    exit_code,
    find_data,
    find_device,
    find_dtype,
    naming_memory,
    row_of,
)
from plumbing.hf_files import CheckpointError, read_json
from plumbing.peft_files import adapter_file
from rora import load_adapter, loss_sum, merge

NEW_TOKENS = Task("").new_tokens
DECODE = f"greedy, {NEW_TOKENS} new tokens"  # a task with another number says so in its row

# --- answers ---------------------------------------------------------------------------------------


def answer_questions(
    model: Llama,
    tokenizer,
    task: str,
    examples: list[dict],
    file: Path,
    batch_size: int | None,
    style: str,
    stop: list[int],
) -> None:
    """Generate what `file` does not hold yet, a line a question: {"number", "prompt_tokens", "generation"}.

    Longest prompts first, so that rows of a batch are nearly equal and a lack of memory shows at once. Raises
    run_folder.Stopped after the batch in which a signal came; finished lines stay.
    """
    prompts = {i: judge.encode_question(e, tokenizer, style) for i, e in enumerate(examples)}
    batch_size = batch_size or fitting_batch(model, max(map(len, prompts.values())))
    done = read_generations(file)
    processes.wait()  # all have read the file before the first writes on
    todo = sorted(prompts.keys() - done.keys(), key=lambda i: (-len(prompts[i]), i))
    with (
        file.open("a", encoding="utf-8") as lines,
        tqdm(
            total=len(examples),
            initial=len(examples) - len(todo),
            desc=task,
            unit="question",
            disable=None if processes.first() else True,
        ) as bar,
    ):
        for start in range(0, len(todo), batch_size * processes.world()):
            batch = processes.share(todo[start : start + batch_size * processes.world()])
            size = len(batch) * question_bytes(
                model, max((len(prompts[i]) for i in batch), default=0)
            )
            with naming_memory(
                f"answering {len(batch)} questions of {task} at once, estimated at {size / 1e9:.2f} GB beside the model"
            ):
                answers = generate(
                    model, [prompts[i] for i in batch], TASKS[task].new_tokens, tokenizer.eos
                )
            rows = [
                {
                    "number": i + 1,
                    "prompt_tokens": len(prompts[i]),
                    "generation": tokenizer.decode(ids),
                }
                for i, ids in zip(batch, answers)
            ]
            for row in [row for part in processes.gathered(rows) or () for row in part]:
                lines.write(json.dumps(row) + "\n")
                bar.update()
            lines.flush()
            if processes.anyone(bool(stop), model.lm_head.weight.device):
                raise run_folder.Stopped(stop[0] if stop else 143)


def question_bytes(model: Llama, longest: int) -> int:
    """What one question takes: its cache, and the widest activations of the pass that fills it; fp32 at worst."""
    cfg = model.cfg
    cache = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * (longest + NEW_TOKENS)
    return 4 * (cache + longest * (3 * cfg.hidden_dim + 6 * cfg.dim))


def fitting_batch(model: Llama, longest: int) -> int:
    """How many questions fit into half of the free memory."""
    weight = model.embed_tokens.weight
    return max(
        1,
        min(
            512 if weight.is_cuda else 64,
            memory.available(weight.device) // 2 // question_bytes(model, longest),
        ),
    )


def read_generations(file: Path) -> dict[int, str]:
    """{index in the test file: text}. Drops from the file a last line that a crash cut short."""
    if not file.exists():
        return {}
    lines, found = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), {}
    for line in lines:
        try:
            row = json.loads(
                line if line.endswith("\n") else ""
            )  # the next answer would be written on behind it
            found[row["number"] - 1] = row["generation"]
        except (ValueError, KeyError, TypeError, RecursionError):
            if processes.first():
                run_folder.write_text(file, "".join(lines[: lines.index(line)]))
            break
    return found


# --- tables ----------------------------------------------------------------------------------------


def run_table(folders: list[Path]) -> str:
    """Markdown, a line a run; a dash where nothing was scored."""
    lines = [
        "| run | method | rank | seed | n | " + " | ".join(TASKS) + " | mean |",
        "|---|---|--:|--:|--:|" + "--:|" * (len(TASKS) + 1),
    ]
    for folder in folders:
        path = folder / "eval" / "results.json"
        if not path.is_file():
            print(f"note: {folder} has not been scored", file=sys.stderr)
            continue
        results = read_json(path)
        s = read_run(folder)["settings"] if (folder / "run.json").is_file() else {}
        try:
            method = "base" if results["adapter_sha256"] is None else s.get("method", "–")
            cells = [
                f"{results['tasks'][t]['accuracy']:.1f}" if t in results["tasks"] else "–"
                for t in TASKS
            ]
            mean = "–" if results["mean"] is None else f"{results['mean']:.1f}"
            n = sum(r["n"] for r in results["tasks"].values())
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(
                f"{path}: not as eval.py wrote it; python eval.py {folder} makes it again"
            ) from None
        lines.append(
            "| "
            + " | ".join(
                [
                    folder.name,
                    method,
                    *(str(s.get(k, "–")) for k in ("rank", "seed")),
                    str(n),
                    *cells,
                    mean,
                ]
            )
            + " |"
        )
    if len(lines) == 2:
        raise FlagError("none of these folders has been scored; python eval.py RUN does that")
    return "\n".join(lines)


# --- one question ----------------------------------------------------------------------------------


def ask(model: Llama, tokenizer, question: str, style: str) -> str:
    """The greedy answer to one question, its probability among the answers that the question's last line offers, and speed.

    The probability is that of the whole output, "the correct answer is X", renormalised over the answers offered.
    """
    e = {"instruction": question, "input": ""}
    prompt = format_prompt(e, style)
    ids = tokenizer.encode(prompt, bos=True, eos=False)
    began = time.perf_counter()
    said = generate(model, [ids], NEW_TOKENS, tokenizer.eos)[0]
    seconds = time.perf_counter() - began
    text = tokenizer.decode(said).strip() or "(nothing)"
    lines = [
        "".join(c if c.isprintable() else "?" for c in line) for line in text.split("\n")
    ]  # a base model says control characters, too
    if offered := sorted(offered_answers(e)):
        records = [
            Record(
                tokenizer.encode(prompt + f"the correct answer is {a}", bos=True, eos=True),
                len(ids),
                0,
            )
            for a in offered
        ]
        with torch.no_grad():
            scores = torch.tensor([-loss_sum(model, collate([r])).item() for r in records])
        chances = zip(scores.softmax(0).tolist(), offered)
        lines.append(", ".join(f"{a} {100 * p:.1f}%" for p, a in sorted(chances, reverse=True)))
    lines.append(
        f"{len(ids)} + {len(said)} tokens, {(len(ids) + len(said)) / seconds:,.0f} tokens/s"
    )
    return "\n    ".join(lines)


# --- command line ----------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(
        prog="eval.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="run folder, step folder, or PEFT folder; none: the base model of --ckpt",
    )
    parser.add_argument(
        "--ckpt", metavar="NAME", help="base checkpoint (default: what RUN was trained on)"
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of <task>/test.json or <task>.json (default: data; tiny: its own)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"default: all that --data has, of {', '.join(TASKS)}",
    )
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="only the first N questions a task"
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help="questions at once (default: what fits, at most 512)",
    )
    parser.add_argument(
        "--ask",
        nargs="?",
        const="",
        metavar="TEXT",
        help="answer this question, or, without TEXT, one after another; \\n is a new line; a last line 'Answer format: "
        "a/b' says what is offered",
    )
    parser.add_argument(
        "--prompt", choices=["clean", "dora"], help="default: the one RUN was trained with"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="cuda, cpu, mps (default: cuda if there is one)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on cuda, fp32 on cpu")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where answers and scores are kept (default: RUN/eval, or runs/<ckpt>-base/eval)",
    )
    parser.add_argument(
        "--table", nargs="+", metavar="RUN", help="print the scores of these runs and stop"
    )
    return parser


def find_tests(folder: str, tasks: list[str] | None, limit: int | None) -> dict[str, list[dict]]:
    """{task: its first `limit` questions}. Raises DataError or FlagError."""
    if unknown := set(tasks or ()) - TASKS.keys():
        raise FlagError(f"unknown task {min(unknown)}; choose from {', '.join(TASKS)}")
    if not Path(folder).is_dir():
        raise DataError(
            f"{folder}: no such folder; ./weights_download.sh data fetches the test sets, or give --data"
        )
    found = {task: find_test_file(folder, task) for task in TASKS if not tasks or task in tasks}
    if missing := [task for task, path in found.items() if path is None and tasks]:
        raise DataError(f"{folder}: neither {missing[0]}/test.json nor {missing[0]}.json in it")
    if not any(found.values()):
        raise DataError(
            f"{folder}: no <task>/test.json or <task>.json in it, for any of {', '.join(TASKS)}"
        )
    return {task: load_examples(path, task)[:limit] for task, path in found.items() if path}


def typed() -> Iterator[str]:
    """Questions from the keyboard or a pipe, until an empty line or the end of input."""
    prompt = "question (an empty line ends): " if sys.stdin.isatty() else ""
    try:
        yield from iter(lambda: input(prompt), "")
    except EOFError:
        print("\n" * bool(prompt), end="")


def open_model(
    folder: Path | None, ckpt: str, device: torch.device, dtype: str
) -> tuple[Llama, bool]:
    """(base with its adapter, whether that could be merged). A merged model answers faster; series, parallel and prefix
    stay applied."""
    if folder:
        refuse_strangers(folder, ckpt)
    model = load_base(ckpt, device, DTYPES[dtype])
    if folder is None:
        return model, False
    load_adapter(model, folder)
    try:
        merge(model)
    except ValueError:
        return model, False
    return model, True


def score(args: argparse.Namespace) -> int:
    if not args.run and not args.ckpt:
        raise FlagError("what shall be scored? Give a run folder, or --ckpt NAME for a base model")
    folder, ckpt = find_adapter(args.run, args.ckpt) if args.run else (None, args.ckpt)
    device = find_device(args.device)
    dtype = find_dtype(args.dtype, ckpt, device)
    trained = run_of(folder) if folder else None
    style = args.prompt or (read_run(trained)["settings"]["prompt"] if trained else "clean")
    if args.ask is not None:
        tokenizer = find_tokenizer(ckpt)
        model, _ = open_model(folder, ckpt, device, dtype)
        for question in [args.ask] if args.ask else typed():
            question = question.encode("utf-8", "replace").decode()  # half a character may come in
            print("    " + ask(model, tokenizer, question.replace("\\n", "\n"), style))
        return 0
    data = str(find_data(args.data or row_of(ckpt).tests))
    tests = find_tests(data, args.tasks, args.limit)
    tokenizer = find_tokenizer(ckpt)
    out = (
        Path(args.out)
        if args.out
        else (folder or Path("runs") / f"{Path(ckpt).name}-base") / "eval"
    )
    run_folder.check_writable(out)
    identity = {
        "adapter_sha256": run_folder.sha256(adapter_file(folder)) if folder else None,
        "base_sha256": base_identity(ckpt),
        "tokenizer_sha256": tokenizer_identity(ckpt),
        "decode": DECODE,
        "prompt": style,
        "dtype": dtype,
        **{f"{task}_sha256": run_folder.sha256(find_test_file(data, task)) for task in tests},
    }
    check_same(out, identity)
    model, merged = open_model(folder, ckpt, device, dtype)
    if folder and run_folder.sha256(adapter_file(folder)) != identity["adapter_sha256"]:
        raise run_folder.RunError(
            f"{folder} was replaced while it was read, by a training that still runs; score it again"
        )
    results = {
        "mean": None,
        "tasks": {},
        **identity,
        "data": str(data),
        "merged": merged,
        "limit": args.limit,
    }
    processes.wait()  # all have looked at the folder before the first writes there
    with (
        run_folder.lock(out) if processes.first() else nullcontext(),
        run_folder.stop_signals(alone=processes.world() == 1) as stop,
    ):
        if processes.first():
            run_folder.remove_debris(out)
            run_folder.write_json(out / "settings.json", check_same(out, identity))
            if (out / "results.json").is_file() and (before := read_json(out / "results.json")).get(
                "limit"
            ) == args.limit:
                results |= {
                    key: value
                    for key, value in before.items()
                    if key == "tasks" or key.endswith("_sha256")
                } | identity
        processes.wait()
        try:
            for task, examples in tests.items():
                file = out / f"{task}.jsonl"
                answer_questions(
                    model, tokenizer, task, examples, file, args.batch_size, style, stop
                )
                if not processes.first():
                    continue
                said = read_generations(file)
                for i, e in enumerate(examples):
                    e["generation"] = said[i]
                row = judge.score_task(task, examples)
                if TASKS[task].new_tokens != NEW_TOKENS:
                    row["new_tokens"] = TASKS[task].new_tokens
                scores = results["tasks"] | {task: row}  # with those of tasks scored before
                results["tasks"] = {t: scores[t] for t in TASKS if t in scores}
                results["mean"] = judge.mean(results["tasks"])
                run_folder.write_json(out / "results.json", results)
        except run_folder.Stopped as e:
            print("stopped; finished answers are kept; to go on: the same command again")
            return e.code
        if not processes.first():
            return 0
        table = judge.task_table(results["tasks"])
        title = f"{folder or ckpt + ' (base model)'}: {DECODE}, {style} prompt, {dtype}, {'merged' if merged else 'not merged'}"
        run_folder.write_text(out / "results.md", f"{title}\n\n{table}\n")
    shown: list[str] = []
    for good in (True, False):
        found = [judge.show_answer(task, examples, good) for task, examples in tests.items()]
        shown += [text for text in found if text][:2]
    print(
        "\n\n".join([*shown, table])
        + f"\n\n{title}\nsaved {out}/results.json; ± is one binomial standard error"
    )
    return 0


def check_same(out: Path, identity: dict) -> dict:
    """Refuse to mix scores of two adapters, prompts, precisions or test files in one folder. Returns old and new facts together."""
    path, before = out / "settings.json", {}
    if path.exists():
        before = read_json(path)
        if changed := [key for key in identity if identity[key] != before.get(key, identity[key])]:
            what = (
                "another adapter"
                if changed[0] == "adapter_sha256"
                else ", ".join(f"{k} {before.get(k)}" for k in changed)
            )
            raise run_folder.RunError(
                f"{out} holds scores of {what}; move or delete it to score anew"
            )
    elif any(out.glob("*.jsonl")):
        raise run_folder.RunError(
            f"{out} holds answers of unknown origin; move or delete it to score anew"
        )
    return before | identity


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see README. Never raises SystemExit."""

    def work() -> int:
        args = build_parser().parse_args(argv)
        if args.ask is not None and (
            stray := [
                k
                for k in ("data", "tasks", "limit", "batch_size", "out")
                if getattr(args, k) is not None
            ]
        ):
            raise FlagError(f"--{stray[0].replace('_', '-')} has no effect with --ask")
        if args.table:
            if stray := [k for k, v in vars(args).items() if v is not None and k != "table"]:
                raise FlagError(f"--table takes no {stray[0]}")
            print(run_table([Path(folder) for folder in args.table]))
            return 0
        with processes.joined():
            return score(args)

    return exit_code(work, "eval", "a smaller --batch-size, --dtype bf16, or --device cpu")
