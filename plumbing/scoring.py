"""What `python eval.py` does around the judge: find the model, answer, keep and go on, --ask."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

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
    read_scores,
    refuse_strangers,
    run_of,
    tokenizer_identity,
)
from plumbing.flags import (
    DTYPES,
    PROMPTS,
    FlagError,
    Parser,
    Settings,
    at_least,
    exit_code,
    find_checkpoint,
    find_data,
    find_device,
    find_dtype,
    names,
    naming_memory,
    row_of,
    short_name,
)
from plumbing.hf_files import read_json
from plumbing.peft_files import adapter_file
from plumbing.plots import plot_runs
from rora import load_adapter, loss_sum, merge

NEW_TOKENS = Task("").new_tokens
DRAFTED = 8  # tokens that speak at once behind a draft, at most: OPENING's and the next
DECODE = f"greedy, {NEW_TOKENS} new tokens"  # a task with another number says so in its row
OPENING = "the correct answer is"  # how the records' outputs begin, and a trained model's answers

# --- answers --------------------------------------------------------------------------------------


def answer_questions(
    model: Llama,
    tokenizer,
    task: str,
    examples: list[dict],
    file: Path,
    batches: "Batches",
    style: str,
    stop: list[int],
) -> None:
    """Generate what `file` does not hold yet, a line a question: {"number", "prompt_tokens",
    "generation"}.

    Longest prompts first, so that rows of a batch are nearly equal and a lack of memory shows at
    once. Raises run_folder.Stopped after the batch in which a signal came; finished lines stay.
    """
    prompts = {i: judge.encode_question(e, tokenizer, style) for i, e in enumerate(examples)}
    longest = max(map(len, prompts.values()))
    if longest + TASKS[task].new_tokens > model.cfg.max_positions:
        print(
            f"note: the longest question of {task} has {longest} tokens; with its answer that is "
            f"beyond the {model.cfg.max_positions} positions that this model was made for"
        )
    draft = [] if batches.exact else opening_tokens(tokenizer, examples[0], style)
    done = read_generations(file)
    processes.wait()  # all have read the file before the first writes on
    todo = sorted(prompts.keys() - done.keys(), key=lambda i: (-len(prompts[i]), i))
    progress = Progress(task, len(examples), len(todo))
    with file.open("a", encoding="utf-8") as lines, progress.bar:
        while todo:
            first = len(prompts[todo[0]])
            rows_here = batches.rows(model, first, TASKS[task].new_tokens)
            together = rows_here * processes.world()
            batch, todo = processes.share(todo[:together]), todo[together:]
            answers = answer_batch(model, task, [prompts[i] for i in batch], tokenizer.eos, draft)
            rows = []
            for i, ids in zip(batch, answers):
                said = tokenizer.decode(ids)
                rows.append({"number": i + 1, "prompt_tokens": len(prompts[i]), "generation": said})
            for part in processes.gathered(rows) or ():
                for row in part:
                    lines.write(json.dumps(row) + "\n")
                progress.update(len(part))
            lines.flush()
            if processes.anyone(bool(stop), model.lm_head.weight.device):
                raise run_folder.Stopped(stop[0] if stop else 143)


class Batches(NamedTuple):
    """How many questions are answered at once.

    In bf16 a product's last bit depends on how many rows it has, and so, where two tokens nearly
    tie, does the greedy one: a score may differ by a question or two with the batches. exact: each
    question alone, which no other question and no --batch-size can touch. In fp32 no difference was
    seen.
    """

    exact: bool
    most: int | None  # --batch-size; None: what fits
    room: float  # bytes

    @classmethod
    def of(cls, args: argparse.Namespace, device: torch.device) -> "Batches":
        """With the memory there is now: all that is free but a part for what is not counted."""
        room = memory.available(device) * (0.8 if device.type == "cuda" else 0.5)
        room = processes.total(room, device) / processes.world()  # all must cut alike
        return cls(bool(args.exact), 1 if args.exact else args.batch_size, room)

    def rows(self, model: Llama, longest: int, new_tokens: int = NEW_TOKENS) -> int:
        """Questions in a batch whose longest has so many tokens: places in the cache are counted,
        not questions, so that one long prompt does not decide for all."""
        if self.most:
            return self.most
        most = 512 if model.lm_head.weight.is_cuda else 64
        return max(1, min(most, int(self.room // question_bytes(model, longest, new_tokens))))

    def words(self) -> str:
        if self.exact:
            return "each question alone"
        return f"batches of {self.most}" if self.most else "batches of what fits"


def opening_tokens(tokenizer, example: dict, style: str) -> list[int]:
    """What OPENING adds to a prompt: every answer's draft, kept where the model says it too."""
    prompt = format_prompt(example, style)
    before = tokenizer.encode(prompt, bos=True, eos=False)
    whole = tokenizer.encode(prompt + OPENING, bos=True, eos=False)
    return whole[len(before) :] if whole[: len(before)] == before else []


