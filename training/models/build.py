"""The model to train: from a directory or from scratch, whole, with an adapter, or with frozen 4-bit weights.

In: settings, directories, device. Out: a transformers model (wrapped by peft for LoRA) that computes on `device`
after the engine has put its weights in place: until then they are in their files (`deferred.py`), or are still to be
drawn (`drawn.py`). Saving writes what is deployed: safetensors (the adapter only for LoRA), the tokenizer's files and a
generation config with eos. Cost: headers of files.

peft and bitsandbytes are imported only when asked for: they take up to 20 s on a cold disk.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from data_prep.targets import load_target
from data_prep.tokenizer import ids_of, load_tokenizer
from training.devices import any_device, uses_bf16
from training.errors import ModelError
from training.lean_imports import silence_vain_warnings
from training.models import attention
from training.models.adapter import add_adapter, magnitudes, room_for_lengths
from training.models.deferred import Values, deferring
from training.models.drawn import drawn
from training.models.hub import base_of
from training.models.loss import causal_model
from training.models.transformers4 import write_for_transformers4
from training.models.weight_files import write_whole
from training.settings import TrainSettings

silence_vain_warnings()
log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def load_model(settings: TrainSettings, model_dir: str | None, tokenizer_dir: str, dtype: torch.dtype) -> nn.Module:
    """The model in training mode, whole, in CPU memory."""
    model, values = empty_model(settings, model_dir, tokenizer_dir, dtype)
    values.fill(torch.device("cpu"))
    return model


def empty_model(
    settings: TrainSettings, model_dir: str | None, tokenizer_dir: str, dtype: torch.dtype
) -> tuple[nn.Module, Values]:
    """The model in training mode, and the values of what is still empty of it, for an engine to put in place.

    Initialisation (of a model from scratch, of an adapter) depends on the seed only.
    """
    torch.manual_seed(settings.seed)
    values = Values()
    if model_dir is None:
        causal = from_scratch(settings, tokenizer_dir, values)
    else:
        causal = from_directory(settings, model_dir, dtype, values)
    keep_differentiable(causal)
    _check_vocabulary(causal, tokenizer_dir)
    causal.config.use_cache = False
    rows = ids_of(load_tokenizer(Path(tokenizer_dir)).core, settings.add_tokens) if settings.add_tokens else []
    model = add_adapter(causal, settings, values, rows) if settings.use_lora else causal
    if settings.gradient_checkpointing:
        causal.activation_checkpointing_enable({"use_reentrant": False})
    return model.train(), values


def from_scratch(settings: TrainSettings, tokenizer_dir: str, values: Values) -> PreTrainedModel:
    """A model of random float32 weights, which `values` will draw; vocabulary and special tokens: the tokenizer's."""
    if not settings.architecture:
        raise ModelError(f"model={settings.model!r} has neither ckpt_path nor architecture; give one of them")
    config = config_of(
        {**settings.architecture, **special_tokens(tokenizer_dir), "vocab_size": vocabulary_size(tokenizer_dir)}
    )

    def build(kind: str | None) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=kind)

    return _with_attention(settings, lambda kind: drawn(config.model_type, lambda: build(kind), values))


def config_of(architecture: dict[str, Any]) -> PreTrainedConfig:
    """The configuration an architecture means: its fields, or what its `_target_` returns for them."""
    if "_target_" in architecture:
        return load_target(architecture, "architecture")()
    return AutoConfig.for_model(**architecture)


def from_directory(settings: TrainSettings, model_dir: str, dtype: torch.dtype, values: Values) -> PreTrainedModel:
    """A model for the weights of a directory in safetensors, which `values` will read; 4-bit ones with `use_quant`."""
    if not Path(model_dir, "config.json").is_file():
        raise ModelError(f"{model_dir}: no config.json; ckpt_path must be a Hugging Face checkpoint directory")
    options: dict[str, Any] = {"quantization_config": four_bits(dtype)} if settings.use_quant else {}
    try:
        with deferring(values):
            return _with_attention(
                settings,
                lambda kind: AutoModelForCausalLM.from_pretrained(
                    Path(model_dir).absolute(),
                    dtype=dtype,
                    attn_implementation=kind,
                    trust_remote_code=settings.trust_remote_code,
                    local_files_only=True,
                    use_safetensors=True,
                    **options,
                ),
            )
    except OSError as error:
        raise ModelError(f"{model_dir}: {error}") from error


def keep_differentiable(model: nn.Module) -> nn.Module:
    """Forbid bitsandbytes' CPU kernel for AVX512-BF16.

    It repacks weights at the first evaluation; from then on no gradient passes the layer, silently, in training too.
    """
    part: Any  # torch knows nothing of what bitsandbytes adds
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
    return model


def four_bits(dtype: torch.dtype) -> Any:
    """nf4 with double quantisation (arXiv 2305.14314); products are computed in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _with_attention(settings: TrainSettings, build: Callable[[str | None], PreTrainedModel]) -> PreTrainedModel:
    """Build with the attention asked for; `auto`: FlashAttention if it fits, else by segment, else the model's own.

    FlashAttention computes in 16 bits only; in float32 it would fail in the first forward pass. By segment without a
    kernel for it (float32 on a GPU), thousands of short calls would be slower than a mask.
    """
    from transformers.utils import is_flash_attn_2_available

    if settings.attention != "auto":
        return build(settings.attention)
    device = any_device()
    if uses_bf16(settings, device) and is_flash_attn_2_available():
        try:
            return build("flash_attention_2")
        except ValueError as error:  # some models have no such implementation
            log.info("no FlashAttention: %s", error)
    model = build(None)
    if (device.type == "cpu" or uses_bf16(settings, device)) and attention.fits(model.config):
        attention.use(model)
    return model


def vocabulary_size(tokenizer_dir: str) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True, trust_remote_code=False))


def special_tokens(tokenizer_dir: str) -> dict[str, int | None]:
    """Ids of bos, eos and pad, for the model's configuration."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True, trust_remote_code=False)
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def num_embeddings(model: PreTrainedModel) -> int:
    """Rows of the embedding: at least the tokenizer's tokens."""
    embedding: Any = model.get_input_embeddings()
    return getattr(embedding, "original_module", embedding).weight.shape[0]  # below what peft trains of it


