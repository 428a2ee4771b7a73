"""A prompt to try the finished model on: the first held-out instruction.

In: plan and tokenizer directories. Out: text. Cost: assembling one row.
"""

from pathlib import Path

import numpy as np

from data_prep.reader import IGNORED, open_plan
from data_prep.tokenizer import load_tokenizer


def sample_prompt(plan_dir: Path, tokenizer_dir: Path, cache_dir: Path) -> str:
    """The masked beginning of the first held-out segment that has one; empty when only documents are held out."""
    plan = open_plan(plan_dir, "validation")
    core = load_tokenizer(tokenizer_dir, cache_dir).core
    for row in range(plan.num_rows):
        batch = plan.batch(np.array([row]))
        starts = np.flatnonzero((batch.position_ids[0] == 0) & (batch.sources[0] >= 0))
        for start in starts:
            masked = batch.labels[0, start:] == IGNORED
            length = int(np.argmin(masked))  # tokens before the first target
            if length > 1:
                return core.decode(batch.input_ids[0, start : start + length].tolist(), skip_special_tokens=True)
    return ""