def answer_batch(
    model: Llama, task: str, prompts: list[list[int]], eos: int, draft: list[int]
) -> list[list[int]]:
    longest, new_tokens = max(map(len, prompts), default=0), TASKS[task].new_tokens
    size = len(prompts) * question_bytes(model, longest, new_tokens)
    doing = f"answering {len(prompts)} questions of {task} at once"
    with naming_memory(f"{doing}, estimated at {size / 1e9:.2f} GB beside the model"):
        return generate(model, prompts, new_tokens, eos, draft)


class Progress:
    """A bar; where nobody watches one, a line a minute, with the time to go."""

    def __init__(self, task: str, number: int, todo: int):
        self.task, self.number, self.todo, self.done = task, number, todo, 0
        self.began = self.last = time.monotonic()
        none = None if processes.first() else True
        already = number - todo
        self.bar = tqdm(total=number, initial=already, desc=task, unit="question", disable=none)

    def update(self, answered: int) -> None:
        self.done += answered
        self.bar.update(answered)
        now = time.monotonic()
        if self.bar.disable and self.done and now - self.last >= EVERY:
            self.last = now
            minutes = (self.todo - self.done) / self.done * (now - self.began) / 60
            answers = f"{self.number - self.todo + self.done} of {self.number} answers"
            print(f"{self.task}: {answers}, {minutes:.0f} min to go", flush=True)


EVERY = 60  # seconds between two lines


def question_bytes(model: Llama, longest: int, new_tokens: int = NEW_TOKENS) -> int:
    """What one question takes: its cache, the widest activations of the pass that fills it, and the
    logits behind a draft, in the base's dtype and in fp32."""
    cfg, size = model.cfg, model.lm_head.weight.element_size()
    cache = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * (longest + new_tokens)
    wide = size if model.lm_head.weight.is_cuda else 4  # a CPU computes attention in fp32
    logits = DRAFTED * cfg.vocab_size * (size + 4)
    return size * cache + wide * longest * (3 * cfg.hidden_dim + 6 * cfg.dim) + logits


def read_generations(file: Path) -> dict[int, str]:
    """{index in the test file: text}. Drops from the file a last line that a crash cut short."""
    found: dict[int, str] = {}
    if not file.exists():
        return found
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for n, line in enumerate(lines):
        try:
            # without its end, the next answer would be written on behind it
            row = json.loads(line if line.endswith("\n") else "")
            found[row["number"] - 1] = row["generation"] + ""  # text, or it is damaged
        except (ValueError, KeyError, TypeError, RecursionError):
            if processes.first():
                run_folder.write_text(file, "".join(lines[:n]))
            break
    return found


# --- tables ---------------------------------------------------------------------------------------

COLUMNS = ("run", "method", "rank", "α", "s", "lr", "seed", "steps", "n")


def run_table(folders: list[Path]) -> str:
    """Markdown, a line per run; a dash where nothing was scored, or of something else. ± is one
    binomial standard error of the mean."""
    numbers = len(COLUMNS) - 2 + len(TASKS) + 2
    lines = [
        "| " + " | ".join([*COLUMNS, *TASKS, "mean", "±"]) + " |",
        "|---|---|" + "--:|" * numbers,
    ]
    for folder in folders:
        results = read_scores(folder)
        if results is None:
            print(f"note: {folder} has not been scored", file=sys.stderr)
            continue
        lines.append("| " + " | ".join(table_row(folder, results)) + " |")
    if len(lines) == 2:
        raise FlagError("none of these folders has been scored; python eval.py RUN does that")
    return "\n".join(lines)


def table_row(folder: Path, results: dict) -> list[str]:
    tasks, base = results["tasks"], results["adapter_sha256"] is None
    facts = ["base", *"–" * 6] if base else training_facts(folder)
    n = sum(row["n"] for row in tasks.values())
    scores = []
    for task in TASKS:
        row = tasks.get(task)
        scores.append(f"{100 * row['correct'] / row['n']:.1f}" if row else "–")
    for value in (judge.mean(tasks), judge.mean_error_bar(tasks)):
        scores.append("–" if value is None else f"{value:.1f}")
    return [folder.name, *facts, str(n) if tasks else "–", *scores]


