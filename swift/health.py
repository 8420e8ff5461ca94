"""`python -m swift.health`: whether this node can train."""

from swift.cluster.health import main

if __name__ == "__main__":
    main()
