"""Which settings work together, as code: what follows from what was asked for, and what is refused, why, and instead.

In: training settings, the model's configuration as plain JSON (or None), whether rows are packed. Out: settings that
are implied; a list of problems, which `check` raises all at once. No torch import: the plan calls this before any GPU
is asked for.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import CompatibilityError
from training.settings import TrainSettings


@dataclass(frozen=True)
class Case:
    """What the rules look at."""

    settings: TrainSettings
    model_config: dict[str, Any] | None  # config.json of the checkpoint; None = from scratch
    packing: bool
    max_seq_length: int | None = None  # None = not asked

    @property
    def architecture(self) -> dict[str, Any]:
        """The configuration of the language model: of the checkpoint, or of one from scratch."""
        whole = self.model_config or self.settings.architecture or {}
        return whole.get("text_config") or whole

    @property
    def max_positions(self) -> float | None:
        """Tokens that the model can tell the places of, as stated or by the scaling of its rotary embedding."""
        stated = self.architecture.get("max_position_embeddings") or self.architecture.get("n_positions")
        rope = self.architecture.get("rope_scaling") or self.architecture.get("rope_parameters") or {}
        scaled = int((rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or 0))
        return max(stated, scaled) if stated else None

    @property
    def num_experts(self) -> int:
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        return max(int(self.architecture.get(name) or 0) for name in names)

    @property
    def adapts_router(self) -> bool:
        """Whether an adapter of a mixture of experts would be on its router as well; without names it is on all."""
        names = self.settings.lora_target_modules
        trained = [*(names or ROUTERS), *(self.settings.modules_to_save or ())]
        return any(name.rpartition(".")[2] in ROUTERS for name in trained)

    @property
    def of_adapters(self) -> str:
        """Settings that mean something for an adapter alone, as they were given."""
        fields = type(self.settings).model_fields
        given = {name: getattr(self.settings, name) for name in OF_ADAPTERS}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value != fields[name].default)

    @property
    def last_row(self) -> int:
        """The highest of the rows of tokens that are trained; -1: none are."""
        return max(self.settings.trainable_token_indices or [-1])

    @property
    def zero(self) -> int:
        """ZeRO stage; 0 for another engine."""
        return self.settings.zero_stage if self.settings.strategy == "deepspeed" else 0

    @property
    def fsdp(self) -> bool:
        return self.settings.strategy == "fsdp"

    @property
    def optimizer(self) -> str:
        return self.settings.optimizer if isinstance(self.settings.optimizer, str) else "_target_"


@dataclass(frozen=True)
class Rule:
    """A combination that does not work. `why` and `instead` may name what is wrong: ``{case.max_seq_length}``."""

    what: str
    applies: Callable[[Case], bool]
    why: str
    instead: str


RULES: tuple[Rule, ...] = (
    Rule(
        "use_quant without use_lora",
        lambda case: case.settings.use_quant and not case.settings.use_lora,
        "4-bit weights are frozen: nothing would be trained",
        "add --use_lora",
    ),
    Rule(
        "settings of an adapter without use_lora",
        lambda case: bool(case.of_adapters) and not case.settings.use_lora,
        "{case.of_adapters} would change nothing: all weights are trained as they are",
        "add --use_lora, or leave them out",
    ),
    Rule(
        "init_lora_weights pissa with use_quant",
        lambda case: case.settings.init_lora_weights == "pissa" and case.settings.use_quant,
        "4 bits of a base without its largest parts are not those of the base, which the deployed adapter has to fit",
        "one of the two; --use_rslora and --loraplus_lr_ratio start faster as well",
    ),
    Rule(
        "trainable_token_indices beyond the vocabulary",
        lambda case: case.last_row >= case.architecture.get("vocab_size", case.last_row + 1),
        "there is no row {case.last_row}: the model has {case.architecture[vocab_size]}, from 0 on",
        "ids of its tokens; new tokens are named by add_tokens",
    ),
    Rule(
        "add_tokens with a model from scratch",
        lambda case: bool(case.settings.add_tokens) and case.model_config is None,
        "its tokenizer is made of this very corpus, of which no other text has ids yet",
        "leave it out, or give --ckpt_path",
    ),
    Rule(
        "use_lora or use_quant with a model from scratch",
        lambda case: (case.settings.use_lora or case.settings.use_quant) and case.model_config is None,
        "an adapter on frozen random weights learns nothing useful",
        "give --ckpt_path, or train the whole model",
    ),
    Rule(
        "compile with zero_stage 3",
        lambda case: case.settings.compile and case.zero == 3,
        "ZeRO 3 gathers weights between the operations that would be compiled into one",
        "--strategy fsdp, or --zero_stage 2",
    ),
    Rule(
        "offload_parameters without zero_stage 3",
        lambda case: case.settings.offload_parameters and case.zero != 3,
        "only ZeRO 3 gathers weights when they are needed",
        "--strategy deepspeed --zero_stage 3",
    ),
    Rule(
        "offload_optimizer without ZeRO 1 to 3",
        lambda case: case.settings.offload_optimizer and not case.zero,
        "only ZeRO's sharded optimizer can live in CPU memory",
        "--strategy deepspeed --zero_stage 2",
    ),
    Rule(
        "LAMB with zero_stage 1 to 3",
        lambda case: case.optimizer == "LAMB" and case.zero > 0,
        "LAMB needs the length of whole parameters, ZeRO gives it flat pieces of several",
        "--zero_stage 0 or --strategy fsdp",
    ),
    Rule(
        "Adafactor with zero_stage 1 to 3 or fsdp",
        lambda case: case.optimizer == "Adafactor" and (case.zero > 0 or case.fsdp),
        "Adafactor keeps sums over whole rows and columns of a matrix, a shard has only pieces of them",
        "--strategy deepspeed --zero_stage 0, or AdamW",
    ),
    Rule(
        "bit_training with zero_stage 1 to 3 or fsdp",
        lambda case: case.settings.bit_training and (case.zero > 0 or case.fsdp),
        "8-bit states are quantised in blocks that would straddle the shards of other ranks",
        "--zero_stage 0, or 32-bit states, which ZeRO already divides by the number of ranks",
    ),
    Rule(
        "bit_training with Adafactor or a `_target_` optimizer",
        lambda case: case.settings.bit_training and case.optimizer not in ("AdamW", "LAMB"),
        "bitsandbytes has AdamW and LAMB in 8 bits",
        "--optimizer AdamW or LAMB",
    ),
    Rule(
        "use_nvlamb without --optimizer LAMB in 32 bits",
        lambda case: case.settings.use_nvlamb and (case.optimizer != "LAMB" or case.settings.bit_training),
        "NVLAMB is LAMB with gradients divided by their norm, which bitsandbytes' 8-bit LAMB cannot do",
        "--optimizer LAMB without --bit_training",
    ),
    Rule(
        "attention flash_attention_2 with precision float32",
        lambda case: case.settings.attention == "flash_attention_2" and case.settings.precision == "float32",
        "FlashAttention computes in 16 bits only",
        "--attention auto, which takes it where it can be used, or --precision bf16",
    ),
    Rule(
        "max_seq_length above the positions of the model",
        lambda case: bool(case.max_seq_length and case.max_positions and case.max_seq_length > case.max_positions),
        "max_seq_length={case.max_seq_length}, but its config states {case.max_positions} positions: it knows no more",
        "--max_seq_length {case.max_positions}, or a checkpoint whose config.json scales its rotary embedding further",
    ),
    Rule(
        "a mixture of experts whose router would be trained",
        lambda case: case.num_experts > 1 and (not case.settings.use_lora or case.adapts_router),
        "what keeps its {case.num_experts} experts equally busy is a loss of the router, which is not computed here",
        "--use_lora --lora_target_modules [q_proj,k_proj,v_proj,o_proj], which leaves router and experts as they are",
    ),
    Rule(
        "packing with a recurrent or hybrid model",
        lambda case: case.packing and bool(recurrent_parts(case.model_config or case.settings.architecture or {})),
        "its state runs through the whole row, so the segments of a row would see each other",
        "--packing false",
    ),
)

ROUTERS = ("gate", "router", "all-linear")
OF_ADAPTERS = (
    "use_rslora", "use_dora", "loraplus_lr_ratio", "init_lora_weights", "modules_to_save", "trainable_token_indices",
)  # fmt: skip
RECURRENT_TYPES = frozenset(
    ("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm", "jamba", "zamba", "zamba2", "bamba",
     "falcon_h1", "nemotron_h", "granitemoehybrid", "lfm2", "lfm2_moe", "qwen3_next", "minimax", "kimi_linear",
     "plamo2")
)  # fmt: skip
RECURRENT_LAYERS = frozenset(
    ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "lightning_attention", "hybrid", "ssm")
)


def recurrent_parts(model_config: dict[str, Any]) -> list[str]:
    """Names of what in a model carries state along the row: its type, or kinds of its layers."""
    inner = model_config.get("text_config") or model_config
    found = {str(model_config.get("model_type"))} & RECURRENT_TYPES
    for key in ("layer_types", "layers_block_type", "block_types"):
        layers = inner.get(key)
        found |= set(layers) & RECURRENT_LAYERS if isinstance(layers, list) else set()
    return sorted(found)


def implied(settings: TrainSettings) -> dict[str, tuple[Any, str]]:
    """Settings that others leave one choice for, with that choice and whose it is; taken where nobody chose.

    4-bit weights are frozen, so `use_quant` means an adapter on them; whole-matrix optimizers and 8-bit states need
    whole parameters, which ZeRO 1 to 3 cut up.
    """
    values: dict[str, tuple[Any, str]] = {}
    if settings.use_quant:
        values["use_lora"] = (True, "use_quant")
    if settings.use_nvlamb:
        values["optimizer"] = ("LAMB", "use_nvlamb")
    if settings.bit_training or settings.use_nvlamb or settings.optimizer in ("LAMB", "Adafactor"):
        values["zero_stage"] = (0, "bit_training" if settings.bit_training else "the optimizer")
    return values


def problems(
    settings: TrainSettings, model_config: dict[str, Any] | None, packing: bool, max_seq_length: int | None = None
) -> list[str]:
    """One line for every rule that forbids these settings; empty when they work together."""
    case = Case(settings, model_config, packing, max_seq_length)
    broken = [rule for rule in RULES if rule.applies(case)]
    return [f"{rule.what}: {rule.why}. Instead: {rule.instead}".format(case=case) for rule in broken]


def check(settings: TrainSettings, model_dir: str | None, packing: bool, max_seq_length: int | None = None) -> None:
    """Raise a CompatibilityError that lists every problem."""
    config = json.loads(Path(model_dir, "config.json").read_text()) if model_dir else None
    found = problems(settings, config, packing, max_seq_length)
    if found:
        raise CompatibilityError("; ".join(found))
