"""Every command that a page shows is one that the programs take, and something runs each program.

A command is found in a code block and between backticks. What it names is looked for in RUN_BY, and
its flags go through the program's own parser. A page that names a program which has no row here
turns this red: say what runs it, or that it wants a GPU or the hub.
"""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from plumbing.checkpoints import CHECKPOINTS
from plumbing.flags import resolve

PAGES = [
    *("README.md", "CONTRIBUTING.md", "lessons/README.md", "lessons/class/README.md"),
    *("tiny/README.md", "exercises/README.md", "bench/README.md"),
]
RUN_BY = {  # a program: the file that runs it, with small settings
    "rora.py": "tests/guarantees/test_resume.py",
    "eval.py": "tests/guarantees/test_scoring.py",
    "lessons/sweep.py": "tests/guarantees/test_sweep.py",
    "lessons/plot.py": "tests/guarantees/test_class.py",
    "lessons/findings.py": "tests/guarantees/test_sweep.py",
    "lessons/details.py": "tests/guarantees/test_sweep.py",
    "lessons/tables.py": "tests/test_paper_tables.py",
    "lessons/derivation.py": "tests/test_derivation.py",
    "lessons/prune.py": "tests/guarantees/test_pruning.py",
    "lessons/real_text.py": "tests/test_derivation.py",
    "lessons/real_model.py": "tests/guarantees/test_real_model.py",
    "lessons/class/gradient.py": "tests/guarantees/test_class.py",
    "tiny/world.py": "tests/test_tiny.py",
    "tiny/pretrain.py": "tests/test_tiny.py",
    "tools/conform.py": "tests/guarantees/test_conform.py",
    "tools/gguf_to_hf.py": "tests/guarantees/test_gguf_to_hf.py",
    "tools/meta_to_hf.py": "tests/guarantees/test_meta_to_hf.py",
    "./weights_download.sh": "tests/guarantees/test_download.py",
    "make lint": ".ci/run",
    "make test": ".ci/run",
    "make crosscheck": ".ci/run",
    "make faults": ".ci/run",
    "make demo": ".ci/run",
    "make exercises": ".ci/run",
}
NOT_RUN = {  # what no test runs, and why; its flags are parsed all the same
    "bench/gpu.py": "wants a GPU",
    "bench/cpu.py": "takes half an hour: make bench",
    "bench/fits.py": "computes, for minutes, by the sums that test_memory.py checks",
    "make setup": "is the beginning of make test",
    "make bench": "takes half an hour",
    "make peers": "installs other frameworks",
    "pip": "fetches packages",
    "venv": "makes an environment",
    "zipfile": "unpacks what pip fetched",
}
PROGRAM = re.compile(r"(?:\S*/)?(?:python3?|torchrun|make|pip|weights_download\.sh|\w+\.py)\Z")
FILE = re.compile(r"\w+\.py\Z")  # a command between backticks; in a block, a picture of files


def commands(page: str) -> list[list[str]]:
    """The commands of a page, as words; placeholders stay."""
    text = (ROOT / page).read_text()
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = [body for kind, body in fences if kind in ("", "sh", "bash", "console")]
    lines += re.findall(r"^ {4}(\S.*)$", rest, re.M)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^ {4}.*$", "", rest, flags=re.M))
    blocks = "\n".join(lines).replace("\\\n", " ").splitlines()
    found = []
    for line in blocks:
        found += [words for words in split_line(line) if words and not FILE.match(words[0])]
    for code in inline:
        words = split_line(" ".join(code.split()))[0]
        if len(words) > 1 or words and not words[0].endswith(".py"):  # else it names a file
            found.append(words)
    return [words for words in found if PROGRAM.match(words[0])]


