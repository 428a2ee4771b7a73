"""The settings of training: every field is a flag, a form field and an MLflow param.

Imports no torch, so that ``--help`` and a configuration error answer at once. Defaults are those of the PandaLLM guide
where it states one. In: plain values. Out: frozen, validated pydantic models. Cost: none, no I/O.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from data_prep.settings import SeedSettings, Settings, Target, name_or_target

OPTIMIZERS = ("AdamW", "LAMB", "Adafactor")
TIME_TO_SAVE = 0.9  # of `stop_deadline_seconds`; the rest is for the end of the processes
SCHEDULES = ("linear", "cosine", "constant", "poly", "warmup")
Decay = Annotated[float, Field(ge=0, lt=1)]


class ModelSettings(Settings):
    """Model"""

    model: str = Field(
        "panda-tiny",
        description="Model to train: a name in configs/model (panda-tiny, llama-7b, ...), a directory, or a hub id.",
    )
    ckpt_path: str | None = Field(
        None, description="Weights to start from: a directory, a folder below ./pretrained-models, or a hub id."
    )
    delta_base: str | None = Field(
        None,
        description="What a delta checkpoint (weights minus a base, such as llama-panda-zh-7b-delta) is added to: a "
        "directory, a folder below ./pretrained-models, or a hub id.",
    )
    add_tokens: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None,
        description="New tokens, such as [<tool>, </tool>], that the tokenizer keeps whole from then on. Their rows of "
        "embedding and output layer start as the mean of the old ones; beside an adapter only these rows are trained.",
    )
    architecture: dict[str, Any] | None = Field(
        None,
        description="Hugging Face config (with `model_type`) of a model initialised from scratch, or a `_target_` node "
        "that returns one.",
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="auto = bf16 on GPUs that have it, float32 elsewhere."
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="auto = FlashAttention where it is installed, else torch's own kernel for packed segments on GPUs "
        "in 16 bits and one segment at a time on CPU, else the model's own choice.",
    )
    trust_remote_code: bool = Field(False, description="Run model code that comes with the checkpoint. Off is safe.")


class LoraSettings(Settings):
    """LoRA and quantisation"""

    use_lora: bool = Field(False, description="Train a low-rank adapter instead of the weights (arXiv 2106.09685).")
    lora_r: int = Field(64, ge=1, description="Rank of the adapter.")
    lora_alpha: float = Field(16, gt=0, description="Scale of the adapter: its output is multiplied by alpha / r.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before the adapter.")
    lora_target_modules: list[str] | None = Field(
        None, description="Names of the linear layers that get an adapter; None = all of them but the head."
    )
    use_rslora: bool = Field(
        False,
        description="Scale the adapter by alpha / sqrt(r), so that high ranks learn as well (arXiv 2312.03732).",
    )
    use_dora: bool = Field(
        False,
        description="Train the length of every row of an adapted weight apart from its direction (arXiv 2402.09353).",
    )
    init_lora_weights: Literal["kaiming", "pissa"] = Field(
        "kaiming",
        description="What the adapter starts from: random numbers that change nothing (kaiming), or the largest parts "
        "of the weights, which leave the base (pissa; arXiv 2404.02948). Deployed it fits the base as it was, at twice "
        "the rank.",
    )
    modules_to_save: list[str] | None = Field(
        None,
        description="Names of modules that are trained whole beside the adapter, such as [embed_tokens, lm_head]; "
        "those that share a weight are trained as one.",
    )
    trainable_token_indices: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="Ids of tokens whose rows of embedding and output layer are trained beside the adapter; the other "
        "rows stay as they are.",
    )
    use_quant: bool = Field(
        False,
        description="Keep the frozen weights in 4 bits (nf4, double quantisation; arXiv 2305.14314) below an adapter.",
    )


class OptimizerSettings(Settings):
    """Optimizer and schedule"""

    optimizer: Annotated[str | dict[str, Any], name_or_target(*OPTIMIZERS)] = Field(
        "AdamW", description="AdamW, LAMB, Adafactor, or a `_target_` node called with the parameter groups."
    )
    use_nvlamb: bool = Field(False, description="LAMB with NVIDIA's gradient pre-normalisation (arXiv 1904.00962).")
    bit_training: bool = Field(False, description="Optimizer states in 8 bits (bitsandbytes AdamW or LAMB).")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    loraplus_lr_ratio: float = Field(
        1.0,
        ge=1,
        description="LoRA+: the learning rate of each adapter's B is so many times that of all else "
        "(arXiv 2402.12354); 1 = LoRA.",
    )
    lr_scheduler: Annotated[str | dict[str, Any], name_or_target(*SCHEDULES)] = Field(
        "warmup", description="linear, cosine, constant, poly, warmup (constant after warm-up), or a `_target_` node."
    )
    warmup_steps: int = Field(50, ge=0, description="Optimizer steps of linear warm-up.")
    warmup_proportion: float = Field(
        0.0, ge=0, le=1, description="Warm-up as a proportion of all steps; excludes warmup_steps."
    )
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay of matrices; norms and biases have none."
    )
    adam_epsilon: float = Field(1e-6, gt=0, description="Epsilon of Adam and LAMB.")
    adam_betas: tuple[Decay, Decay] = Field(
        (0.9, 0.99), description="Decay of the gradient and squared-gradient means."
    )
    max_grad_norm: float = Field(0.3, ge=0, description="Clip the global gradient norm to this; 0 = never.")

    @model_validator(mode="after")
    def one_kind_of_warmup(self) -> Self:
        """Two lengths of one warm-up contradict each other."""
        if self.warmup_proportion and self.warmup_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_proportion={self.warmup_proportion} "
                "contradict each other; set one of them to 0"
            )
        return self


class BatchSettings(SeedSettings):
    """Batches and length of training"""

    per_gpu_train_batch_size: int = Field(1, ge=1, description="Rows in a micro-batch of one rank.")
    per_gpu_eval_batch_size: int = Field(2, ge=1, description="Rows in an evaluation batch of one rank.")
    gradient_accumulation_steps: int = Field(64, ge=1, description="Micro-batches a rank adds up before an update.")
    num_train_epochs: float = Field(1, gt=0, description="Passes over the training rows.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps to stop after; -1 = as num_train_epochs says.")
    num_workers: int = Field(2, ge=0, description="Threads that load rows ahead of training; 0 = load when needed.")
    prefetch_factor: int = Field(2, ge=1, description="Batches each loading thread keeps ready.")

    def rows_per_step(self, num_ranks: int) -> int:
        """Rows of the global batch: of all micro-batches of all ranks."""
        return self.per_gpu_train_batch_size * self.gradient_accumulation_steps * num_ranks

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole training."""
        return self.max_steps if self.max_steps >= 0 else math.ceil(self.num_train_epochs * steps_per_epoch)


