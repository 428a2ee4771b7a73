"""Names as PandaLLM's guide spells them: as a flag, an override, a key of a file; each with one line that says so."""

import logging

import pytest

from configs import guide_names
from configs.cli import CONF_PATH, configure

READ_TENSOR = {"_target_": "data.collators.zh_instruct.TextDatasetUnifyV3", "pair_file_list": "data/files/*.json"}
NODE = "{_target_: data.collators.zh_instruct.TextDatasetUnifyV3, pair_file_list: data/files/*.json}"


@pytest.fixture
def said(caplog):
    guide_names._say.cache_clear()
    caplog.set_level(logging.INFO, logger="configs")
    return caplog


def settings(*argv: str):
    return configure("train.py", "", list(argv), [CONF_PATH])[1].settings


@pytest.mark.parametrize(
    ("argv", "name", "value", "line"),
    [
        (["--learing_rate", "2e-3"], "learning_rate", 2e-3, "--learing_rate is taken as --learning_rate"),
        (["--learing_rate=2e-3"], "learning_rate", 2e-3, "--learing_rate is taken as --learning_rate"),
        (["learing_rate=2e-3"], "learning_rate", 2e-3, "learing_rate is taken as learning_rate"),
        (["--read_tensor", NODE], "reader", READ_TENSOR, "--read_tensor is taken as --reader"),
        (["--experiment_name", "read_tensor.yaml"], "experiment_name", "read_tensor.yaml", None),
        (["--run_name", "learing_rate"], "run_name", "learing_rate", None),
    ],
)
def test_on_the_command_line(argv, name, value, line, said):
    assert getattr(settings(*argv), name) == value
    assert said.messages == ([line] if line else [])


def test_in_a_file(tmp_path, said):
    path = tmp_path / "mine.yaml"
    path.write_text(f"learing_rate: 2e-3\nread_tensor: {NODE}\n")
    for _ in range(2):
        assert settings("--conf_path", str(path)).learning_rate == 2e-3
    assert settings("--conf_path", str(path), "read_tensor.pair_file_list=other").reader["pair_file_list"] == "other"
    expected = [
        f"{path}: {ours}" for ours in ("learing_rate is taken as learning_rate", "read_tensor is taken as reader")
    ]
    assert sorted(said.messages) == sorted([*expected, "read_tensor is taken as reader"])
