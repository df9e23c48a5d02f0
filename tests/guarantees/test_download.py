"""weights_download.sh against local hubs that keep their promises, and some that do not."""

import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hub_server import SHA, Hub, git_blob

from plumbing.checkpoints import CHECKPOINTS, PAPER, read_rows

SCRIPT = Path(__file__).resolve().parents[2] / "weights_download.sh"
TABLE = "plumbing/checkpoints.txt"  # beside it
THERE = {SCRIPT.name, TABLE}
TOKEN = "hf_thisMustNeverBeSeen"
BIG = os.urandom(1 << 16)  # curl writes through a 4 KB buffer: what is killed midway must be larger
SMALL = b'{"hidden_size": 64}\n'
MODEL = {
    "config.json": SMALL,
    "generation_config.json": b"{}",
    "tokenizer.model": b"pieces",
    "pytorch_model.bin": BIG,
}
CLUTTER = {
    "README.md": b"-",
    "training_args.bin": b"-",
    "consolidated.00.pth": b"-" * 9,
    "flax_model.msgpack": b"-" * 9,
}
NAME = "sheared-llama-1.3b"  # for what holds for every name; asked for here at the branch "main"


@pytest.fixture
def home(tmp_path):
    """A folder with the script in it: checkpoints/ and data/ appear beside the script."""
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "plumbing").mkdir()
    shutil.copy(SCRIPT.parent / TABLE, tmp_path / TABLE)
    (
        tmp_path / "tmp"
    ).mkdir()  # for the script's own temporary files: folder(home) shows it if they stay
    return tmp_path


def command(home, hub, *arguments, **env):
    """-> arguments for subprocess. Of this machine's environment only PATH: no proxy, no token."""
    url = hub.url if hub else "http://127.0.0.1:9"  # port 9: nobody there
    ours = {
        "HF_ENDPOINT": url,
        "GITHUB_RAW": url,
        "RETRY_SECONDS": "0",
        "TMPDIR": str(home / "tmp"),
        "HOME": str(home),
    }
    env = {"PATH": os.environ["PATH"]} | ours | env
    return {
        "args": ["bash", str(home / SCRIPT.name), *arguments],
        "env": env,
        "cwd": "/",
        "text": True,
    }


def run(home, hub, *arguments, **env):
    done = subprocess.run(**command(home, hub, *arguments, **env), capture_output=True, timeout=30)
    assert TOKEN not in done.stdout + done.stderr
    assert done.stderr.count("\n") <= 1, "an error is one line: " + done.stderr
    return done


