"""What is trained beside frozen weights: a LoRA adapter in its variants, whole modules, rows of single tokens.

In: a transformers model whose weights are still empty, settings. Out: peft's wrapper of it, of which nothing else is
trained. LoRA is arXiv 2106.09685, rsLoRA 2312.03732, DoRA 2402.09353, PiSSA in `principal.py`; all of it is peft's,
which computes from the weights what some of it starts from. Where they are empty that waits in `Values` for an engine:

    magnitudes of DoRA   the lengths of a weight's rows: the whole weight is read for it, and in 4 bits rounded to these
    whole modules        copies, float32, read from the same places
    rows of tokens       read at once, as they are few

Cost: that of peft's import, up to 20 s on a cold disk; no weight is read but these rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from training.devices import any_device
from training.errors import ModelError
from training.models.deferred import Value, Values
from training.models.loss import causal_model
from training.models.principal import start_from_principal
from training.settings import TrainSettings


def add_adapter(
    model: nn.Module, settings: TrainSettings, values: Values | None = None, rows: Sequence[int] = ()
) -> nn.Module:
    """The model with an adapter on all linear layers but the head, or on the named ones; the rest is frozen.

    :param values: of the parameters that are empty; None = only shapes count
    :param rows: of tokens that are trained beside those that the settings name
    :raises ModelError: a name or a row is not of this model.
    """
    from peft import get_peft_model

    missing = Values() if values is None else values
    config = _config(model, settings, sorted({*(settings.trainable_token_indices or ()), *rows}))
    try:
        with missing.standing_in(copies_are_empty=True), magnitudes(partial(_lengths_later, missing)):
            adapted = get_peft_model(model, config)  # type: ignore[arg-type]  # a transformers model
    except (ValueError, TypeError, ModelError) as error:
        raise ModelError(_as_asked(settings) + str(error)) from error
    _read_rows(adapted, missing)
    if settings.init_lora_weights == "pissa" and values is not None:
        start_from_principal(adapted, values, settings.seed)
    return adapted


def _config(model: nn.Module, settings: TrainSettings, rows: list[int]) -> Any:
    """What peft is told."""
    from peft import LoraConfig

    whole = list(settings.modules_to_save or ())
    _check_names(model, whole)
    whole_ends = _whole_ends(model, whole)
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # annotated int, used as a number
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules or "all-linear",
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        modules_to_save=whole or None,
        exclude_modules=_linear_layers_in(model, whole) or None,
        trainable_token_indices=_rows_by_layer(model, rows, whole_ends),
        ensure_weight_tying=bool(whole_ends) and _are_tied(model),
        task_type="CAUSAL_LM",
    )


def _as_asked(settings: TrainSettings) -> str:
    """The settings that name parts of a model."""
    named = {name: getattr(settings, name) for name in ("lora_target_modules", "modules_to_save")}
    return "".join(f"{name}={value}: " for name, value in named.items() if value or name == "lora_target_modules")


def _check_names(model: nn.Module, whole: list[str]) -> None:
    """peft would train nothing for a name that no module has, and say nothing."""
    places = [name for name, _ in model.named_modules()]
    unknown = [name for name in whole if not any(place.endswith(name) for place in places)]
    if unknown:
        known = sorted({place.rpartition(".")[2] for place in places if not place.rpartition(".")[2].isdigit()} - {""})
        raise ModelError(
            f"modules_to_save={whole}: no module of this model ends in {', '.join(unknown)}; it has {', '.join(known)}"
        )


def _linear_layers_in(model: nn.Module, whole: list[str]) -> list[str]:
    """What needs no adapter, as it is trained whole."""
    places = [place for place, _ in model.named_modules() if place.endswith(tuple(whole))]
    linear = [place for place, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    return [place for place in linear if any(f"{place}.".startswith(f"{whole}.") for whole in places)]


def _ends(model: nn.Module) -> tuple[str, str]:
    """Names of embedding and output layer."""
    causal = causal_model(model)
    ends = causal.get_input_embeddings(), causal.get_output_embeddings()
    names = {part: name for name, part in causal.named_modules()}
    return names[ends[0]], names[ends[1]]


def _are_tied(model: nn.Module) -> bool:
    causal: Any = causal_model(model)
    return causal.get_input_embeddings().weight is causal.get_output_embeddings().weight


def _whole_ends(model: nn.Module, whole: list[str]) -> tuple[str, ...]:
    """Embedding and output layer, as far as they are trained whole; where they share a weight, both or none.

    :raises ModelError: they share one under names by which peft does not tie them.
    """
    ends = _ends(model)
    named = tuple(end for end in ends if any(end.endswith(name) for name in whole))
    if not (named and _are_tied(model)):
        return named
    if not ends[0].endswith("embed_tokens"):
        raise ModelError(
            f"modules_to_save={whole}: {ends[0]} and {ends[1]} of this model share a weight, and peft would train two; "
            "leave them out, or name single tokens with trainable_token_indices"
        )
    return ends


def _rows_by_layer(model: nn.Module, rows: list[int], whole_ends: tuple[str, ...]) -> dict[str, list[int]] | None:
    """What peft is told: rows of both ends, which it trains as one where they share a weight; not of whole ones."""
    if not rows:
        return None
    embedding: Any = causal_model(model).get_input_embeddings()
    if rows[-1] >= (count := embedding.weight.shape[0]):
        raise ModelError(f"trainable_token_indices: there is no row {rows[-1]}; the embedding has {count}, from 0 on")
    return {end: rows for end in _ends(model) if end not in whole_ends} or None


def _read_rows(model: nn.Module, values: Values) -> None:
    """Give the rows that are trained what the empty weights have there."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for part in model.modules():
        if isinstance(part, TrainableTokensLayer) and part.base_layer.weight in values:
            weight: Any = part.base_layer.weight
            for name, rows in part.token_indices.items():
                found = values[weight].read()[rows]
                for kept in (part.trainable_tokens_delta[name], part.trainable_tokens_original[name]):
                    kept.data.copy_(found)


