"""Fits the answers to a tree that has moved under them:  python exercises/remake.py

Each patch is merged into a copy of HEAD and written back with one line of context. Where git cannot
merge, the copy stays, and the command that writes the patch once it is repaired is printed.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def git(*words: str, where: Path = HERE.parent, check: bool = True) -> str:
    done = subprocess.run(["git", "-C", str(where), *words], capture_output=True, text=True)
    if check and done.returncode:
        sys.exit(f"git {' '.join(words)}: {done.stderr}")
    return done.stdout


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    left = 0
    for patch in sorted(HERE.glob("*.patch")):
        copy = Path(tempfile.mkdtemp(prefix=patch.stem + "-")) / "tree"
        git("worktree", "add", "-q", "--detach", str(copy))
        git("apply", "--3way", str(patch), where=copy, check=False)
        if conflicts := git("diff", "--name-only", "--diff-filter=U", where=copy):
            print(f"{patch.name}: repair {', '.join(conflicts.split())} in {copy}, then")
            print(f"  git -C {copy} add -A; git -C {copy} diff --cached -U1 > {patch}")
            print(f"  git worktree remove --force {copy}")
            left += 1
        else:
            patch.write_text(git("diff", "--cached", "-U1", where=copy))
            git("worktree", "remove", "--force", str(copy))
    return left


if __name__ == "__main__":
    sys.exit(main())
