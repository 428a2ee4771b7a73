"""Events on the wire: what old and other programs read stays as it is, and nothing else is taken for one."""

import pytest

from training.launch.events import emit, event_of, step_done


def test_a_line_is_the_event_in_order(capsys):
    event = step_done(9, 1.5, {"step": 3, "loss": 2.25})
    emit(event)
    line = capsys.readouterr().out
    assert line == '\nPANDA {"event": "step", "steps": 9, "eta_seconds": 1.5, "step": 3, "loss": 2.25}\n'
    assert event_of(line.strip()) == event_of(f"node-1: {line.strip()}") == event


@pytest.mark.parametrize("line", ["step 3", 'PANDA {"event": ', 'PANDA {"loss": 1}', 'He says PANDA {"event": "step"}'])
def test_other_lines_are_no_events(line):
    assert event_of(line) is None
