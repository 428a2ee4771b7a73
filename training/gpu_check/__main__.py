"""``make gpu-check``: one table of what works on the GPUs of this machine, each line pass, fail or not available.

``python -m training.gpu_check [--model 7B] [--json]``. In: nothing. Out: the table on stdout; exit code 1 when a line
failed. Without a GPU the same list goes through a tiny model on the CPU. Everything happens in a temporary folder.
Cost: ten minutes at most on GPUs, one on a CPU.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from training.lean_imports import UNUSED, without

with without(*UNUSED):
    import torch

    from training.devices import any_device
    from training.gpu_check import device as on_device
    from training.gpu_check import runs
    from training.gpu_check.lines import Found, Line, line_of
    from training.gpu_check.runs import SCALES, Workshop
    from training.models import attention

KINDS = ("sdpa", "eager", attention.NAME, "flash_attention_2", "flex_attention")


def checks(shop: Workshop) -> Iterator[tuple[str, Callable[[], Found]]]:
    """The list, in the order of the table; a line may need what one before it has left."""
    yield "GPUs", partial(on_device.gpus, shop.device)
    yield "bfloat16", partial(on_device.bfloat16, shop.device)
    for kind in KINDS:
        yield f"attention {kind}", partial(on_device.attention_kind, kind, shop.device)
    yield "fused AdamW", partial(on_device.fused_adamw, shop.device)
    yield "data", partial(runs.data, shop)
    yield "communication", partial(runs.communication, shop)
    yield "4 bits", partial(runs.four_bits, shop)
    yield "training", partial(runs.training, shop)
    yield "resume", partial(runs.resume, shop)
    yield "checkpoint stall", partial(runs.checkpoint_stall, shop)
    yield "memory", partial(runs.memory_against_plan, shop)
    yield "speed", partial(runs.speed, shop)


def check_all(folder: Path, model: str | None = None) -> list[Line]:
    """Every line, whatever fails."""
    device = any_device()
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    scale = SCALES[model or ("1B" if gpus else "tiny")]
    shop = Workshop(folder, scale, max(1, gpus), device)
    return [line_of(name, check) for name, check in checks(shop)]


def show(lines: list[Line]) -> None:
    """The table, drawn with spaces: names, verdicts, figures."""
    rows = [("", "", "measured", "beside"), *((line.name, line.status, line.measured, line.beside) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, status, measured, beside in rows:
        print(f"{name:<{widths[0]}}  {status:<{widths[1]}}  {measured:<{widths[2]}}  {beside}".rstrip())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SCALES), help="what is trained; not given: 1B on GPUs, else tiny")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("training.gpu_check").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="panda-gpu-check-") as folder:
        lines = check_all(Path(folder), arguments.model)
    if arguments.json:
        print(json.dumps({"lines": [asdict(line) for line in lines]}))
    else:
        show(lines)
    return int(any(line.status == "fail" for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
