"""Texts that occur in what is trained on: the same, nearly the same, in Chinese, in parts; named by file and line."""

import json
from pathlib import Path

import pytest

from data_prep.inspection.overlap import find
from data_prep.pipeline import prepare
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings

FOX = "The quick brown fox jumps over the lazy dog, and then it runs back into the forest before the rain."
RIVER = "河水从山上流下来，经过村庄和田野，最后流进大海，两岸的人们世世代代靠它生活。"
LINES = [
    {"input": "short", "target": "answer"},
    {"text": f"{FOX} Some other sentence stands behind it, of about the same length as the first one was, or longer."},
    {"text": f"天气很好。{RIVER}"},
    *({"text": f"Number {i} stands for itself, {'abcdefghijklmnopqrst'[i] * 5} and nothing else."} for i in range(20)),
]


@pytest.fixture(scope="module")
def plan_dir(tmp_path_factory, bytes_dir) -> Path:
    root = tmp_path_factory.mktemp("overlap")
    (root / "a.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES))
    corpus = CorpusSettings(instruction_tuning_data_dir=None, pretraining_data_dir=None, validation_fraction=0)
    corpus = corpus.model_copy(update={"instruction_tuning_data_dir": str(root)})
    return Path(prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=512), bytes_dir, root / "cache").path)


@pytest.mark.parametrize(
    ("text", "line", "least"),
    [
        (FOX, 2, 1.0),
        (FOX.upper().replace(",", " --").replace(" ", "  "), 2, 1.0),
        (FOX + " And a few words more.", 2, 0.7),
        (FOX[10:], 2, 1.0),
        (RIVER, 3, 1.0),
        (RIVER.replace("，", ",").replace("。", "！"), 3, 1.0),
        ("SHORT: answer.", 1, 1.0),
    ],
)
def test_what_occurs_is_named(plan_dir, text, line, least):
    (found,) = find([text], plan_dir)
    assert found is not None and Path(found.place).name == f"a.jsonl:{line}" and least <= found.share <= 1


def test_what_does_not_occur_is_not(plan_dir):
    assert (
        find(
            ["short answers", "河水从山上", "", "A text that nobody has ever written into this corpus, long."], plan_dir
        )
        == [None] * 4
    )
    first, second, third = find([FOX, "nothing of the kind", RIVER + FOX], plan_dir)
    assert first.share == 1 and second is None and 0.4 < third.share < 0.8
