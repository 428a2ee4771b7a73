"""What `--json` prints. In: plain values. Out: one JSON object as the last line of stdout. Cost: none."""

import json
from typing import Any


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)
