"""Every promise of docs/reliability.md names a test that is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_promise_names_a_test_that_exists():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[^`]+)`", text)
    assert len(named) > 15
    for path, *names in (name.split("::") for name in named):
        code = (ROOT / path).read_text(encoding="utf-8")
        assert all(re.search(rf"^ *(def|class) {name}\b", code, re.MULTILINE) for name in names), path
