"""Completion: what may follow, and that real shells get it from the scripts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swift.config.completion import SCRIPTS, candidates, main
from swift.report.__main__ import COMMANDS as FIGURES
from swift.utils.commands import COMMANDS


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tr"], ["train"]),
        ([""], sorted([*COMMANDS, "--help", "--version"])),
        (["train", "trainer.max_s"], ["trainer.max_steps="]),
        (["train", "model=5"], ["model=51m"]),
        (["train", "+launcher=fr"], ["+launcher=frontier", "+launcher=frontier_debug"]),
        (["train", "data.verify="], ["data.verify=false", "data.verify=true"]),
        (["data", "rep"], ["repair", "report"]),
        (["data", "report", "--lim"], ["--limit-mb"]),
        (["data", "report", "st"], []),
        (["report", "scaling"], sorted(name for name in FIGURES if name.startswith("scaling"))),
        (["completion", "z"], ["zsh"]),
        (["nowhere", ""], []),
    ],
    ids=lambda value: " ".join(value),
)
def test_candidates(words: list[str], found: list[str]) -> None:
    assert candidates(words) == found


def test_scripts_are_printed_and_others_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in SCRIPTS:
        main([shell])
        assert capsys.readouterr().out == SCRIPTS[shell]
    with pytest.raises(SystemExit) as ended:
        main(["tcsh"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no script for tcsh: there are bash, zsh, fish\n"


IN_SHELL = {
    "bash": 'source script; COMP_LINE="$1"; COMP_POINT=${#1}; compopt() { :; }; _swift_fmri; '
    'printf "%s\\n" "${COMPREPLY[@]}"',
    "fish": 'source script; complete -C "$argv[1]"',
    "zsh": "compdef() { :; }; compadd() { shift 3; print -l -- $@; }; _files() { print FILES; }; source script; "
    'words=("${(@s: :)1}"); CURRENT=${#words}; _swift_fmri',
}


@pytest.mark.slow
@pytest.mark.parametrize("shell", IN_SHELL)
def test_in_a_shell(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    program = tmp_path / "swift-fmri"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m swift "$@"\n')
    program.chmod(0o755)
    (tmp_path / "script").write_text(SCRIPTS[shell])
    path = f"{tmp_path}:/usr/bin:/bin"
    import swift

    env = {"PATH": path, "PYTHONPATH": str(Path(swift.__file__).parents[1]), "HOME": str(tmp_path)}

    def typed(line: str) -> list[str]:
        command = {"bash": ["bash", "-c", IN_SHELL[shell], "-", line], "fish": ["fish", "-c", IN_SHELL[shell], line],
                   "zsh": ["zsh", "-fc", IN_SHELL[shell], "-", line]}[shell]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=True)
        return done.stdout.split()

    assert typed("swift-fmri tr") == ["train"]
    assert typed("swift-fmri data rep") == ["repair", "report"]
    # Bash completes what stands after the =.
    assert typed("swift-fmri train model=5") == (["51m"] if shell == "bash" else ["model=51m"])
    assert typed("swift-fmri train trainer.max_s") == ["trainer.max_steps="]
