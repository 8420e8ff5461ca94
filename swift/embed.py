"""`python -m swift.embed`: embeddings of scans from a trained model."""

from swift.utils.entry import run_command

if __name__ == "__main__":
    run_command("swift.inference.embed_cli")
