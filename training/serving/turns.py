"""Turns: several threads share one model, one at a time, a token each, in the order in which they came.

In: threads that ask. Out: the model, in turn. `threading.Lock` is not enough: who lets go of it and asks at once has it
again, so that a long answer would keep all others waiting. Cost: microseconds a token; nothing where one is alone.
"""

import threading
from collections import deque


class Turns:
    """``with turns: ... turns.pass_on() ...``"""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[int] = deque()  # threads; the first one has the turn

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._line.append(me)
            self._changed.wait_for(lambda: self._line[0] == me)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()

    def pass_on(self) -> None:
        """Let everyone who waits have a turn, then go on."""
        if len(self._line) > 1:
            self.__exit__()
            self.__enter__()
