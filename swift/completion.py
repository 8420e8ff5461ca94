"""`python -m swift.completion`: print a script that completes words in bash, zsh or fish."""

from swift.config.completion import main

if __name__ == "__main__":
    main()