def split_line(line: str) -> list[list[str]]:
    """The commands of a shell line, without comments, redirections and variables set for one."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;>")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # prose with an apostrophe, in a block that is no command
        return []
    parts: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("&|;"):
            parts.append([])
        else:
            parts[-1].append(word)
    for i, part in enumerate(parts):
        part = part[: part.index(">")] if ">" in part else part
        while part and (re.match(r"[A-Z_0-9]+=", part[0]) or part[0] in ("do", "$", "time")):
            part = part[1:]
        parts[i] = [word for word in part if word not in ("...", "…")]
    return parts


def program_of(page: str, words: list[str]) -> tuple[str, list[str]]:
    """(a key of RUN_BY or NOT_RUN, arguments). A name alone is looked for beside the page too."""
    name, *rest = words
    if name.endswith(("python", "python3")):
        if rest[:1] == ["-m"]:
            return rest[1], rest[2:]
        name, *rest = rest
    elif name.endswith("torchrun"):
        name, *rest = [word for word in rest if not word.startswith("--nproc")]
    if name == "make":
        return " ".join(words[:2]), []
    if name.endswith(("pip", ".sh")):
        return name.rpartition("/")[2] if name.endswith("pip") else name, rest
    homes = ["", "lessons/", str(Path(page).parent) + "/", "tools/", "bench/"]
    places = [home + name for home in homes if (ROOT / home / name).is_file()]
    assert places, f"{page}: {' '.join(words)}: there is no {name}"
    return places[0], rest


class Parsed(BaseException):
    """Ends a program behind its parser."""


def parse(program: str, arguments: list[str], monkeypatch) -> argparse.Namespace | None:
    """What the program's own parser makes of the arguments; nothing else of it runs."""
    script = ROOT / program
    if "add_argument" not in script.read_text() and program not in ("rora.py", "eval.py"):
        assert not arguments, f"{program} takes no arguments"
        return None
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, *given):
        raise Parsed(parse_args(self, *given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(script.parent)
    with pytest.raises(Parsed) as caught:
        runpy.run_path(str(script), run_name="__main__")
    return caught.value.args[0]


def filled(words: list[str]) -> list[str]:
    """Numbers in place of N, M and X; other placeholders may stand for themselves."""
    return [re.sub(r"\A[NMX]\Z", "1", word) for word in words]


FOUND = [
    pytest.param(page, words, id=f"{page}: {' '.join(words)}")
    for page in PAGES
    if (ROOT / page).is_file()
    for words in commands(page)
]


@pytest.mark.parametrize("page, words", FOUND)
def test_a_command_on_a_page_is_taken_by_the_program_that_it_names(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, arguments = program_of(page, words)
    if program == "pytest":
        paths = [word.partition("::")[0] for word in arguments if word.startswith("tests/")]
        assert all(list(ROOT.glob(path)) for path in paths)
        return
    assert program in RUN_BY | NOT_RUN, f"what runs {program}? Add a row to RUN_BY or NOT_RUN"
    if program.startswith("make "):
        assert re.search(rf"^{program[5:]}:", (ROOT / "Makefile").read_text(), re.M)
    if program.endswith(".sh"):
        assert arguments[0] in [*CHECKPOINTS, "data"] or "/" in arguments[0]
    if program.endswith(".py"):
        args = parse(program, filled(arguments), monkeypatch)
        if program == "rora.py" and not (args.resume or args.merge):
            resolve(args)  # that the flags go together, too


def test_each_page_has_its_commands_found():
    assert len(commands("README.md")) > 8 and len(commands("lessons/README.md")) > 8
    assert split_line('X=1 python rora.py --out "a b" > log  # why') == [
        ["python", "rora.py", "--out", "a b"]
    ]
    assert split_line("pip install x && python -m y; make z") == [
        ["pip", "install", "x"],
        ["python", "-m", "y"],
        ["make", "z"],
    ]


@pytest.mark.parametrize("program, runner", RUN_BY.items())
def test_the_file_that_is_said_to_run_a_program_names_it(program, runner):
    assert re.search(rf"\b{Path(program.split()[-1]).stem}\b", (ROOT / runner).read_text())
