"""`python -m swift.doctor`: what a bug report needs: versions, device, threads, disk, a store."""

from swift.cluster.doctor import main

if __name__ == "__main__":
    main()
