"""`python -m swift.series`: time series of every layer, for temporal fidelity."""

from swift.study.series import main

if __name__ == "__main__":
    main()
