"""`python -m sparse_pretrain` is the console script."""

import sys

from sparse_pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
