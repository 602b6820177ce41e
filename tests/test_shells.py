"""Completion as the shells do it: typed at a terminal of their own."""

import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="only POSIX has terminals of this kind")

REPOSITORY = Path(__file__).resolve().parent.parent
SHELLS = {  # how to start them without the user's own settings, and what the README has them read
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        'eval "$(_DOPFAST_COMPLETE=bash_source dopfast)"',
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        'autoload -U compinit; compinit -u; eval "$(_DOPFAST_COMPLETE=zsh_source dopfast)"',
    ),
    "fish": (["fish", "--no-config", "-i"], "_DOPFAST_COMPLETE=fish_source dopfast | source"),
}
OWN = "import os, sys; os.login_tty(0); os.execvp(sys.argv[1], sys.argv[1:])"
"""Makes the terminal the one that the shell is controlled by."""
LONGEST_S = 60.0


class Terminal:
    """What a shell writes, without colours and the like."""

    def __init__(self, handle: int) -> None:
        self.handle, self.seen = handle, ""

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self.handle, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until `text` is on the terminal; fail where it does not come."""
        end = time.monotonic() + LONGEST_S
        while text not in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.seen):
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.handle], [], [], 1)[0]:
                self.seen += os.read(self.handle, 1 << 16).decode(errors="replace")


@contextmanager
def terminal(arguments: list[str], environment: dict[str, str], folder: Path) -> Iterator[Terminal]:
    handle, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", OWN, *arguments], stdin=inside, stdout=inside, stderr=inside,
        cwd=folder, env={**os.environ, **environment},
    )  # fmt: skip
    os.close(inside)
    try:
        yield Terminal(handle)
    finally:
        os.close(handle)
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", SHELLS)
def test_a_tab_completes_commands_criteria_and_names_of_masks(name: str, tmp_path: Path) -> None:
    arguments, reads = SHELLS[name]
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    program = tmp_path / "bin" / "dopfast"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH="{REPOSITORY}" exec "{sys.executable}" -m dop_fast.cli "$@"\n'
    )
    program.chmod(0o755)
    space = tmp_path / "space"
    (space / "masks").mkdir(parents=True)
    (space / "masks" / "snip-images-0.9-s0.safetensors").touch()
    (space / "dopfast.toml").touch()
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "TERM": "xterm", "HOME": str(tmp_path)}
    with terminal(arguments, environment, space) as shell:
        shell.type(f"{reads}\necho re''ady\n")
        shell.wait_for("ready")
        for typed, completed in (
            ("dopfast pru", "prune"),
            ("dopfast prune --criterion gra", "grasp"),
            ("dopfast prune --material stitched-r", "stitched-reversed"),
            ("dopfast finetune --recipe cif", "cifar"),
            ("dopfast finetune --mask snip-i", "snip-images-0.9-s0"),
            ("dopfast export dense --mask sn", "snip-images-0.9-s0"),
        ):
            shell.type(f"{typed}\t")
            shell.wait_for(completed)
            shell.type("\x15")  # takes the line away
