"""What MLflow has of a model is loaded and writes a text: run as a child, so that no flow's process ever holds a model.

In: RUN/config.yaml, `--job FILE` (`Job`: the model's files as MLflow has them, a prompt). Out: `Found` beside the job;
a `ModelError` that says what is wrong. By hand: ``python -m training.registry.loaded_back --config RUN/config.yaml
--job FILE``. Every tensor of the files is compared with RUN/model, two at a time. Then it is loaded: a small model
through `mlflow.pyfunc`, as others will load it; a large one as it was trained, sharded over the ranks and in 4 bits
where it was (`Job.whole`). Cost: reading both files once, the weights (this rank's share of them) in memory.
"""

import argparse
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from data_prep.errors import PandaError
from data_prep.tokenizer import load_tokenizer
from training import run_files
from training.errors import CheckpointError, ModelError
from training.launch.exits import run_rank
from training.launch.heartbeat import Heartbeat
from training.launch.run_config import RunConfig, read_config
from training.lean_imports import silence_vain_warnings
from training.models import shards
from training.registry.proof import FOUND, WEIGHTS, Found, Job
from training.tracking.looks import only_a_look

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_TOKENS = 48
SHARED_TOKENS = 16  # of a large model: for each token every rank gathers all weights


def load_served(model_uri: str, uri: str | None = None) -> Any:
    """A registered model (or an MLflow model directory), loaded through `mlflow.pyfunc`."""
    from training.tracking.sync import connect, import_mlflow

    if uri:
        connect(uri)
    import_mlflow()
    import mlflow

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    silence_vain_warnings()
    return mlflow.pyfunc.load_model(model_uri)


def load_back(config: RunConfig, job: Job) -> Found:
    """Compare, load, ask. All ranks together.

    :raises ModelError: it cannot be loaded at all, or is another model than RUN/model.
    """
    stored, model_dir = Path(job.package) / WEIGHTS, config.run_dir / run_files.MODEL
    if is_first():
        wrong = other_tensors(stored, model_dir)
        if wrong:
            raise ModelError(f"loaded back from MLflow it is another model: {wrong}")
    return whole(job, model_dir) if job.whole else sharded(config, job, stored)


def other_tensors(stored: Path, model_dir: Path) -> str | None:
    """What the files of one directory have other than those of another, tensor by tensor; None when nothing."""
    try:
        theirs, mine = shards.tensors_of(stored), shards.tensors_of(model_dir)
    except CheckpointError as error:
        raise ModelError(f"it cannot be loaded back from MLflow: {error}") from error
    alive = Heartbeat("comparing tensors", len(mine), "tensors")
    for done, (name, tensor) in enumerate(mine.items()):
        alive(done)
        other = theirs.pop(name, None)
        if other is None:
            return f"{name} is not there"
        if not (other.file.samefile(tensor.file) or same(tensor.read(), other.read())):
            return f"{name} is not as in {tensor.file}"
    return f"{next(iter(theirs))} is not in {model_dir}" if theirs else None


def whole(job: Job, model_dir: Path) -> Found:
    """Loaded as others will load it, in this one process."""
    try:
        served = load_served(job.package)
    except Exception as error:  # of MLflow, transformers, peft, safetensors: whatever is wrong with the files
        raise ModelError(f"it cannot be loaded back from MLflow: {type(error).__name__}: {error}") from error
    wrong = difference(served, model_dir)
    if wrong:
        raise ModelError(f"loaded back from MLflow it is another model: {wrong}")
    text = ""
    with only_a_look("a text of the model"):
        text = generate(served, job.prompt, SAMPLE_TOKENS)
    return Found(text)


def sharded(config: RunConfig, job: Job, stored: Path) -> Found:
    """Loaded as it was trained, over the ranks: its forward passes write the text."""
    from training.comparison.scores import generate as write
    from training.distributed import join, leave, this_rank
    from training.engines.inference import load_for_inference

    ranks = this_rank()
    join(ranks, config.settings.stall_seconds)
    try:
        model = load_for_inference(stored, config.settings, ranks)
        tokenizer = load_tokenizer(stored)
        (written,) = write(model, tokenizer, [tokenizer.core.encode(job.prompt).ids], [[]], SHARED_TOKENS, ranks)
        return Found(written["text"])
    except (PandaError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"it cannot be loaded back from MLflow: {type(error).__name__}: {error}") from error
    finally:
        leave()


def difference(served: Any, model_dir: Path) -> str | None:
    """What a loaded model has other than the files of `model_dir`; None when every tensor is the same.

    A tensor that the model keeps under another name than the files (experts that are joined when they are loaded) is
    not compared; that none is missing, `served_model` sees to.
    """
    loaded = tensors_of(served.unwrap_python_model().model)
    files = sorted(model_dir.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # not a mapping
                if name in loaded and not same(stored.get_tensor(name), loaded[name].cpu()):
                    return f"{name} is not as in {file}"
    return None


def tensors_of(model: Any) -> dict[str, "Tensor"]:
    """Tensors by the names they have in the files: all of a model, of one with an adapter those of the adapter."""
    if not hasattr(model, "peft_config"):
        return model.state_dict()
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def same(one: "Tensor", other: "Tensor") -> bool:
    """Whether two tensors are equal in the coarser of their types: a file may be finer than what is computed in."""
    if one.shape != other.shape:
        return False
    coarser = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    import torch  # here: verbs that only look at the registry do without

    return torch.equal(one.to(coarser), other.to(coarser))


def generate(served: Any, prompt: str, max_new_tokens: int) -> str:
    """Text a loaded model writes after `prompt`."""
    return served.predict({"prompt": [prompt]}, params={"max_new_tokens": max_new_tokens})[0]


def main() -> None:
    """Command line: load back, write what was found beside the job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="RUN/config.yaml")
    parser.add_argument("--job", type=Path, required=True, help="what is to be loaded back")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = load_back(read_config(arguments.config), Job(**run_files.read_json(arguments.job)))
    if is_first():
        run_files.write_json(arguments.job.with_name(FOUND), asdict(found))


def is_first() -> bool:
    """Whether this is the rank that compares and writes."""
    return int(os.environ.get("RANK", "0")) == 0


if __name__ == "__main__":
    run_rank(main)
