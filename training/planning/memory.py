"""How much memory a step of training takes on each rank, part by part.

In: `ModelShape`, the training settings, what the ranks run on. Out: `Memory`; bytes on disk. Other phases: `phases.py`.
Pure arithmetic, microseconds: the engine's rules (ZeRO: arXiv 1910.02054, QLoRA: arXiv 2305.14314) applied to counts.
`benchmarks/memory.py` compares it with measured peaks, DeepSpeed's estimators and published footprints.

A step has two moments that can be the peak: the backward pass of the last layer (all activations are alive), and the
update (a copy of the gradients is). The larger one is the estimate.
"""

from dataclasses import dataclass

from training.engines.deepspeed import REDUCE_BUCKET_ELEMENTS, live_elements
from training.models.loss import CHUNK_ELEMENTS
from training.planning.hardware import Hardware
from training.planning.model_shape import ModelShape
from training.settings import CheckpointSettings, TrainSettings

FLOAT32 = 4
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a nibble; a byte for each 64 weights; a float32 for each 256 of those
STATE_BYTES = {"AdamW": 8.0, "LAMB": 8.0, "Adafactor": 0.02}
EIGHT_BIT_STATE_BYTES = 2.06
SUB_GROUP_ELEMENTS = 1_000_000_000  # updated at a time (ZeRO 3)
CHUNK_COPIES = 3  # logits, the exponentials of their normaliser, their gradient
LAYER_TRANSIENT = 0.5  # gradients inside a layer, as a part of what the layer saves
CHECKPOINT_BYTES = 12  # float32 weight and two states of each trained parameter


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank; `host` is CPU memory beside it, and not in the total."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    update: float  # a copy of the gradients while the update is made, when there are no activations
    engine: float  # buckets, gathered weights, the process itself
    host: float = 0.0

    @property
    def total(self) -> float:
        """At the larger of the two moments that can be the peak."""
        held = self.weights + self.gradients + self.optimizer + self.engine
        return held + max(self.activations + self.logits, self.update)


def estimate(shape: ModelShape, settings: TrainSettings, hardware: Hardware) -> Memory:
    """Memory of each rank at the peak of a step."""
    engines = {-1: _fsdp, 0: _plain, 1: _zero12, 2: _zero12, 3: _zero3}
    parts = engines[stage_of(settings)](shape, settings, hardware)
    parts["activations"] = activations(shape, settings)
    parts["logits"] = _logits(shape, settings, hardware)
    parts["update"] = _update_gradients(shape, settings, hardware)
    tensors = Memory(**parts).total
    parts["engine"] += hardware.with_overhead(tensors) - tensors
    return Memory(**parts, host=_host(shape, settings, hardware))


def stage_of(settings: TrainSettings) -> int:
    """ZeRO stage; -1 for FSDP."""
    return settings.zero_stage if settings.strategy == "deepspeed" else -1


def _frozen_bytes(shape: ModelShape, settings: TrainSettings, hardware: Hardware) -> float:
    frozen = shape.parameters - shape.trainable - shape.quantised
    dequantised = _dequantised(shape, settings) * hardware.element_bytes
    return frozen * hardware.element_bytes + shape.quantised * NF4_BYTES + dequantised


def _dequantised(shape: ModelShape, settings: TrainSettings) -> int:
    """4-bit weights that are unpacked at the peak: a matrix; of DoRA with dropout, which multiplies by them once more
    than bitsandbytes does, those of all layers whose activations are alive."""
    if not shape.quantised:
        return 0
    if settings.use_dora and settings.lora_dropout:
        return shape.quantised // (shape.num_layers if settings.gradient_checkpointing else 1)
    return shape.largest_matrix


def _sharded_bytes(shape: ModelShape, settings: TrainSettings, hardware: Hardware, element: int) -> float:
    """Frozen weights of a rank that shards them; the constants of 4-bit ones and an unpacked matrix are whole."""
    frozen = (shape.parameters - shape.trainable - shape.quantised) * element + shape.quantised * 0.5
    constants = shape.quantised * (NF4_BYTES - 0.5)
    dequantised = _dequantised(shape, settings) * hardware.element_bytes
    return frozen / hardware.ranks + constants + dequantised


def state_bytes(settings: TrainSettings) -> float:
    """Bytes of optimizer state for each trained parameter."""
    if settings.bit_training:
        return EIGHT_BIT_STATE_BYTES
    return STATE_BYTES[settings.optimizer] if isinstance(settings.optimizer, str) else STATE_BYTES["AdamW"]


def _plain(shape: ModelShape, settings: TrainSettings, hardware: Hardware) -> dict[str, float]:
    """ZeRO 0: all in float32 on every rank; under autocast a bfloat16 copy of what a layer multiplies by."""
    trainable = shape.trainable
    autocast = trainable * 2 if hardware.bf16 else 0
    reduced = min(trainable, REDUCE_BUCKET_ELEMENTS) * FLOAT32 if hardware.ranks > 1 else 0
    return {
        "weights": _frozen_bytes(shape, settings, hardware) + trainable * FLOAT32 + autocast,
        "gradients": trainable * FLOAT32,
        "optimizer": trainable * state_bytes(settings),
        "engine": reduced,
    }


