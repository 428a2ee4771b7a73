"""`python train.py --model panda-tiny`: the flow `panda-train`, here and now, in this process. All flags: --help."""

import sys

if __name__ == "__main__":
    try:
        from flows.cli.main import train_main

        sys.exit(train_main(sys.argv[1:]))
    except ModuleNotFoundError as error:
        if "--verbose" in sys.argv:
            raise
        sys.exit(
            f"error: {error} in {sys.executable}: what panda-train needs is in .venv; "
            "run `make install` once, then `source .venv/bin/activate`"
        )
