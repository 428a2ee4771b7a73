"""The completion script, run by bash itself."""

import shutil
import subprocess

import pytest

from configs.docs import completion_script


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["panda", "pl"], ["plan"]),
        (["train.py", "--learning_r"], ["--learning_rate"]),
        (["panda", "plan", "--model", "llama-3.2"], ["llama-3.2-1b", "llama-3.2-3b"]),
        (["panda", "plan", "--zero_stage", ""], ["0", "1", "2", "3"]),
        (["panda", "plan", "--use_lora", "t"], ["true"]),
        (["panda", "plan", "--preset", "q"], ["qlora"]),
        (["panda", "plan", "--tokens_per"], ["--tokens_per_second"]),
        (["panda", "plan", "--conf_path", "mine"], ["mine.yaml"]),
    ],
)
def test_completion(words, expected, tmp_path):
    (tmp_path / "mine.yaml").touch()
    typed = " ".join(f"'{word}'" for word in words)
    call = f'COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _panda; printf "%s\\n" "${{COMPREPLY[@]}}"'
    result = subprocess.run(
        ["bash", "-c", completion_script(["plan", "register"]) + call],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.stdout.split() == expected
