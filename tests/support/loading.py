"""Ranks that load small models in every way, each its part, and compute losses of the same rows.

Started like the worker; ``config.yaml`` holds `models`: {name: {base, deployed, tokenizer, settings}}. Rank 0 writes
losses.json beside it: for each model the losses of `inference` and of each engine, and the bytes of weights it holds.
"""

import argparse
import json
from pathlib import Path

import torch
import yaml
from torch import nn

from tests.support.tiny import VOCABULARY
from training.distributed import Ranks, join, leave, this_rank
from training.engines.build import build_engine
from training.engines.inference import load_for_inference
from training.launch.exits import run_rank
from training.models.build import empty_model
from training.models.loss import CausalLMLoss
from training.settings import TrainSettings
from training.trainer.packing_check import pack, random_segments

ENGINES = {"zero2": {"zero_stage": 2}, "zero3": {"zero_stage": 3}, "fsdp": {"strategy": "fsdp"}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    config = parser.parse_args().config
    ranks = this_rank()
    join(ranks)
    results = {name: losses(one, ranks) for name, one in yaml.safe_load(config.read_text())["models"].items()}
    if ranks.is_first:
        config.with_name("losses.json").write_text(json.dumps(results))
    leave()


def losses(one: dict, ranks: Ranks) -> dict:
    """{way: {losses, share}} of one model."""
    batch = pack([random_segments(VOCABULARY)])
    found = {}
    for way, engine in ENGINES.items():
        settings = TrainSettings(**one["settings"], **engine)
        model, values = empty_model(settings, one["base"], one["tokenizer"], torch.float32)
        assert one["base"] is None or values, "nothing was read when the model was made"
        built = build_engine(CausalLMLoss(model), settings, ranks, values)
        built.module.eval()
        with torch.no_grad():
            found[way] = {"losses": built.forward(batch, "each").tolist(), "bytes": held(built.module)}
    if one["deployed"]:
        settings = TrainSettings(**one["settings"])
        module = load_for_inference(Path(one["deployed"]), settings, ranks)
        with torch.no_grad():
            found["inference"] = {"losses": module(batch, "each").tolist(), "bytes": held(module)}
    return found


def held(module: nn.Module) -> int:
    """Bytes of weights that this rank holds while nothing is computed."""
    return sum(_held(parameter) for parameter in module.parameters())


def _held(parameter) -> int:
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.nbytes
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.nbytes


if __name__ == "__main__":
    run_rank(main)