class EngineSettings(Settings):
    """Engine: processes, sharding, memory"""

    num_processes: int = Field(0, ge=0, description="Ranks on this machine; 0 = one per GPU, or 2 without GPU.")
    strategy: Literal["deepspeed", "fsdp"] = Field("deepspeed", description="Engine that shards the training state.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="DeepSpeed ZeRO stage (arXiv 1910.02054): what the ranks shard."
    )
    offload_optimizer: bool = Field(False, description="Keep optimizer states in CPU memory (ZeRO 1 to 3).")
    offload_parameters: bool = Field(False, description="Keep weights in CPU memory (ZeRO 3).")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations: half the memory, ~0.75 x the speed."
    )
    compile: bool = Field(
        False,
        description="torch.compile every decoder layer: minutes at the start, for GPUs to be faster afterwards (not "
        "measured by us). Not with ZeRO 3.",
    )
    nodes: int = Field(1, ge=1, description="Machines that train together; above 1 torchrun's rendezvous joins them.")
    node_rank: int = Field(0, ge=0, description="Number of this machine, 0 to nodes - 1 (when nodes > 1).")
    master_addr: str = Field("127.0.0.1", description="Address of machine 0, where the ranks meet.")
    master_port: int = Field(0, ge=0, lt=65536, description="Port on machine 0; 0 = a free one (29500 with nodes > 1).")
    hostfile: str | None = Field(
        None, description="DeepSpeed hostfile (`host slots=8` a line): start all machines from this one through pdsh."
    )
    halve_batch_on_out_of_memory: bool = Field(
        True,
        description="Out of memory: halve per_gpu_train_batch_size, double gradient_accumulation_steps (same rows a "
        "step, same loss) and go on from the last checkpoint.",
    )
    stall_seconds: float = Field(
        600,
        ge=0,
        description="Without a sign of progress for this long, or ten median steps if that is longer, the stacks of "
        "all ranks are logged and the run ends. 0 = wait for ever.",
    )


class CheckpointSettings(Settings):
    """Checkpoints and evaluation in the loop"""

    save_steps: int = Field(0, ge=0, description="Checkpoint every so many steps; 0 = ten times in a run.")
    keep_last: int = Field(2, ge=1, description="Complete checkpoints to keep.")
    keep_best: bool = Field(False, description="Also keep, and deploy, the checkpoint with the lowest held-out loss.")
    eval_steps: int = Field(0, ge=0, description="Held-out loss every so many steps; 0 = only before and after.")
    early_stop_patience: int = Field(
        0, ge=0, description="Stop after so many evaluations without a lower held-out loss; 0 = never."
    )
    stop_deadline_seconds: float = Field(
        25,
        gt=0,
        description="Seconds a cancelled run has to write a checkpoint before its ranks are killed; where the last "
        "one took longer, it ends at once and says how many steps are lost.",
    )
    callbacks: list[Target] | None = Field(
        None,
        description="`_target_` nodes of functions that rank 0 calls after each step with what metrics.jsonl gets.",
    )


class SpikeSettings(Settings):
    """Spikes: a step whose loss or gradient norm is out of the ordinary"""

    on_spike: Literal["off", "warn", "skip", "rewind"] = Field(
        "warn",
        description="Loss or gradient norm more than 6 sigma above the last 128 steps (robust): warn = tell, with the "
        "records that stand out; skip = also make no update in such a step; rewind = also go back to the newest "
        "checkpoint and pass over the rows since. skip and rewind put the records into `quarantine`.",
    )


