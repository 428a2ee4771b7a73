"""A model without its weights: shapes on torch's meta device, and for each parameter where its value comes from.

In: a call of transformers' `from_pretrained`. Out: the model it would give, the parameters empty, and their `Values`:
read when an engine is ready to keep its part. A value is mapped from its file, so a rank that keeps a slice reads a
slice, and no process ever holds more than its share and one tensor. Everything else is as transformers makes it:
buffers are computed, tied weights are one (also where the files have both), what the files lack is drawn from the seed,
4-bit layers wait for weights.

transformers names the tensors (`rename_source_key`). Where it also joins or splits them (experts of some mixtures,
files that are 4-bit already), it loads the whole model in its own way, and a warning says so.

Cost: the headers of the files, and a model of Python objects.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.loading_report import LoadStateDictInfo

from training.errors import ModelError
from training.models.shards import TensorInfo, tensors_in

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Value:
    """What belongs into an empty parameter."""

    read: Callable[[], Tensor]  # all of it, in the type of the file; reading a part of the result reads a part
    dtype: torch.dtype  # what it is kept in, or quantised from
    layer: Any = None  # the layer of bitsandbytes whose 4-bit weight it becomes


class Values(dict[nn.Parameter, Value]):
    """The values of the parameters that are still empty."""

    def fill(self, device: torch.device, alive: Callable[[int], None] = lambda done: None) -> None:
        """Give every parameter all of its value, one after another; `alive` hears how many are done."""
        for done, parameter in enumerate(list(self)):
            alive(done)
            self.fill_one(parameter, device)

    def fill_one(self, parameter: nn.Parameter, device: torch.device) -> None:
        """Give a parameter all of its value."""
        value = self.pop(parameter)
        if value.layer is None:
            replace(parameter, value.read().to(device, value.dtype))
        else:
            from training.models.four_bits import whole_weight

            torch.utils.swap_tensors(parameter, whole_weight(value.layer, value.read, value.dtype, device))

    def by_name(self, module: nn.Module) -> dict[str, Value]:
        """The values by the names of their parameters in `module`; for engines that replace parameters."""
        return {name: self[parameter] for name, parameter in module.named_parameters() if parameter in self}

    @contextmanager
    def standing_in(self, copies_are_empty: bool = False) -> Iterator[None]:
        """Within it, empty parameters look as if they were on the CPU: peft puts adapters where the weights are.

        :param copies_are_empty: what is copied of them is empty as well, float32, and gets the same value; else it is
            memory for what a file has
        """
        stand_ins = {parameter: _stand_in(parameter) for parameter in self}
        if copies_are_empty:
            for parameter, stand_in in stand_ins.items():
                vars(stand_in)["__deepcopy__"] = partial(self._copied, parameter)  # which `copy.deepcopy` asks
        for parameter, stand_in in stand_ins.items():
            torch.utils.swap_tensors(parameter, stand_in)
        try:
            yield
        finally:
            for parameter, stand_in in stand_ins.items():
                torch.utils.swap_tensors(parameter, stand_in)
                parameter.requires_grad_(stand_in.requires_grad)

    def _copied(self, parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
        """An empty parameter, to be trained from the value of another."""
        value = self[parameter]
        if value.layer is not None:
            raise ModelError("a layer that is kept in 4 bits cannot be trained whole")
        empty = nn.Parameter(torch.empty(parameter.shape, device="meta"))
        self[empty] = Value(value.read, empty.dtype)
        return empty


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape and kind, of one number."""
    number = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
    options = {} if type(parameter) is nn.Parameter else vars(parameter)  # those of a 4-bit weight
    return type(parameter)(number, requires_grad=parameter.requires_grad, **options)


def make_shardable(values: Values, device: torch.device) -> None:
    """4-bit weights become parameters of bytes, which are quantised whole when they are read, and may be cut."""
    quantised = [parameter for parameter, value in values.items() if value.layer is not None]
    if quantised:
        from training.models.four_bits import shardable

        for parameter in quantised:
            value = values[parameter]
            values[parameter] = Value(shardable(parameter, value.layer, value.read, value.dtype, device), torch.uint8)


