"""`python -m swift.baselines`: what simple methods reach on a task."""

from swift.evaluate.__main__ import main

if __name__ == "__main__":
    main()
