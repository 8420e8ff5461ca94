"""`python -m swift.export`: weights, settings and input contract in one file."""

from swift.utils.entry import run_command

if __name__ == "__main__":
    run_command("swift.inference.export_cli")