def replace(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Put another tensor, of any device and shape, in the place of a parameter, wherever that is referred to."""
    torch.utils.swap_tensors(parameter, nn.Parameter(tensor, requires_grad=parameter.requires_grad))


def check_filled(module: nn.Module) -> None:
    """Nothing may be left empty: a value that no engine took would be a fault here."""
    empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise ModelError(f"{len(empty)} tensors of the model were not loaded, first {empty[0]}")


@contextmanager
def deferring(values: Values) -> Iterator[None]:
    """Within it, `from_pretrained` reads no weights: it leaves their parameters empty, and their values in `values`."""
    name = "_load_pretrained_model"
    loading = PreTrainedModel.__dict__[name]

    def defer(
        model: PreTrainedModel, state_dict: Any, files: list[str], config: LoadStateDictConfig, expected: Any = None
    ) -> tuple[LoadStateDictInfo, Any]:
        values.clear()
        found = None if state_dict is not None else places(model, tensors_in([Path(file) for file in files]), config)
        if found is None:
            log.warning("transformers joins or splits tensors of %s: each rank loads the whole model", files[0])
            return loading.__func__(model, state_dict, files, config, expected)
        return _leave(model, _each_once(model, found), config, values), None

    setattr(PreTrainedModel, name, staticmethod(defer))
    try:
        yield
    finally:
        setattr(PreTrainedModel, name, loading)


def places(
    model: PreTrainedModel, tensors: dict[str, TensorInfo], config: LoadStateDictConfig
) -> dict[str, TensorInfo] | None:
    """The tensors of a checkpoint by their names in the model; None where they are not one for one, or differ in shape.

    Those the model has no place for keep their names.
    """
    if config.hf_quantizer is not None and config.hf_quantizer.pre_quantized:
        return None
    empty = model.state_dict()
    mapping = config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        place, joined = rename_source_key(name, renamings, converters, model.base_model_prefix, empty)
        if place not in empty and name in empty:  # as transformers does: a name that fits is not renamed
            place, joined = rename_source_key(name, [], [], model.base_model_prefix, empty)
        if joined is not None or place in found or (place in empty and not _fits(model, place, info, config)):
            return None
        found[place] = info
    return found


def _each_once(model: PreTrainedModel, found: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors without those that are tied to an equal one: transformers compares two only where both are in memory.

    Left in, they would be trained apart. Cost: reading both, where files have both.
    """
    copies = {
        name for name, other in model.all_tied_weights_keys.items()
        if {name, other} <= found.keys() and torch.equal(found[name].read(), found[other].read())
    }  # fmt: skip
    return {name: info for name, info in found.items() if name not in copies}


def _fits(model: PreTrainedModel, place: str, info: TensorInfo, config: LoadStateDictConfig) -> bool:
    """Whether a tensor has the shape of its place; a layer that becomes a 4-bit one may lie the other way round."""
    shape = tuple(model.get_parameter_or_buffer(place).shape)
    return info.shape == shape or (_quantised(model, place, config) and info.shape == shape[::-1])


def _quantised(model: PreTrainedModel, place: str, config: LoadStateDictConfig) -> bool:
    return config.hf_quantizer is not None and config.hf_quantizer.param_needs_quantization(model, place)


def _leave(
    model: PreTrainedModel, found: dict[str, TensorInfo], config: LoadStateDictConfig, values: Values
) -> LoadStateDictInfo:
    """Note the values of the parameters, load the buffers; what transformers wants to know of a loading."""
    places = set(model.state_dict())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in places & found.keys():
        if name in parameters:
            values[_marked(model, name, config)] = _value(model, name, found[name], config)
        else:
            buffer = model.get_buffer(name)
            owner, _, last = name.rpartition(".")
            owner_module: Any = model.get_submodule(owner)
            owner_module._buffers[last] = _initialised(found[name].read().to(buffer.dtype, copy=True))
    return LoadStateDictInfo(
        missing_keys=places - found.keys(),
        unexpected_keys=found.keys() - places,
        mismatched_keys=set(),
        conversion_errors={},
        error_msgs=[],
        skipped_pp_keys=set(),
    )


def _marked(model: PreTrainedModel, name: str, config: LoadStateDictConfig) -> nn.Parameter:
    """The empty parameter, in the type it is kept in; transformers will not initialise it."""
    parameter = model.get_parameter(name)
    dtype = parameter.dtype if _quantised(model, name, config) else _kept_in(name, parameter.dtype, config)
    if dtype != parameter.dtype:
        replace(parameter, parameter.to(dtype))
    return _initialised(parameter)


def _initialised(tensor: Any) -> Any:
    tensor._is_hf_initialized = True
    return tensor


def _value(model: PreTrainedModel, name: str, info: TensorInfo, config: LoadStateDictConfig) -> Value:
    if not _quantised(model, name, config):
        return Value(info.read, model.get_parameter(name).dtype)
    assert config.dtype is not None, "4-bit weights are quantised from the type that the model is loaded in"
    layer: Any = model.get_submodule(name.rpartition(".")[0])
    turned = info.shape != tuple(layer.weight.shape)
    return Value((lambda: info.read().t()) if turned or layer.source_cls is Conv1D else info.read, config.dtype, layer)


def _kept_in(name: str, dtype: torch.dtype, config: LoadStateDictConfig) -> torch.dtype:
    """Some models name weights that stay in float32."""
    if not config.dtype_plan:
        return dtype
    pattern, by_group, _ = build_glob_alternation(list(config.dtype_plan))
    match = pattern.search(name)
    return config.dtype_plan[by_group[match.lastgroup or ""]] if match else dtype
