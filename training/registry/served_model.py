"""The code of a registered model ("models from code"): MLflow copies this file beside the weights and runs it to load.

In: a request with `messages` (chat: roles and contents) or `prompt` (one text a row), and the parameters of generation.
Out: an OpenAI-style chat completion, or one text a row. Imports nothing of this project, so a registered model loads
wherever its few requirements are installed. Cost: the weights once in memory; of an adapter also its base model, found
by the reference in the model's configuration, or at $PANDA_BASE_MODEL where that path does not exist. torch is imported
to load, not to register: MLflow runs this file for that, too.
"""

import os
import re
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

if TYPE_CHECKING:
    import torch

DEFAULTS = {"max_new_tokens": 128, "max_tokens": 0, "temperature": 0.0, "top_p": 1.0}


class ServedModel(PythonModel):
    """A causal language model with its tokenizer; greedy unless a temperature is asked for."""

    def load_context(self, context: Any) -> None:
        """Load what `context.artifacts["model"]` holds: whole weights, or an adapter and the base it refers to."""
        import torch
        from transformers import AutoTokenizer

        directory = context.artifacts["model"]
        trusted = bool((context.model_config or {}).get("trust_remote_code"))  # as training did
        self.tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted)
        if Path(directory, "adapter_config.json").exists():
            from peft import PeftModel

            base = load_weights(find_base(context.model_config["base_model"]), trusted)
            if len(self.tokenizer) > base.get_input_embeddings().weight.shape[0]:  # the adapter has rows of new tokens
                base.resize_token_embeddings(len(self.tokenizer))
            self.model = PeftModel.from_pretrained(base, directory)
        else:
            self.model = load_weights(directory, trusted)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """A chat completion for `messages`, a list of texts for `prompt`."""
        options = {**DEFAULTS, **(params or {})}
        rows = rows_of(model_input)
        if rows and rows[0].get("messages") is not None:
            return self.complete_chat(plain(rows[0]["messages"]), options)
        return [self.generate(self.encode(str(row["prompt"])), options)[0] for row in rows]

    def complete_chat(self, messages: list[dict[str, str]], options: dict[str, Any]) -> dict[str, Any]:
        """The assistant's next message in OpenAI's form."""
        ids = self.encode_chat(messages)
        text, num_new, reason = self.generate(ids, options)
        num_prompt = ids.shape[1]
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "panda",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_new,
                "total_tokens": num_prompt + num_new,
            },
        }

    def encode_chat(self, messages: list[dict[str, str]]) -> "torch.Tensor":
        """``(1, num_tokens)`` ids through the tokenizer's chat template; without one, the texts line by line.

        A special token that somebody has typed into a message stays text, as in training: it would end his turn.
        """
        if not self.tokenizer.chat_template:
            return self.as_tensor(self.text_ids("\n".join(message["content"] for message in messages), True))
        typed = TypedTokens(self.tokenizer, [message["content"] for message in messages])
        hidden = [{**message, "content": typed.hide(message["content"])} for message in messages]
        text = str(self.tokenizer.apply_chat_template(hidden, tokenize=False, add_generation_prompt=True))
        if not typed.found:
            return self.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for number, piece in enumerate(typed.pattern.split(text)):  # every other one is a token of the template
            if number % 2:
                ids += [self.tokenizer.convert_tokens_to_ids(piece)]  # type: ignore[list-item]  # one for one
            else:
                ids += self.text_ids(typed.show(piece))
        return self.as_tensor(ids)

    def text_ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text in which no special token counts."""
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True).input_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> "torch.Tensor":
        """``(1, num_tokens)`` ids; of an empty text bos, without one eos: a model cannot go on from nothing."""
        return self.as_tensor(self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def as_tensor(self, ids: list[int]) -> "torch.Tensor":
        """``(1, num_tokens)``, at least one."""
        import torch

        tokenizer = self.tokenizer
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return torch.tensor([ids or [start]], dtype=torch.long)

    def generate(self, ids: "torch.Tensor", options: dict[str, Any], streamer: Any = None) -> tuple[str, int, str]:
        """(text, number of new tokens, "stop" or "length") for one prompt of shape ``(1, num_tokens)``."""
        import torch

        limit = int(options["max_tokens"] or options["max_new_tokens"])
        temperature = float(options["temperature"])
        sampling = {"do_sample": True, "temperature": temperature, "top_p": float(options["top_p"])}
        ids = ids.to(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limit,
                streamer=streamer,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                **(sampling if temperature > 0 else {"do_sample": False}),
            )
        new = output[0, ids.shape[1] :]
        reason = "stop" if len(new) and int(new[-1]) == self.tokenizer.eos_token_id else "length"
        return str(self.tokenizer.decode(new, skip_special_tokens=True)), len(new), reason


class TypedTokens:
    """The special tokens in texts that people have typed, hidden while the chat template is rendered around them."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        special = sorted(
            {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len, reverse=True
        )
        self.pattern = re.compile("(" + "|".join(map(re.escape, special)) + ")" if special else "((?!))")
        self.mark = next(one for one in map(chr, range(0xE000, 0xF900)) if not any(one in text for text in texts))
        self.found: list[str] = []

    def hide(self, text: str) -> str:
        """The text with a number between two marks in place of each token."""

        def number(match: re.Match[str]) -> str:
            self.found.append(match.group())
            return f"{self.mark}{len(self.found) - 1}{self.mark}"

        return self.pattern.sub(number, text)

    def show(self, text: str) -> str:
        """What was hidden is back."""
        return re.sub(f"{self.mark}(\\d+){self.mark}", lambda match: self.found[int(match.group(1))], text)


def load_weights(directory: str, trusted: bool) -> Any:
    """The model of a directory or hub id, in the precision it was saved in; no pickles, its own code only if trusted.

    Weights that are not in the files would be random numbers, which transformers only mentions: they are an error here.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype="auto",
        use_safetensors=True,
        low_cpu_mem_usage=True,
        output_loading_info=True,
        trust_remote_code=trusted,
    )
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{directory}: {len(missing)} tensors of the model are not in its files, first {missing[0]}")
    return model


def find_base(reference: str) -> str:
    """Where the base model of an adapter is on this machine."""
    override = os.environ.get("PANDA_BASE_MODEL")
    if override and not Path(reference).exists():
        return override
    if Path(reference).is_absolute() and not Path(reference).exists():
        raise FileNotFoundError(f"base model {reference} is not on this machine; set PANDA_BASE_MODEL to its directory")
    return reference


def rows_of(request: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a request; a row of several prompts (MLflow puts a list into one cell) becomes one row each."""
    rows = []
    for row in request.to_dict("records"):
        prompts = row.get("prompt")
        several = row.get("messages") is None and prompts is not None and not isinstance(prompts, str)
        rows += [{"prompt": prompt} for prompt in prompts] if several else [row]
    return rows


def plain(messages: Any) -> list[dict[str, str]]:
    """Messages as plain dictionaries with text contents."""
    return [{"role": str(message["role"]), "content": str(message["content"])} for message in messages]


set_model(ServedModel())
