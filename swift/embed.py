"""`python -m swift.embed`: embeddings of scans from a trained model."""

from swift.inference.embed_cli import main

if __name__ == "__main__":
    main()
