"""`python -m swift.series`: time series of every layer, for temporal fidelity."""

from swift.study.series_cli import main

if __name__ == "__main__":
    main()
