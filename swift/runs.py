"""`python -m swift.runs`: progress, restarts and goodput of runs."""

from swift.cluster.status import main

if __name__ == "__main__":
    main()
