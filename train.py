"""`python train.py --model panda-tiny`: the flow `panda-train`, here and now, in this process. All flags: --help."""

import sys

from flows.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main(sys.argv[1:]))
