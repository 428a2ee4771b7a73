"""``python -m flows.watch STATE_DIR``: the service of `panda up` that looks after runs when nobody does.

In: the Prefect server of the environment. Out: runs started again, messages; a log. It decides nothing that a look at
the server would not show again, so it may be killed at any time. Cost: 150 MB, a few requests every five seconds.
"""

import logging
import sys
import time
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client

from flows.parts.notify import without_paths
from flows.watch import corpus_events, restarts
from flows.watch.alarms import Alarms

LOOK_SECONDS = 5.0
ALARM_LOOKS = 12  # of these, one looks for alarms too
TOLD = "told.json"

logger = logging.getLogger("flows.watch")


def main(state_dir: Path) -> None:
    """For ever."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    for name in ("httpx", "prefect"):
        logging.getLogger(name).setLevel(logging.WARNING)
    alarms, asked = Alarms.of(state_dir / TOLD), set[UUID]()
    number = 0
    while True:
        look(alarms, asked, with_alarms=number % ALARM_LOOKS == 0)
        number += 1
        time.sleep(LOOK_SECONDS)


def look(alarms: Alarms, asked: set[UUID], with_alarms: bool) -> None:
    """One look; a server that is away is looked for again."""
    try:
        with get_client(sync_client=True) as client:
            restarts.look(client, asked)
            corpus_events.look(client)
            if with_alarms:
                alarms.look(client)
    except Exception as error:
        logger.warning("this look saw nothing: %s", without_paths(error))
        alarms.unreachable(error)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
