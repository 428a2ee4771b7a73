"""What `benchmarks.memory_of_use` measures on: a random Llama, two adapters, a plan, a run directory; made in a process
of its own, because it holds the model.

    python -m benchmarks.memory_of_use_model DIRECTORY '{"layers": 16, "width": 1024, "ranks": 4, "quant": false}'

In: a directory, sizes. Out: DIRECTORY/outputs/run-1 and what it refers to; the bytes of the base, printed. Cost: twice
the model in memory.
"""

import json
import sys
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.corpora import Project
from training.comparison.job import Job, ModelUnderTest, write_job
from training.models.build import copy_tokenizer
from training.settings import GateSettings

RECORDS = 40


def main() -> None:
    """Make everything."""
    root, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
    (root / "outputs").mkdir()
    changes = {"use_quant": sizes["quant"], "use_lora": True, "num_processes": sizes["ranks"]}
    project = Project(root, root / "outputs", **changes)
    run_dir = project.train("run-1", 1)
    tokenizer = str(project.tokenizer_dir)
    width = sizes["width"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=sizes["layers"],
            num_attention_heads=16, num_key_value_heads=8, eos_token_id=1, bos_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(root / "base", max_shard_size="500MB")
    copy_tokenizer(tokenizer, root / "base")
    (run_dir / "model").rename(run_dir / "tiny")
    tuned = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for directory in (run_dir / "model", root / "champion"):
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)
        tuned.save_pretrained(str(directory))
        copy_tokenizer(tokenizer, directory)
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(root / "base")}))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["paths"]["model_dir"] = str(root / "base")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    models = {"candidate": run_dir / "model", "champion": root / "champion", "base": root / "base"}
    asked = {role: ModelUnderTest(role, "plain", str(path), quantised=sizes["quant"]) for role, path in models.items()}
    gate = GateSettings(gate_records=RECORDS).model_dump()
    write_job(Job(gate, str(root / "cache"), asked["candidate"], asked["champion"], base=asked["base"]), run_dir)
    print(sum(file.stat().st_size for file in (root / "base").glob("*.safetensors")))


if __name__ == "__main__":
    main()
