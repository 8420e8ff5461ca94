"""`python -m swift.attribute`: which voxels a prediction rests on."""

from swift.inference.attribute_cli import main

if __name__ == "__main__":
    main()