def training_facts(folder: Path) -> list[str]:
    """Method, rank, α, s, lr, seed and steps of the run that an adapter is of."""
    run = run_of(folder)
    if run is None:
        return ["–"] * 7
    run_json = read_run(run)
    settings = Settings.from_json(run_json["settings"])
    scale = run_json.get("effective_scale")
    return [
        settings.label,
        str(settings.rank),
        "–" if settings.alpha is None else f"{settings.alpha:g}",
        "–" if scale is None else f"{scale:.4g}",
        f"{settings.lr:g}",
        str(settings.seed),
        steps_words(folder, run, run_json),
    ]


def steps_words(folder: Path, run: Path, run_json: dict) -> str:
    """12, or, of an adapter from before the end, "5 of 12" and whether the run goes that far."""
    steps = run_json.get("steps", "?")
    if run != folder:  # one of its checkpoints/step-*
        return f"{int(folder.name.rpartition('-')[2])} of {steps}"
    if run_json["finished"]:
        return str(steps)
    return f"unfinished: {run_json.get('best_step')} of {steps}"


# --- one question ---------------------------------------------------------------------------------


def ask(model: Llama, tokenizer, question: str, style: str) -> str:
    """The greedy answer to one question, its probability among the answers that the question's last
    line offers, and speed.

    The probability is that of the whole output, "the correct answer is X", renormalised over the
    answers offered.
    """
    e = {"instruction": question, "input": ""}
    prompt = format_prompt(e, style)
    ids = tokenizer.encode(prompt, bos=True, eos=False)
    began = time.perf_counter()
    said = generate(model, [ids], NEW_TOKENS, tokenizer.eos)[0]
    seconds = time.perf_counter() - began
    text = tokenizer.decode(said).strip() or "(nothing)"
    # a base model says control characters, too
    lines = ["".join(c if c.isprintable() else "?" for c in line) for line in text.split("\n")]
    if offered := sorted(offered_answers(e)):
        scores = []
        for answer in offered:
            whole = tokenizer.encode(f"{prompt}{OPENING} {answer}", bos=True, eos=True)
            with torch.no_grad():
                scores.append(-loss_sum(model, collate([Record(whole, len(ids), 0)])).item())
        chances = zip(torch.tensor(scores).softmax(0).tolist(), offered)
        lines.append(", ".join(f"{a} {100 * p:.1f}%" for p, a in sorted(chances, reverse=True)))
    count = len(ids) + len(said)
    lines.append(f"{len(ids)} + {len(said)} tokens, {count / seconds:,.0f} tokens/s")
    return "\n    ".join(lines)


# --- command line ---------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(
        prog="eval.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Score a run, a PEFT adapter or a base model on the tasks' test questions.",
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
        "--exact",
        action="store_true",
        default=None,
        help="each question alone: in bf16, scores that no batch can touch; several times slower",
    )
    parser.add_argument(
        "--ask",
        nargs="?",
        const="",
        metavar="TEXT",
        help="answer this question, or, without TEXT, one after another; \\n is a new line; a last "
        "line 'Answer format: a/b' says what is offered",
    )
    parser.add_argument("--prompt", choices=PROMPTS, help="default: the one RUN was trained with")
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
    parser.add_argument(
        "--plot",
        nargs="+",
        metavar="RUN",
        help="draw the curves and scores of these runs into --out FILE (default: metrics.png in "
        "the first of them), and stop",
    )
    return parser


