"""A registered model proves itself: it is loaded back from MLflow, and its tensors are those of RUN/model.

In: the URI of a logged model, RUN/model. Out: the model, loaded through `mlflow.pyfunc`; an error that says what is
wrong with it. Cost: the weights once in memory and one more pass over the files, a tensor at a time.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from training.errors import ModelError
from training.lean_imports import silence_vain_warnings
from training.tracking.sync import away_errors, connect

if TYPE_CHECKING:
    from torch import Tensor


def load_served(model_uri: str, uri: str) -> Any:
    """A registered model, loaded through `mlflow.pyfunc`."""
    connect(uri)
    import mlflow

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    silence_vain_warnings()
    return mlflow.pyfunc.load_model(model_uri)


def load_back(model_uri: str, uri: str, model_dir: Path) -> Any:
    """The model that MLflow has, which is to be that of `model_dir`.

    :raises ModelError: it cannot be loaded at all, or is another one.
    """
    try:
        served = load_served(model_uri, uri)
    except away_errors():
        raise
    except Exception as error:  # of MLflow, transformers, peft, safetensors: whatever is wrong with the files
        raise ModelError(f"it cannot be loaded back from MLflow: {type(error).__name__}: {error}") from error
    wrong = difference(served, model_dir)
    if wrong:
        raise ModelError(f"loaded back from MLflow it is another model: {wrong}")
    return served


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
