"""`flows.stack.process_manager` by itself."""

import sys
import time

from flows.stack.process_manager import Managed, ProcessManager
from flows.stack.services import Service
from tests.support.stack import wait_for


def test_a_clock_that_is_set_back_delays_no_restart(tmp_path, monkeypatch):
    service = Managed(Service("short", [sys.executable, "-c", ""], {}), tmp_path / "short.log")
    manager = ProcessManager(tmp_path, [service])
    manager.look_after()
    service.process.wait()
    manager.look_after()
    assert (service.num_exits, service.process) == (1, None)
    a_day_ago = time.time() - 86_400
    monkeypatch.setattr(time, "time", lambda: a_day_ago)

    def is_started() -> bool:
        manager.look_after()
        return service.process is not None

    wait_for(is_started, 10, "the second start")
    service.process.wait()
