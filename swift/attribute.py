"""`python -m swift.attribute`: which voxels a prediction rests on."""

from swift.utils.entry import run_command

if __name__ == "__main__":
    run_command("swift.inference.attribute_cli")
