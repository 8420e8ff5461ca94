"""`swift-fmri COMMAND ...`: one console command for what `python -m swift.COMMAND ...` does."""

from __future__ import annotations

import runpy
import sys
from difflib import get_close_matches

from swift.utils.commands import COMMANDS


def usage() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, does in COMMANDS.items()]
    return "\n".join(
        [
            "usage: swift-fmri COMMAND ...  or swift-fmri --version",
            "",
            *lines,
            "",
            "swift-fmri COMMAND --help says what a command takes.",
        ]
    )


def main() -> None:
    """Run one command, as `python -m` would."""
    given = sys.argv[1:]
    if not given or given[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if given else sys.stderr)
        sys.exit(0 if given else 2)
    if given[0] == "--version":
        from swift.cluster.doctor import version

        print(f"swift-fmri {version()}")
        return
    name = given[0]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"legal are {', '.join(COMMANDS)}"
        print(f"swift-fmri: {name} is no command: {hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv = sys.argv[1:]
    runpy.run_module(f"swift.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