def find_tests(
    folder: str, tasks: Sequence[str] | None, limit: int | None
) -> dict[str, list[dict]]:
    """{task: its first `limit` questions}. Raises DataError or FlagError."""
    tasks = names(tasks) if tasks else None
    if unknown := set(tasks or ()) - TASKS.keys():
        raise FlagError(f"unknown task {min(unknown)}; choose from {', '.join(TASKS)}")
    if not Path(folder).is_dir():
        raise DataError(
            f"{folder}: no such folder; ./weights_download.sh data fetches the test sets, or give "
            "--data"
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
        print("\n" if prompt else "", end="")


class Asked(NamedTuple):
    """Who is asked, and how."""

    folder: Path | None  # of the adapter; None: the base model
    run: Path | None  # that it is of
    ckpt: str
    device: torch.device
    dtype: str
    style: str


def who_is_asked(args: argparse.Namespace) -> Asked:
    if not args.run and not args.ckpt:
        raise FlagError("what shall be scored? Give a run folder, or --ckpt NAME for a base model")
    folder, ckpt = find_adapter(args.run, args.ckpt) if args.run else (None, args.ckpt)
    find_checkpoint(ckpt)  # or it is said that there is none
    device = find_device(args.device)
    run = run_of(folder) if folder else None
    style = args.prompt or (read_run(run)["settings"]["prompt"] if run else "clean")
    return Asked(folder, run, ckpt, device, find_dtype(args.dtype, ckpt, device), style)


def open_model(asked: Asked) -> tuple[Llama, bool]:
    """(base with its adapter, whether that could be merged). A merged model answers faster; what is
    no change of a weight matrix stays applied."""
    if asked.folder:
        refuse_strangers(asked.folder, asked.ckpt)
    model = load_base(asked.ckpt, asked.device, DTYPES[asked.dtype])
    if asked.folder is None:
        return model, False
    load_adapter(model, asked.folder)
    try:
        merge(model)
    except ValueError:
        return model, False
    return model, True


def ask_all(args: argparse.Namespace) -> int:
    asked = who_is_asked(args)
    tokenizer = find_tokenizer(asked.ckpt)
    model, _ = open_model(asked)
    for question in [args.ask] if args.ask else typed():
        question = question.encode("utf-8", "replace").decode()  # half a character may come in
        print("    " + ask(model, tokenizer, question.replace("\\n", "\n"), asked.style))
    return 0


def score(args: argparse.Namespace) -> int:
    """Answer all questions that have no answer yet, and count."""
    asked = who_is_asked(args)
    folder, ckpt = asked.folder, asked.ckpt
    named = args.data or row_of(ckpt).tests
    data = str(find_data(named))
    tests = find_tests(data, args.tasks, args.limit)
    tokenizer = find_tokenizer(ckpt)
    out = (folder or Path("runs") / f"{short_name(ckpt)}-base") / "eval"
    if args.out:
        out = Path(args.out)
    run_folder.check_writable(out)
    identity = {
        "adapter_sha256": run_folder.sha256(adapter_file(folder)) if folder else None,
        "base_sha256": base_identity(ckpt),
        "tokenizer_sha256": tokenizer_identity(ckpt),
        "decode": DECODE,
        "prompt": asked.style,
        "dtype": asked.dtype,
        "exact": bool(args.exact),
    }
    for task in tests:
        identity[f"{task}_sha256"] = run_folder.sha256(find_test_file(data, task))
    check_same(out, identity)
    model, merged = open_model(asked)
    if folder and run_folder.sha256(adapter_file(folder)) != identity["adapter_sha256"]:
        raise run_folder.RunError(
            f"{folder} was replaced while it was read, by a training that still runs; score it "
            "again"
        )
    batches = Batches.of(args, asked.device)
    facts = {"data": named, "merged": merged, "limit": args.limit, "batches": batches.words()}
    results = {"mean": None, "tasks": {}, **identity, **facts}
    title = title_of(asked, merged)
    processes.wait()  # all have looked at the folder before the first writes there
    with (
        run_folder.lock(out) if processes.first() else nullcontext(),
        run_folder.stop_signals(alone=processes.world() == 1) as stop,
    ):
        if processes.first():
            run_folder.remove_debris(out)
            run_folder.write_json(out / "settings.json", check_same(out, identity))
            scored, fuller = scored_before(out, args.limit)
            results |= scored | identity
        processes.wait()
        try:
            for task, examples in tests.items():
                file = out / f"{task}.jsonl"
                answer_questions(model, tokenizer, task, examples, file, batches, asked.style, stop)
                if processes.first():
                    count_answers(task, examples, read_generations(file), results)
                    if not fuller:
                        run_folder.write_json(out / "results.json", results)
        except run_folder.Stopped as e:
            print("stopped; finished answers are kept; to go on: the same command again")
            return e.code
        if processes.first():
            table, saved = judge.task_table(results["tasks"]), f"saved {out}/results.json"
            if fuller:
                saved = f"not saved: {out}/results.json has the scores of {fuller}"
            else:
                run_folder.write_text(out / "results.md", f"{title}\n\n{table}\n")
            show(tests, table, f"{title}\n{saved}")
    return 0


def scored_before(out: Path, limit: int | None) -> tuple[dict, str | None]:
    """(the scores of other tasks in this folder, if they are of as many questions; of how many they
    are, if of more than `limit`)."""
    path = out / "results.json"
    before = read_json(path) if path.is_file() else {}
    most = before.get("limit")
    if most == limit:
        kept = {k: v for k, v in before.items() if k == "tasks" or k.endswith("_sha256")}
        return kept, None
    if limit and before.get("tasks") and most is None:
        return {}, "all questions"
    fuller = limit and before.get("tasks") and isinstance(most, int) and most > limit
    return {}, f"{most} questions a task" if fuller else None


def count_answers(task: str, examples: list[dict], said: dict[int, str], results: dict) -> None:
    for i, e in enumerate(examples):
        e["generation"] = said[i]
    row = judge.score_task(task, examples)
    if TASKS[task].new_tokens != NEW_TOKENS:
        row["new_tokens"] = TASKS[task].new_tokens
    scores = results["tasks"] | {task: row}  # with those of tasks scored before
    results["tasks"] = {t: scores[t] for t in TASKS if t in scores}
    results["mean"] = judge.mean(results["tasks"])


def title_of(asked: Asked, merged: bool) -> str:
    what = f"{asked.folder}" if asked.folder else f"{asked.ckpt} (base model)"
    if asked.folder and asked.run:
        run_json = read_run(asked.run)
        if not run_json["finished"]:
            what += f" ({steps_words(asked.folder, asked.run, run_json)})"
    how = "merged" if merged else "not merged"
    return f"{what}: {DECODE}, {asked.style} prompt, {asked.dtype}, {how}"


def show(tests: dict[str, list[dict]], table: str, below: str) -> None:
    shown: list[str] = []
    for good in (True, False):
        found = [judge.show_answer(task, examples, good) for task, examples in tests.items()]
        shown += [text for text in found if text][:2]
    print("\n\n".join([*shown, table]))
    print(f"\n{below}; ± is one binomial standard error")


def check_same(out: Path, identity: dict) -> dict:
    """Refuse to mix scores of two adapters, prompts, precisions or test files in one folder.
    Returns old and new facts together."""
    path = out / "settings.json"
    before = read_json(path) if path.exists() else {}
    if before:
        before.setdefault("exact", False)  # not asked for before there was --exact
    advice = "choose another --out, or move or delete it to score anew"
    if not before and any(out.glob("*.jsonl")):
        raise run_folder.RunError(f"{out} holds answers of unknown origin; {advice}")
    if changed := [key for key in identity if identity[key] != before.get(key, identity[key])]:
        what = other_words(changed, before)
        raise run_folder.RunError(f"{out} holds scores {what}; {advice}")
    return before | identity


def other_words(changed: list[str], before: dict) -> str:
    """What these keys of settings.json, which are not as they were, mean to a user."""
    files = [key.removesuffix("_sha256") for key in changed if key.endswith("_sha256")]
    if files and files[0] not in TASKS:
        return f"of another {files[0]}"  # adapter, base, tokenizer
    if files:
        return f"of another test file for {', '.join(files)}"
    if changed[0] == "exact":
        return ("with" if before["exact"] else "without") + " --exact"
    return "with " + ", ".join(f"{key} {before.get(key)}" for key in changed)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see README. Never raises SystemExit."""

    def work() -> int:
        args = build_parser().parse_args(argv)
        given = [name for name, value in vars(args).items() if value is not None]
        for job, others in {"table": (), "plot": ("out",)}.items():
            stray = [name for name in given if name not in (job, *others)]
            if job in given and stray:
                raise FlagError(f"--{job} takes no --{stray[0].replace('_', '-')}")
        if args.table:
            print(run_table([Path(folder) for folder in args.table]))
            return 0
        if args.plot:
            out = Path(args.out) if args.out else None
            print(f"saved {plot_runs([Path(folder) for folder in args.plot], out)}")
            return 0
        if args.ask is not None:
            for name in ("data", "tasks", "limit", "batch_size", "exact", "out"):
                if name in given:
                    raise FlagError(f"--{name.replace('_', '-')} has no effect with --ask")
        if args.exact and args.batch_size:
            raise FlagError("--exact answers each question alone: --batch-size has no effect")
        with processes.joined():
            return score(args) if args.ask is None else ask_all(args)

    return exit_code(work, "eval", "a smaller --batch-size, --dtype bf16, or --device cpu")
