"""`swift-fmri completion SHELL`: a script for bash, zsh or fish that completes commands, options, settings and values.

The script asks `swift-fmri completion --words ...` at every Tab, so it knows what the installed version knows. Where
nothing fits, the shell completes files.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import sys
from collections.abc import Sequence

from swift.utils.commands import COMMANDS
from swift.utils.entry import reported
from swift.utils.errors import UserError

SETTINGS = ("train", "plan", "baselines", "study")
"""Commands that take NAME=VALUE."""
SCRIPTS = {
    "bash": """\
# swift-fmri completion bash >> ~/.bashrc
_swift_fmri() {
  local line=${COMP_LINE:0:COMP_POINT} IFS=$' \\t\\n' words current
  read -ra words <<< "$line"
  [[ $line == *[[:space:]] ]] && words+=("")
  current=${words[${#words[@]}-1]}
  IFS=$'\\n'
  COMPREPLY=($(swift-fmri completion --words "${words[@]:1}" 2>/dev/null))
  # Bash takes = for the beginning of a word of its own.
  [[ $current == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${current%"${current##*=}"}"}")
  [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} != *= ]] && compopt +o nospace
}
complete -o default -o nospace -F _swift_fmri swift-fmri
""",
    "zsh": """\
#compdef swift-fmri
# swift-fmri completion zsh >> ~/.zshrc (after compinit)
_swift_fmri() {
  local -a found
  found=(${(f)"$(swift-fmri completion --words "${(@)words[2,CURRENT]}" 2>/dev/null)"})
  if (( ${#found} )); then compadd -S '' -- "${found[@]}"; else _files; fi
}
compdef _swift_fmri swift-fmri
""",
    "fish": """\
# swift-fmri completion fish > ~/.config/fish/completions/swift-fmri.fish
function __swift_fmri
  set -l before (commandline -opc)
  swift-fmri completion --words $before[2..-1] (commandline -ct) 2>/dev/null
end
complete -c swift-fmri -a '(__swift_fmri)'
""",
}


def help_of(words: Sequence[str]) -> str:
    """What a command says of itself, in this process."""
    said, given = io.StringIO(), sys.argv
    try:
        sys.argv = [f"swift-fmri {words[0]}", *words[1:], "--help"]
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.suppress(SystemExit),
        ):
            runpy.run_module(f"swift.{words[0]}", run_name="__main__", alter_sys=False)
    finally:
        sys.argv = given
    return said.getvalue()


def subcommands(text: str) -> list[str]:
    """Subcommands that a help text lists, as argparse indents them, or as `report` names them."""
    listed = re.findall(r"^    ([a-z][a-z0-9_-]*)(?:  | *$)", text, re.M)
    told = re.search(r"NAME is one of ([\w, \n]+)\.", text)
    return listed + (re.findall(r"\w+", told[1]) if told else [])


def settings(current: str) -> list[str]:
    """Settings and choices of groups that a word may become."""
    from swift.config.compose import conf_dir
    from swift.config.names import group_choices, setting_names

    groups, single = group_choices(conf_dir()), dict(setting_names())
    groups.pop("sites", None)
    name, equals, _ = current.partition("=")
    if equals:
        bare = name.lstrip("+~")
        values = groups.get(bare, ["true", "false"] if single.get(bare) is bool else [])
        return [f"{name}={value}" for value in values]
    plus = [f"+{group}=" for group in ("launcher", "sweep")]
    sections = {known.rpartition(".")[0] for known in single}
    return sorted({f"{known}=" for known in {*single, *groups} - sections | set(groups)} | set(plus))


def candidates(words: Sequence[str]) -> list[str]:
    """What the last of the words after `swift-fmri` may become."""
    *before, current = words or [""]
    found: list[str] = []
    if not before:
        found = [*COMMANDS, "--help", "--version"]
    elif before[0] == "completion":
        found = list(SCRIPTS)
    elif before[0] in COMMANDS:
        if before[0] in SETTINGS and not current.startswith("-"):
            found = settings(current)
        else:
            text = help_of(before[:1])
            names = subcommands(text)
            inside = [word for word in before[1:2] if word in names]
            if current.startswith("-"):
                found = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", help_of([before[0], *inside]) if inside else text)
            elif not inside and len(before) == 1:
                found = names
    return sorted({word for word in found if word.startswith(current)})


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--words"]:
        print("\n".join(candidates(given[1:])))
        return
    parser = argparse.ArgumentParser(prog="swift-fmri completion", description=__doc__.partition("\n")[0])
    parser.add_argument("shell", metavar="SHELL", help=f"{', '.join(SCRIPTS)}: print its script")
    options = parser.parse_args(given)

    def work() -> None:
        if options.shell not in SCRIPTS:
            raise UserError(f"no script for {options.shell}: there are {', '.join(SCRIPTS)}")
        print(SCRIPTS[options.shell], end="")

    reported(work)


if __name__ == "__main__":
    main()
