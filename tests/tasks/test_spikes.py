"""What the report tells of records out of the ordinary."""

import json

from tasks.spikes import standing_out


def test_a_record_that_stands_out_in_every_epoch_is_told_once_with_its_largest_loss(tmp_path):
    other = {"hash": "0" * 32, "target_tokens": 3}
    steps = [
        [{"file": "a.json", "line": 2, "loss": 5.0, **other}],
        [{"file": "a.json", "line": 2, "loss": 7.0, **other}, {"file": "b.json", "line": 2, "loss": 6.0, **other}],
        [{"file": "a.json", "line": 2, "loss": 4.0, **other}],
    ]
    lines = [json.dumps({"step": step, "records": records}) + "\n" for step, records in enumerate(steps)]
    (tmp_path / "standing_out.jsonl").write_text("".join(lines))
    assert [(one["file"], one["loss"]) for one in standing_out(tmp_path)] == [("a.json", 7.0), ("b.json", 6.0)]