Start = Callable[[nn.Module, bool], nn.Parameter | None]
"""(layer, whether its weight lies the other way round) -> its magnitudes; None: peft computes them."""


@contextmanager
def magnitudes(start: Start) -> Iterator[None]:
    """Within it, DoRA's magnitudes start from what `start` gives."""
    from peft.tuners.lora.dora import DoraLinearLayer

    compute: Any = DoraLinearLayer.update_layer

    def update_layer(dora: Any, *, base_layer: nn.Module, **options: Any) -> None:
        known = start(base_layer, dora.fan_in_fan_out)
        if known is None:
            compute(dora, base_layer=base_layer, **options)
        else:
            dora.weight = known

    with patch.object(DoraLinearLayer, "update_layer", update_layer):
        yield


def room_for_lengths(layer: Any, turned: bool) -> nn.Parameter:
    """Magnitudes that a file has."""
    return nn.Parameter(torch.ones(layer.weight.shape[turned]))


def _lengths_later(values: Values, layer: Any, turned: bool) -> nn.Parameter | None:
    """Empty magnitudes, and their values: an adapter changes nothing before it is trained."""
    if layer.weight not in values:
        return None
    value = values[layer.weight]
    options = dict(vars(layer.weight)) if value.layer is not None else None
    magnitudes = nn.Parameter(torch.empty(layer.weight.shape[turned], device="meta"))
    values[magnitudes] = Value(partial(_lengths, value, options, turned), torch.float32)
    return magnitudes


def _lengths(value: Value, options: dict[str, Any] | None, turned: bool) -> Tensor:
    """The length of each row of a weight, as it is computed with."""
    device = any_device()
    if options is None:
        weight = value.read().to(device, value.dtype)
    else:
        from training.models.four_bits import rounded

        weight = rounded(options, value.read, value.dtype, device)
    return torch.linalg.norm(weight.float(), dim=0 if turned else 1).cpu()
