"""Training steps of LLaMA-Factory or axolotl, run by the Python of an environment that has it.

In: the model and the records of `benchmarks.train_step`. Out: the last line of stdout, JSON as every contender's
(`benchmarks.contender`). Both run their own code from their own configuration: full float32 training, packed rows of
the given length with isolated records, one row a micro-batch, SDPA, fused AdamW, no gradient checkpointing: the
settings that make TRL fastest on a CPU, by their names; no others were tried. Cost: minutes; 2 GB of disk meanwhile.

What differs all the same: LLaMA-Factory cuts a record that is longer than a row, we and axolotl drop it; axolotl weighs
the micro-batches of a step alike, whatever their targets; each has its own order of records.

Neither can share our environment, because each pins other releases of transformers. The same torch for all, so that
programs are compared, not kernels; LLaMA-Factory imports torchaudio, which must be of the same build (CPU or CUDA):

    python -m venv llamafactory && llamafactory/bin/pip install torch==VERSION llamafactory
    python -m venv axolotl && axolotl/bin/pip install torch==VERSION axolotl
    llamafactory/bin/python -m benchmarks.train_peers llamafactory --model-dir DIR --real CORPORA

`python -m benchmarks.train_step peers` and `make bench PEERS=...` run it so.
"""

import argparse
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path

from benchmarks.contender import (
    OPTIMIZER_OF_TRANSFORMERS,
    Measure,
    Measuring,
    Record,
    add_arguments,
    examples_of,
    prompt_of,
    records_of,
)

OFFLINE = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    add_arguments(parser)
    given = parser.parse_args()
    os.environ.update(OFFLINE)
    train, held_out = records_of(given.real)
    measure = Measure(examples_of(held_out, given.model_dir))
    with tempfile.TemporaryDirectory() as directory:
        PEERS[given.peer](given, train, Path(directory), Measuring(measure))
    measure.report(version=importlib.metadata.version(given.peer))


def llamafactory(given: argparse.Namespace, records: list[Record], work: Path, callback: Measuring) -> None:
    """`llamafactory-cli train`, with a template of the same ids."""
    from llamafactory.data.template import register_template
    from llamafactory.train.tuner import run_exp

    register_template(name="plain")
    (work / "records.json").write_text(json.dumps(records))
    (work / "dataset_info.json").write_text(json.dumps({"records": {"file_name": "records.json"}}))
    config = {
        "stage": "sft", "finetuning_type": "full", "do_train": True, "model_name_or_path": str(given.model_dir),
        "dataset_dir": str(work), "dataset": "records", "template": "plain", "output_dir": str(work / "out"),
        "cutoff_len": given.length, "packing": True, "neat_packing": True, "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": given.accumulation, "max_steps": given.steps + 1, "use_cpu": True,
        "lr_scheduler_type": "constant", "optim": "adamw_torch_fused", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, **OPTIMIZER_OF_TRANSFORMERS,
    }  # fmt: skip
    run_exp(config, callbacks=[callback])


def axolotl(given: argparse.Namespace, records: list[Record], work: Path, callback: Measuring) -> None:
    """`axolotl train`, with segments of its format `input_output`."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import execute_training, setup_model_and_trainer
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    eos = AutoTokenizer.from_pretrained(given.model_dir).eos_token
    lines = [json.dumps({"segments": segments(record, eos)}) for record in records]
    (work / "records.jsonl").write_text("\n".join(lines))
    config = {
        "base_model": str(given.model_dir), "output_dir": str(work / "out"),
        "datasets": [{"path": str(work / "records.jsonl"), "ds_type": "json", "type": "input_output"}],
        "dataset_prepared_path": str(work / "prepared"),
        "sequence_len": given.length, "sample_packing": True, "pad_to_sequence_len": True,
        "attn_implementation": "sdpa", "gradient_checkpointing": False, "micro_batch_size": 1,
        "gradient_accumulation_steps": given.accumulation, "max_steps": given.steps + 1, "num_epochs": 1,
        "bf16": False, "fp16": False, "tf32": False, "lr_scheduler": "constant", "optimizer": "adamw_torch_fused",
        "save_strategy": "no", **OPTIMIZER_OF_TRANSFORMERS,
    }  # fmt: skip
    cfg = load_cfg(DictDefault(config))
    trainer = setup_model_and_trainer(cfg, load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))[0]
    trainer.add_callback(callback)
    execute_training(cfg, trainer, None)


def segments(record: Record, eos: str) -> list[dict[str, object]]:
    """Prompt and answer as axolotl takes them without a template."""
    return [{"label": False, "text": prompt_of(record)}, {"label": True, "text": record["output"] + eos}]


PEERS = {"llamafactory": llamafactory, "axolotl": axolotl}

if __name__ == "__main__":
    main()
