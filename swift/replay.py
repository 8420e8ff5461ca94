"""`python -m swift.replay`: run a bad step again."""

from swift.train.replay import main

if __name__ == "__main__":
    main()