def _zero12(shape: ModelShape, settings: TrainSettings, hardware: Hardware) -> dict[str, float]:
    """ZeRO 1 and 2: weights whole; float32 copy and states sharded; gradients float32, whole (1) or sharded (2)."""
    element, trainable = hardware.element_bytes, shape.trainable
    share = trainable / hardware.ranks
    on_rank = 0 if settings.offload_optimizer else 1
    whole = settings.zero_stage == 1 and not hardware.bf16  # in bfloat16 it is run as stage 2
    gradients = trainable * FLOAT32 if whole else share * FLOAT32 * on_rank
    bucket = (
        min(trainable, REDUCE_BUCKET_ELEMENTS) if hardware.is_gpu else 0
    )  # on a CPU its pages replace freed gradients
    return {
        "weights": _frozen_bytes(shape, settings, hardware) + trainable * element,
        "gradients": gradients,
        "optimizer": share * (FLOAT32 + state_bytes(settings)) * on_rank,
        "engine": bucket * FLOAT32,
    }


def _zero3(shape: ModelShape, settings: TrainSettings, hardware: Hardware) -> dict[str, float]:
    """ZeRO 3: everything sharded; some gathered weights alive at any moment."""
    element = hardware.element_bytes
    share = shape.trainable / hardware.ranks
    weights = _sharded_bytes(shape, settings, hardware, element) + share * element
    on_rank = 0 if settings.offload_optimizer else 1
    bucket = min(shape.trainable, REDUCE_BUCKET_ELEMENTS)
    copies = 1 if hardware.is_gpu else 2  # gloo scatters from copies
    live = live_elements(shape.parameters, hardware.is_gpu)
    return {
        "weights": 0 if settings.offload_parameters else weights,
        "gradients": share * FLOAT32 * on_rank,
        "optimizer": share * (FLOAT32 + state_bytes(settings)) * on_rank,
        "engine": min(shape.parameters, live) * element + copies * bucket * FLOAT32,
    }


def _fsdp(shape: ModelShape, settings: TrainSettings, hardware: Hardware) -> dict[str, float]:
    """FSDP2: float32 shards; two layers gathered in the type that is computed in, and one layer's whole gradient."""
    trained = shape.trainable / hardware.ranks
    return {
        "weights": _sharded_bytes(shape, settings, hardware, FLOAT32) + trained * FLOAT32,
        "gradients": trained * FLOAT32,
        "optimizer": trained * state_bytes(settings),
        "engine": 3 * max(shape.largest_layer, shape.vocabulary * shape.hidden_size) * hardware.element_bytes,
    }


def activations(shape: ModelShape, settings: TrainSettings) -> float:
    """What autograd keeps, and the gradients inside the layer that is being differentiated."""
    rows = settings.per_gpu_train_batch_size
    transient = LAYER_TRANSIENT * shape.layer_bytes
    if settings.gradient_checkpointing:
        return rows * (shape.checkpoint_bytes + shape.layer_bytes + transient)
    return rows * (shape.saved_bytes + transient)


def _logits(shape: ModelShape, settings: TrainSettings, hardware: Hardware) -> float:
    """A chunk of logits, or all of them; the gradient of the head's weight while it is made."""
    targets = settings.per_gpu_train_batch_size * shape.num_tokens
    whole = targets * shape.vocabulary
    elements = min(whole, max(CHUNK_ELEMENTS, shape.vocabulary)) if shape.plain_head else whole
    head = shape.vocabulary * shape.hidden_size if shape.trains_head else 0
    made = FLOAT32 + hardware.element_bytes if shape.plain_head else hardware.element_bytes
    return elements * (CHUNK_COPIES * FLOAT32) + head * made


def _update_gradients(shape: ModelShape, settings: TrainSettings, hardware: Hardware) -> float:
    """Gradients laid end to end for the update, where the engine copies them: ZeRO 1 and 2 in float32, and ZeRO 3."""
    stage, share = stage_of(settings), shape.trainable / hardware.ranks
    if stage < 1 or settings.offload_optimizer or (stage < 3 and hardware.bf16):
        return 0.0
    return (min(share, SUB_GROUP_ELEMENTS) if stage == 3 else share) * FLOAT32


def _host(shape: ModelShape, settings: TrainSettings, hardware: Hardware) -> float:
    """CPU memory of a rank on a GPU: for what is offloaded, and for the copy of its part of a checkpoint.

    Weights are read from their files tensor by tensor.
    """
    share = shape.trainable / hardware.ranks
    states = share * (2 * FLOAT32 + state_bytes(settings)) if settings.offload_optimizer else 0
    weights = shape.parameters / hardware.ranks * hardware.element_bytes if settings.offload_parameters else 0
    copy = share * CHECKPOINT_BYTES if hardware.is_gpu else 0
    return states + weights + copy


def disk_bytes(num_trained: int, num_saved: int, settings: CheckpointSettings) -> int:
    """Disk that a run takes at most: the checkpoints kept, one more while it is written, the model in float32."""
    kept = settings.keep_last + settings.keep_best + 1
    return kept * CHECKPOINT_BYTES * num_trained + FLOAT32 * num_saved