class CostSettings(Settings):
    """Cost: hours of the GPUs, and their price"""

    max_gpu_hours: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Training ends after the last step that leaves time, within so many GPU-hours of the whole run, "
        "earlier starts included, for the checkpoint, evaluation, registration and gate (without GPUs: hours of its "
        "ranks). None = no limit.",
    )
    price_per_gpu_hour: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        examples=[2.5],
        description="What a GPU costs an hour (without GPUs: a rank); None = the reports show no price.",
    )
    currency: str = Field("USD", pattern=r"^[A-Z]{3}$", description="Of the price: three letters, as in ISO 4217.")


class TrainSettings(
    ModelSettings,
    LoraSettings,
    OptimizerSettings,
    BatchSettings,
    EngineSettings,
    CheckpointSettings,
    SpikeSettings,
    CostSettings,
):
    """All that the training worker needs to know."""

    @property
    def loads_what_it_computes_in(self) -> bool:
        """Weights are read in the type of the computation, else in float32, because the engine trains them themselves.

        ZeRO 1 to 3 keep a float32 copy of bfloat16 weights; frozen weights need none.
        """
        return self.strategy == "deepspeed" and (self.use_lora or self.zero_stage > 0)


class TrackingSettings(Settings):
    """Tracking and registry"""

    mlflow_tracking_uri: str | None = Field(
        None,
        description="MLflow server or database; None = what the environment variable MLFLOW_TRACKING_URI says, "
        "else sqlite in the output directory, created when missing.",
    )
    experiment_name: str = Field(
        "panda-train", min_length=1, examples=["panda-train"], description="MLflow experiment of the run."
    )
    registered_model_name: str | None = Field(
        None,
        pattern=r"^\w[\w .-]*$",
        examples=["panda-llama-7b"],
        description="Registered model that gets the new version; None = panda-<model>.",
    )


def _limits_of(name: str, *others: str) -> AfterValidator:
    """Check the entries of a mapping name -> limits: the fields `name` and `others`, and what all have in common."""

    def check(value: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
        for key, entry in (value or {}).items():
            unknown = entry.keys() - {name, *others, "higher_is_better", "max_regression"}
            if unknown or not isinstance(entry.get("higher_is_better", True), bool):
                raise ValueError(f"{key}: its fields are {name}, higher_is_better (true or false), max_regression (a "
                                 f"number >= 0){''.join(f', {other}' for other in others)}")  # fmt: skip
            limit = entry.get("max_regression", 0.0)
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 0:
                raise ValueError(f"{key}: max_regression={limit!r} must be a number >= 0")
            if name == "function" and not isinstance(entry.get(name), dict):
                raise ValueError(f"{key}: function must be a `_target_` node")
        return value

    return AfterValidator(check)


class GateSettings(Settings):
    """Gate: when a new version becomes the champion"""

    promote_min_gain: float = Field(
        0.0,
        ge=0,
        description="The `champion` alias moves only when the held-out loss per target token has certainly fallen by "
        "more than this (lower bound of a paired bootstrap, wrong in 2 % of the cases at most; 30 records or more).",
    )
    max_slice_regression: float = Field(
        0.02,
        ge=0,
        description="... and when on no slice (source x language) it has certainly risen, by more than this.",
    )
    max_regression: float = Field(
        0.05,
        ge=0,
        description="... nor elsewhere: on `neutral_texts`, and on records that were held out for the champion and are "
        "not in this corpus.",
    )
    neutral_texts: str | None = Field(
        None,
        description="File of texts (.json, .jsonl) on which a version is asked whether it has forgotten what it knew; "
        "None = the 100 bundled ones, English and Chinese.",
    )
    gate_metrics: Annotated[dict[str, dict[str, Any]] | None, _limits_of("function")] = Field(
        None,
        description="Metrics of your own on generated answers, by name: {function: a `_target_` node called with "
        "`prompt`, `answer` and `target` that returns a number, higher_is_better: true, max_regression: 0}.",
    )
    gate_benchmarks: Annotated[
        dict[str, dict[str, Any]] | None, _limits_of("metric", "task_dir", "limit", "num_fewshot", "chat")
    ] = Field(
        None,
        description="Tasks of lm-eval that the gate asks, by name: {metric: acc, higher_is_better: true, "
        "max_regression: 0, limit: 200, task_dir, num_fewshot, chat}.",
    )
    gate_prompts: int = Field(16, ge=1, description="Held-out prompts that each model answers, for checks and metrics.")
    max_overlap: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Held-out records, neutral texts and benchmark questions of which one training record holds this "
        "share or more (runs of 36 bytes, without case, spacing and punctuation) are left out of the comparison.",
    )
    gate_records: int = Field(
        400,
        ge=1,
        description="Held-out records of each source on which candidate, champion and base are compared (the lowest "
        "content hashes).",
    )
