"""`python -m swift.export`: weights, settings and input contract in one file."""

from swift.inference.export_cli import main

if __name__ == "__main__":
    main()
