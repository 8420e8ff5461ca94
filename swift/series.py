"""`python -m swift.series`: time series of every layer, for temporal fidelity."""

from swift.utils.entry import run_command

if __name__ == "__main__":
    run_command("swift.study.series_cli")