def folder(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def is_model(home, name=NAME, files=MODEL, sha=SHA):
    return folder(home / "checkpoints" / name) == files | {"REVISION": sha.encode() + b"\n"}


def at_main(name=NAME):
    return name + "@main"


# --- what comes, and from where -------------------------------------------------------------------


def test_the_list_names_every_checkpoint_and_asks_nobody(home):
    done = run(home, None, "--list")
    assert done.returncode == 0
    for name in (*(name for name in CHECKPOINTS if name != "tiny"), "data"):
        assert re.search(rf"^{re.escape(name)} +[\d.]+ GB", done.stdout, re.M)


def test_a_checkpoint_is_one_row_of_the_table(home):
    """What the script fetches and what the flags default to are the same line."""
    row = "\nnew-one  some-one/new  main  0.1\n    lr.rora=1e-5 warmup=7 loss=answer\n"
    (home / TABLE).write_text((home / TABLE).read_text() + row)
    new = read_rows((home / TABLE).read_text())["new-one"]
    assert (new.hub, new.lr, new.warmup, new.loss) == ("some-one/new", {"rora": 1e-5}, 7, "answer")
    assert new.epochs == PAPER.epochs
    with Hub(MODEL) as hub:
        assert run(home, hub, "new-one").returncode == 0
    assert is_model(home, "new-one")


WRONG = [
    "",
    "gpt-2",
    "--fast",
    "llama-7b data",
    "llama-7b --revision",
    "data@main",
    "llama-7b@../x",
    "../x",
    "a/../b",
    "a/b/c",
    "/etc/passwd",
]


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_command_line_is_exit_code_2_and_touches_nothing(home, arguments):
    done = subprocess.run(**command(home, None, *arguments.split()), capture_output=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("weights_download.sh: ")
    assert folder(home).keys() == THERE


@pytest.mark.parametrize("indent", [None, 2])
def test_a_checkpoint_is_config_tokenizer_and_weights_and_nothing_else(home, indent):
    with Hub(MODEL | CLUTTER) as hub:
        hub.indent = indent
        done = run(home, hub, at_main())
    assert done.returncode == 0 and done.stderr == ""
    assert is_model(home)
    assert all(f"[{i}/4]" in done.stdout for i in (1, 2, 3, 4))


def test_safetensors_are_preferred_and_the_index_names_the_shards(home):
    shards = {f"model-0000{i}-of-00002.safetensors": os.urandom(3000 + i) for i in (1, 2)}
    weight_map = b", ".join(
        b'"layer/%d":\n "%s"' % (i, name.encode()) for i, name in enumerate([*shards, *shards])
    )
    index = {
        "model.safetensors.index.json": b'{"metadata": {"total_size": 9}, "weight_map": {%s}}'
        % weight_map
    }
    stray = {"model-00001-of-00009.safetensors": b"of another set"}
    with Hub(MODEL | shards | index | stray) as hub:
        assert run(home, hub, at_main("llama-7b")).returncode == 0
        hub.requests.clear()
        assert run(home, hub, "llama-7b").returncode == 0
    assert len(hub.requests) == 1  # the API: nothing is fetched twice
    files = {name: content for name, content in MODEL.items() if name != "pytorch_model.bin"}
    assert is_model(home, "llama-7b", files | shards | index)


def test_llama_3_keeps_its_tokenizer_among_metas_own_files(home):
    files = {
        "config.json": SMALL,
        "original/tokenizer.model": b"ranks",
        "tokenizer.json": b"{}",
        "model.safetensors": BIG,
    }
    with Hub(files | {"original/consolidated.00.pth": b"-"}) as hub:
        assert run(home, hub, at_main("llama3-8b")).returncode == 0
    del files["original/tokenizer.model"]
    assert is_model(home, "llama3-8b", files | {"tokenizer.model": b"ranks"})


COMPANIONS = {
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "chat_template.jinja": b"-",
}
OTHERS = {"config.json": SMALL, "model.safetensors": BIG} | COMPANIONS


def test_any_repository_can_be_named_and_its_commit_is_kept_and_said(home):
    """Of a stranger only config, tokenizer and safetensors are taken: a .bin is a pickle."""
    with Hub(OTHERS | CLUTTER | {"pytorch_model.bin": BIG, "modeling_x.py": b"-"}) as hub:
        done = run(home, hub, "some-one/SmolLM.2")
        assert done.returncode == 0 and SHA in done.stdout.splitlines()[-1]
        assert is_model(home, "some-one/SmolLM.2", OTHERS)
        assert "/api/models/some-one/SmolLM.2/revision/main" in hub.requests[0].path
        hub.sha = "f" * 40  # its main moves on
        done = run(home, hub, "some-one/SmolLM.2@main")
    assert done.returncode == 2 and f"holds commit {SHA}" in done.stderr


def test_a_strangers_pickles_are_not_fetched(home):
    with Hub(MODEL) as hub:
        done = run(home, hub, "some-one/model")
    assert done.returncode == 3 and "has no model.safetensors" in done.stderr
    assert folder(home).keys() == THERE


def test_a_strangers_index_may_name_safetensors_alone(home):
    index = {"model.safetensors.index.json": b'{"weight_map": {"a": "run_me.py"}}'}
    with Hub(MODEL | index) as hub:
        done = run(home, hub, "some-one/model")
    assert done.returncode == 3 and "run_me.py" in done.stderr


def test_a_dry_run_tells_the_sizes_and_writes_nothing(home):
    with Hub(MODEL) as hub:
        done = run(home, hub, "--dry-run", at_main())
    assert done.returncode == 0 and folder(home).keys() == THERE
    assert f"{len(BIG)} B" in done.stdout and "4 files" in done.stdout
    assert not hub.asked("pytorch_model.bin")


def test_what_is_complete_is_not_fetched_again(home):
    with Hub(MODEL) as hub:
        run(home, hub, at_main())
        hub.requests.clear()
        done = run(home, hub, NAME)
    assert done.returncode == 0 and done.stdout.count("already there") == 4
    api = f"/api/models/princeton-nlp/Sheared-LLaMA-1.3B/revision/{SHA}?blobs=true"
    assert [request.path for request in hub.requests] == [api]


@pytest.mark.parametrize("edited", [b"shorter", bytes(len(SMALL))], ids=["other-size", "same-size"])
def test_a_file_that_is_not_the_published_one_is_neither_taken_nor_overwritten(home, edited):
    (home / "checkpoints" / NAME).mkdir(parents=True)
    (home / "checkpoints" / NAME / "config.json").write_bytes(edited)
    with Hub(MODEL) as hub:
        done = run(home, hub, at_main())
    assert done.returncode == 3 and "config.json" in done.stderr
    assert folder(home / "checkpoints") == {f"{NAME}/config.json": edited}


def test_a_big_file_that_is_there_is_judged_by_its_size(home):
    """Hashing 13 GB on every run would take a minute; it was done before the file got its name."""
    there = home / "checkpoints" / NAME / "pytorch_model.bin"
    there.parent.mkdir(parents=True)
    there.touch()
    os.truncate(there, 200_000_001)  # a hole: takes no space
    with Hub(MODEL) as hub:
        done = run(home, hub, at_main())
    assert done.returncode == 3 and f"has 200000001 bytes, not {len(BIG)}" in done.stderr
    assert len(hub.requests) == 1


# --- revisions ------------------------------------------------------------------------------------


def test_the_pinned_commit_is_what_the_hub_is_asked_for(home):
    with Hub(MODEL) as hub:
        hub.sha = "a4b76938edbf571ea7d7d9904861cbdca08809b4"
        assert run(home, hub, NAME).returncode == 0
    assert is_model(home, sha=hub.sha)
    assert all(hub.sha in request.path for request in hub.requests)


def test_a_pin_of_seven_digits_takes_main_only_while_it_is_that_commit(home):
    with Hub(MODEL) as hub:
        moved = run(home, hub, "llama-13b")
        assert moved.returncode == 3 and hub.sha in moved.stderr and "--revision" in moved.stderr
        hub.sha = "a53b569" + "0" * 33
        assert run(home, hub, "llama-13b").returncode == 0
    assert is_model(home, "llama-13b", sha=hub.sha)


def test_a_resumed_download_stays_with_its_commit_when_the_branch_moves_on(home):
    with Hub(MODEL) as hub:
        hub.status["pytorch_model.bin"] = [404]
        assert run(home, hub, at_main()).returncode == 1
        hub.requests.clear()
        assert run(home, hub, NAME).returncode == 0
        assert f"/revision/{SHA}?" in hub.requests[0].path
        hub.sha = "f" * 40
        done = run(home, hub, NAME, "--revision", "main")
    assert done.returncode == 2 and SHA in done.stderr and "must not mix" in done.stderr


def test_known_hashes_are_believed_more_than_the_hub(home):
    files = MODEL | {"model-00001-of-00002.safetensors": BIG}
    files["model.safetensors.index.json"] = (
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    with Hub(files) as hub:
        hub.sha = "01c7f73d771dfac7d292323805ebc428287df4f9"
        done = run(home, hub, "llama2-7b")
    assert done.returncode == 3 and "4ec71fd53e99766d" in done.stderr
    assert not (home / "checkpoints").exists()


# --- broken connections ---------------------------------------------------------------------------


def test_a_connection_cut_in_mid_file_is_taken_up_at_the_next_byte(home):
    with Hub(MODEL) as hub:
        hub.cuts["pytorch_model.bin"] = [20_000, 30_000]
        assert run(home, hub, at_main()).returncode == 0
    assert [request.range for request in hub.asked(".bin")] == [
        None,
        "bytes=20000-",
        "bytes=50000-",
    ]
    assert is_model(home)


@pytest.mark.parametrize("sent, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_killed_download_leaves_its_part_and_the_next_run_resumes_it(home, sent, code):
    part = home / "checkpoints" / NAME / "pytorch_model.bin.part"
    with Hub(MODEL) as hub:
        hub.stall_after = 40_000
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
        with subprocess.Popen(**command(home, hub, at_main()), **pipes) as process:
            deadline = time.monotonic() + 10
            while (
                not (part.exists() and part.stat().st_size > 30_000) and time.monotonic() < deadline
            ):
                time.sleep(0.02)
            os.killpg(process.pid, sent)
            process.communicate(timeout=10)
        assert process.returncode == code
        hub.stall_after = None
        hub.released.set()
        have = part.stat().st_size
        assert 30_000 < have < len(BIG) and not part.with_suffix("").exists()

        hub.requests.clear()
        done = run(home, hub, NAME)
    assert done.returncode == 0 and "resume after" in done.stdout
    assert [request.range for request in hub.asked(".bin")] == [f"bytes={have}-"]
    assert is_model(home)


def test_a_line_that_gives_nothing_three_times_is_given_up_and_the_part_kept(home):
    with Hub(MODEL) as hub:
        hub.cuts["pytorch_model.bin"] = [20_000, 0, 0, 0, 0, 0]
        done = run(home, hub, at_main())
    assert done.returncode == 1 and "run again to resume" in done.stderr
    assert len(hub.asked(".bin")) == 4
    assert (home / "checkpoints" / NAME / "pytorch_model.bin.part").read_bytes() == BIG[:20_000]


@pytest.mark.parametrize("cuts, code", [([20_000], 0), ([20_000] * 9, 1)])
def test_without_ranges_a_file_starts_over_but_not_for_ever(home, cuts, code):
    with Hub(MODEL) as hub:
        hub.ranges = False
        hub.cuts["pytorch_model.bin"] = cuts
        done = run(home, hub, at_main())
    assert done.returncode == code
    assert is_model(home) or "cannot resume" in done.stderr


def test_a_part_that_is_complete_or_too_long_does_not_confuse_anyone(home):
    there = home / "checkpoints" / NAME
    there.mkdir(parents=True)
    (there / "pytorch_model.bin.part").write_bytes(BIG)
    (there / "tokenizer.model.part").write_bytes(bytes(9000))
    with Hub(MODEL) as hub:
        assert run(home, hub, at_main()).returncode == 0
    assert is_model(home) and not hub.asked(".bin")


def test_an_overloaded_hub_is_asked_again(home):
    with Hub(MODEL) as hub:
        hub.status = {"api": [503], "config.json": [429, 500]}
        assert run(home, hub, at_main()).returncode == 0
    assert is_model(home)


def test_no_network_is_one_line(home):
    done = run(home, None, NAME)
    assert done.returncode == 1 and "127.0.0.1:9" in done.stderr


# --- wrong content --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "config.json"]
)  # a sha256, and git's blob id
@pytest.mark.parametrize("wrong", [bytes.swapcase, lambda content: content + b"more"])
def test_content_with_another_hash_never_gets_its_name(home, name, wrong):
    files = MODEL | {"pytorch_model.bin": b"weights" * 9000}
    with Hub(files) as hub:
        hub.served[name] = wrong(files[name])
        done = run(home, hub, at_main())
        assert done.returncode == 3 and name in done.stderr and "hash" in done.stderr
        there = folder(home / "checkpoints" / NAME)
        assert name not in there and name + ".part" not in there
        hub.served.clear()
        assert run(home, hub, at_main()).returncode == 0
    assert is_model(home, files=files)


def test_a_resumed_file_is_checked_as_a_whole(home):
    there = home / "checkpoints" / NAME
    there.mkdir(parents=True)
    (there / "pytorch_model.bin.part").write_bytes(bytes(5000))  # of something else
    with Hub(MODEL) as hub:
        assert run(home, hub, at_main()).returncode == 3
        assert run(home, hub, at_main()).returncode == 0
    assert is_model(home)


@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "sub/evil", ".evil", "a b", "$(id)", "\\u002e\\u002e/x", ""]
)
def test_an_unsafe_file_name_is_refused(home, name):
    index = b'{"weight_map": {"a": "%s"}}' % name.encode()
    small = {"config.json": SMALL, "tokenizer.model": b"t", "model.safetensors.index.json": index}
    with Hub(small | {name: b"evil"}) as hub:
        hub.lfs.add(name)
        done = run(home, hub, at_main())
    assert done.returncode == 3 and "unsafe file name" in done.stderr
    assert folder(home).keys() == THERE


def test_a_page_that_is_not_the_hubs_answer_is_refused(home):
    with Hub(MODEL) as hub:
        hub.api = lambda repo: "<html>Please log in to the <b>guest</b> network</html>"
        done = run(home, hub, at_main())
    assert done.returncode == 3 and "HF_ENDPOINT" in done.stderr


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.model", "pytorch_model.bin"])
def test_a_repository_without_something_needed_is_refused_before_the_download(home, missing):
    with Hub({name: content for name, content in MODEL.items() if name != missing}) as hub:
        done = run(home, hub, at_main())
    assert done.returncode == 3 and missing in done.stderr
    assert len(hub.requests) == 1


def test_a_404_names_the_page_to_look_at(home):
    with Hub(MODEL) as hub:
        hub.status = {"api": [404]}
        done = run(home, hub, NAME)
    assert done.returncode == 1
    assert (
        "404" in done.stderr
        and "https://huggingface.co/princeton-nlp/Sheared-LLaMA-1.3B" in done.stderr
    )


# --- the token ------------------------------------------------------------------------------------


@pytest.mark.parametrize("env, status", [({}, 401), ({"HF_TOKEN": TOKEN}, 403)])
def test_a_gated_repository_is_one_line_with_the_page_to_accept(home, env, status):
    with Hub(MODEL) as hub:
        hub.token = "of somebody else"
        done = run(home, hub, at_main("llama2-7b"), **env)
    assert done.returncode == 1 and str(status) in done.stderr
    assert "https://huggingface.co/meta-llama/Llama-2-7b-hf" in done.stderr
    assert not list(home.rglob("*.part"))


@pytest.mark.parametrize("place", ["HF_TOKEN", "HF_HOME", "HOME"])
def test_the_token_is_found_in_the_environment_or_where_the_hubs_tools_keep_it(home, place):
    env = (
        {"HF_TOKEN": TOKEN}
        if place == "HF_TOKEN"
        else {"HF_HOME": str(home / "hf")}
        if place == "HF_HOME"
        else {}
    )
    file = {
        "HF_HOME": home / "hf" / "token",
        "HOME": home / ".cache" / "huggingface" / "token",
    }.get(place)
    if file:
        file.parent.mkdir(parents=True)
        file.write_text(TOKEN + "\n")
    with Hub(MODEL) as hub:
        hub.token = TOKEN
        assert run(home, hub, at_main(), **env).returncode == 0
    assert is_model(home)


def test_the_token_does_not_follow_a_redirect_to_another_host(home):
    with Hub(MODEL, host="localhost") as cdn, Hub(MODEL) as hub:
        hub.token, hub.cdn = TOKEN, cdn
        cdn.cuts["pytorch_model.bin"] = [20_000]
        assert run(home, hub, at_main(), HF_TOKEN=TOKEN).returncode == 0
    assert is_model(home)
    assert [request.range for request in cdn.asked(".bin")] == [None, "bytes=20000-"]
    assert {request.authorization for request in cdn.requests} == {None}
    assert {request.authorization for request in hub.requests} == {
        f"Bearer {TOKEN}"
    }  # also after a redirect to itself
    assert hub.asked("/cache/config.json")


def test_the_token_is_on_no_command_line(home):
    seen = []
    with Hub(MODEL) as hub:
        hub.token = TOKEN
        hub.on_request = lambda: seen.extend(command_lines())
        assert run(home, hub, at_main(), HF_TOKEN=TOKEN).returncode == 0
    assert any("curl" in line for line in seen) and not any(TOKEN in line for line in seen)


def command_lines():
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield process.read_text(errors="replace")
        except OSError:  # it has just ended
            pass
    if not Path("/proc").exists():
        yield from subprocess.run(
            ["ps", "-axww", "-o", "command"], capture_output=True, text=True
        ).stdout.splitlines()


def test_a_token_that_could_smuggle_in_an_option_is_refused(home):
    with Hub(MODEL) as hub:
        done = run(home, hub, at_main(), HF_TOKEN='x"\nurl = "http://evil')
    assert done.returncode == 2 and "evil" not in done.stderr and not hub.requests


# --- the disk -------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_anything_is_fetched(home):
    (home / "bin").mkdir()
    (home / "bin" / "df").write_text(
        "#!/bin/sh\necho the usual header\necho map auto home 100 41 59 41% /a b\n"
    )
    (home / "bin" / "df").chmod(0o755)
    with Hub(MODEL) as hub:
        done = run(home, hub, at_main(), PATH=f"{home / 'bin'}:{os.environ['PATH']}")
        assert (
            done.returncode == 1
            and "not enough space" in done.stderr
            and f"{59 * 1024} B free" in done.stderr
        )
        assert len(hub.requests) == 1 and not (home / "checkpoints").exists()
        # What is there in part is not needed again: 68 KB less 20 KB fit into 59 KB.
        there = home / "checkpoints" / NAME
        there.mkdir(parents=True)
        (there / "pytorch_model.bin.part").write_bytes(BIG[:20_000])
        assert (
            run(home, hub, at_main(), PATH=f"{home / 'bin'}:{os.environ['PATH']}").returncode == 0
        )


@pytest.mark.parametrize("signal_kills", [True, False])
def test_a_disk_that_fills_up_keeps_the_part(home, signal_kills):
    """A limit on file size stands in for a full disk: the write fails, or a signal says so."""
    size = (30_000, 30_000)
    limit = {
        "preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, size),
        "restore_signals": signal_kills,
    }
    with Hub(MODEL) as hub:
        done = subprocess.run(
            **command(home, hub, at_main()), **limit, capture_output=True, timeout=30
        )
        assert done.returncode == 1 and "disk full" in done.stderr
        part = (home / "checkpoints" / NAME / "pytorch_model.bin.part").read_bytes()
        assert 20_000 < len(part) <= 30_000 and BIG.startswith(part)
        assert run(home, hub, at_main()).returncode == 0
    assert is_model(home)


def test_a_folder_that_cannot_be_made_is_one_line(home):
    (home / "checkpoints").write_text("a file is in the way")
    with Hub(MODEL) as hub:
        done = subprocess.run(**command(home, hub, at_main()), capture_output=True, timeout=30)
    assert done.returncode == 1 and "cannot write in checkpoints" in done.stderr.splitlines()[-1]


# --- the data -------------------------------------------------------------------------------------

TASKS = [
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
]
DATA = {"ft-training_set/commonsense_170k.json": BIG} | {
    f"dataset/{task}/test.json": task.encode() * 100 for task in TASKS
}


def test_the_data_is_one_training_file_and_eight_test_sets_and_github_gets_no_token(home):
    script = (home / SCRIPT.name).read_text()
    rows = "\n".join(
        f"{path} ~{len(content)} {git_blob(content)}" for path, content in DATA.items()
    )
    (home / SCRIPT.name).write_text(
        re.sub(r"\nDATA='\n.*?'\n", f"\nDATA='\n{rows}'\n", script, count=1, flags=re.S)
    )
    with Hub(DATA) as hub:
        hub.cuts["ft-training_set/commonsense_170k.json"] = [20_000]
        run(home, hub, "--dry-run", "data")
        assert not hub.requests
        done = run(home, hub, "data", HF_TOKEN=TOKEN, HF_ENDPOINT="http://127.0.0.1:9")
        assert done.returncode == 0
        assert run(home, hub, "data").stdout.count("already there") == 9
    assert folder(home / "data") == {
        path.partition("/")[2]: content for path, content in DATA.items()
    }
    assert {request.authorization for request in hub.requests} == {None}
    pinned = "/AGI-Edgerunners/LLM-Adapters/816657208af4db747803f87ba40a4c71383fed7a/"
    assert (
        all(request.path.startswith(pinned) for request in hub.requests) and len(hub.requests) == 10
    )


def test_other_data_than_the_published_is_refused(home):
    with Hub(DATA) as hub:
        done = run(home, hub, "data")
    assert done.returncode == 3 and "529e426b33d4cdb1d0c4a275a1a7245ad081fd91" in done.stderr
    assert folder(home).keys() == THERE


# --- the script itself ----------------------------------------------------------------------------


def test_the_script_keeps_to_bash_3_2():
    """macOS ships it: no associative arrays, mapfile, ${x,,}, |&, or local -n."""
    text = SCRIPT.read_text()
    assert not re.search(r"declare -A|local -[An]|mapfile|readarray|\$\{\w+(,,|\^\^)|\|&|&>>", text)
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0 and os.access(
        SCRIPT, os.X_OK
    )
