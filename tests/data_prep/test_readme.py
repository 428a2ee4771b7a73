"""The program in data_prep/README.md runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

from data_prep.sample import write_sample

ROOT = Path(__file__).parents[2]


def test_the_python_of_the_readme(tmp_path, bytes_dir):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "data_prep/README.md").read_text(encoding="utf-8"), re.S)
    write_sample(tmp_path / "sample")
    (tmp_path / "my").mkdir()
    (tmp_path / "sample" / "instruction_tuning").rename(tmp_path / "my" / "instructions")
    (tmp_path / "my-llama").symlink_to(bytes_dir)
    (tmp_path / "mine.py").write_text(program)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, again, shape = done.stdout.strip().split(" ", 2)
    assert int(rows) == int(again) > 2
    assert re.fullmatch(r"\(2, \d+\)", shape)
