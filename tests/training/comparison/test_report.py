"""What people read of the gate: the verdict, its reasons, and tables of six columns."""

from training.comparison.report import verdict_markdown

SLICE = {"slice": "a|b", "records": 40, "against": "champion", "loss": 1.5, "reference_loss": 1.625, "gain": 0.125,
         "low": 0.1, "high": 0.15}  # fmt: skip
CHECK = {"check": "ends", "prompts": 8, "against": "base", "share": 0.75, "reference_share": 0.5, "better": 2,
         "worse": 0}  # fmt: skip


def test_verdict_by_hand():
    text = verdict_markdown({"promoted": True, "reasons": ["better"], "slices": [SLICE], "checks": [CHECK]})
    assert (
        text
        == """**champion**

- better

| held-out loss on | records | against | loss | its loss | gain [98%] |
| --- | --- | --- | --- | --- | --- |
| a b | 40 | champion | 1.5000 | 1.6250 | +0.1250 [+0.1000, +0.1500] |

| answers | prompts | against | share | its share | better, worse |
| --- | --- | --- | --- | --- | --- |
| that end | 8 | base | 75% | 50% | 2, 0 |"""
    )


def test_a_comparison_that_failed_has_reasons_only():
    text = verdict_markdown({"promoted": False, "reasons": ["out of memory"], "slices": [], "checks": []})
    assert text == "**challenger**\n\n- out of memory"