def _check_vocabulary(model: PreTrainedModel, tokenizer_dir: str) -> None:
    embeddings = num_embeddings(model)
    tokens = vocabulary_size(tokenizer_dir)
    if tokens > embeddings:
        raise ModelError(
            f"{tokenizer_dir}: {tokens} tokens, but the model has only {embeddings} embeddings; "
            "use the tokenizer that belongs to the model"
        )


def save_model(model: Any, weights: Mapping[str, Tensor], tokenizer_dir: str, directory: Path) -> None:
    """Write the model, or the adapter of peft's wrapper of one, for deployment; one process.

    :param weights: whole weights and their names
    """
    if causal_model(model) is not model:
        directory.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(directory, state_dict=dict(weights))
    else:
        write_whole(model, weights, directory)
    save_companions(model, tokenizer_dir, directory)


def save_companions(model: Any, tokenizer_dir: str, directory: Path) -> None:
    """Everything that belongs to the weights in a directory, which are then looked at."""
    copy_tokenizer(tokenizer_dir, directory)
    generation = causal_model(model).generation_config or GenerationConfig()
    tokens: dict[str, Any] = {name: value for name, value in special_tokens(tokenizer_dir).items() if value is not None}
    if isinstance(generation.eos_token_id, list):  # several ways to stop: keep them all
        tokens["eos_token_id"] = sorted({*generation.eos_token_id, tokens["eos_token_id"]})
    GenerationConfig(**{**generation.to_diff_dict(), **tokens}).save_pretrained(directory)
    config: PreTrainedConfig = causal_model(model).config
    config.use_cache = True
    config.save_pretrained(directory)
    config.use_cache = False
    write_for_transformers4(directory)
    check_saved(directory)


def copy_tokenizer(tokenizer_dir: str, directory: Path) -> None:
    """The tokenizer's files as they are: the ids that training saw are the ids that generation will see."""
    for name in TOKENIZER_FILES:
        if Path(tokenizer_dir, name).is_file():
            shutil.copyfile(Path(tokenizer_dir, name), directory / name)


def check_saved(directory: Path) -> None:
    """Re-read the tensors' headers: empty tensors mean that a sharded engine saved its shards (peft issue 2450)."""
    from safetensors import safe_open

    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            empty = [name for name in tensors.keys() if 0 in tensors.get_slice(name).get_shape()]  # noqa: SIM118  # not a mapping
        if empty:
            raise ModelError(f"{file}: {len(empty)} tensors are empty, first {empty[0]}; the model was not gathered")


def load_deployed(
    directory: Path,
    dtype: torch.dtype | str = torch.float32,
    base_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """What `save_model` wrote, whole, in CPU memory, in evaluation mode."""
    empty = empty_deployed(directory, dtype, base_dir, trust_remote_code=trust_remote_code)
    empty.values.fill(torch.device("cpu"))
    return empty.model


@dataclass
class Empty:
    """A model, and the values of what is still empty of it."""

    model: Any
    values: Values


def empty_deployed(
    directory: Path,
    dtype: torch.dtype | str,
    base_dir: Path | None = None,
    quantised: bool = False,
    trust_remote_code: bool = False,
) -> Empty:
    """What `save_model` wrote, in evaluation mode: the whole model, or base (`base_dir` where it moved) and adapter."""
    base = base_of(directory)
    empty = empty_weights(base_dir or Path(base or directory), dtype, quantised and bool(base), trust_remote_code)
    if base:
        put_adapter(empty, "default", directory)
    empty.model.eval()
    return empty


def empty_weights(directory: Path, dtype: torch.dtype | str, quantised: bool, trust_remote_code: bool) -> Empty:
    """The model of a directory, without adapters, to be filled with its weights or with 4 bits of each.

    :raises ModelError: a tensor is not in the files (transformers would draw random numbers), or code would run that
        nobody trusts.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    if quantised:
        assert isinstance(dtype, torch.dtype), "4-bit weights compute in a type that is known"
        options["quantization_config"] = four_bits(dtype)
    values = Values()
    try:
        with deferring(values):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(directory), dtype=dtype, local_files_only=True, use_safetensors=True, **options
            )
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"{directory}: the code of this model comes with its files, and runs only with --trust_remote_code"
        ) from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(f"{directory}: {len(missing)} tensors of the model are not in its files, first {missing[0]}")
    return Empty(keep_differentiable(model), values)


def put_adapter(empty: Empty, name: str, directory: Path) -> None:
    """Give the model one adapter more, under a name.

    :raises ModelError: it cannot be read, or belongs to another model.
    """
    from peft import PeftModel

    try:
        with empty.values.standing_in(), magnitudes(room_for_lengths):
            if hasattr(empty.model, "peft_config"):
                empty.model.load_adapter(directory, adapter_name=name)
            else:
                empty.model = PeftModel.from_pretrained(empty.model, directory, adapter_name=name)
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise ModelError(f"{directory}: no adapter of this model ({error})") from error
