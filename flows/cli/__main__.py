"""``python -m flows.cli VERB``: the console command `panda` where nothing is installed."""

import sys

from flows.cli.main import main

sys.exit(main())
