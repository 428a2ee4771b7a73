"""`panda serve` as a real process, asked by the `openai` client: names, answers, limits, errors, and how it ends.

Two versions of one model are served: whole weights (the champion) and an adapter. Neither server has a hub cache.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_prep.tokenizer import load_tokenizer
from data_prep.tokens.served_prompt import ServedPrompt
from data_prep.tokens.templates import served_template
from flows.cli.use import bind
from tests.data_prep.tokens.test_served_template import trained_prompt
from tests.support.mlflow_fixtures import wait_for_health
from tests.support.tiny_models import save_adapter
from tests.training.registry.test_register import tracked_run
from training.launch.processes import free_port
from training.models.build import load_deployed
from training.registry.register import register
from training.registry.versions import Registry
from training.serving.desk import MAX_ACTIVE, MAX_WAITING
from training.serving.server import MAX_BODY_BYTES

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
CONTEXT = 4096
LONG = 4000  # tokens, which take seconds
HELLO = [{"role": "user", "content": "hello"}]


def save_model(directory: Path) -> LlamaForCausalLM:
    """A tiny Llama with ChatML's tokens that never ends by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["hello world, this is a test"] * 5, trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(directory)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=core.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, eos_token_id=0,
            bos_token_id=None, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():  # letters only, so every token is text by itself and none is the end
        texts = [core.decode([i]) for i in range(core.get_vocab_size())]
        model.lm_head.weight[[i for i, text in enumerate(texts) if not text or not text.isalpha()]] = 0
        model.lm_head.weight *= 20
    model.save_pretrained(directory)
    text = served_template("chatml", load_tokenizer(directory))
    (directory / "chat_template.jinja").write_text(text)
    return model.eval()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """An output directory with `panda-talk`: version 1, the champion, whole; version 2, the challenger, an adapter."""
    root = tmp_path_factory.mktemp("serving") / "outputs"
    for name in ("full", "adapter"):
        model_dir = root / name / "model"
        model_dir.mkdir(parents=True)
        if name == "full":
            save_model(model_dir)
        else:
            save_adapter(root / "full" / "model", model_dir)
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                (model_dir / file).write_bytes((root / "full" / "model" / file).read_bytes())
        tracked = tracked_run(root / name)
        register(root / name, tracked.run_id, "panda-talk", {}, tracked.uri)
    registry = Registry(tracked.uri)
    for number, alias in ((1, "champion"), (2, "challenger")):
        registry.set_alias(registry.resolve(f"panda-talk:{number}"), alias)
    return root


@dataclass(frozen=True)
class Served:
    """A running server."""

    process: subprocess.Popen
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def says(self, text: str, times: int = 1, timeout_seconds: float = 120) -> None:
        """Return when its log has the text so many times."""
        deadline = time.monotonic() + timeout_seconds
        while self.log.read_text().count(text) < times:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


@contextlib.contextmanager
def serving(outputs: Path, version: str) -> Iterator[Served]:
    """`panda serve VERSION` on a machine that has never seen the hub."""
    port = free_port()
    log = outputs / f"serve-{port}.log"
    where = ["--output_dir", str(outputs), "--cache_dir", str(outputs.parent / "cache"), "--port", str(port)]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli.main", "serve", version, *where], cwd=ROOT, stdout=file, stderr=file,
            start_new_session=True, env={**env, "HF_HOME": str(outputs.parent / "no-hub-cache")},
        )  # fmt: skip
    try:
        wait_for_health(port, process)
        yield Served(process, port, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def served(outputs) -> Iterator[Served]:
    """The champion, by the bare name."""
    with serving(outputs, "panda-talk") as server:
        yield server


def trained_ids(model_dir: Path, texts: list[str], roles: list[str]) -> list[int]:
    return trained_prompt(load_tokenizer(model_dir), "chatml", [*roles, "assistant"], [*texts, "an answer"])


def greedy(model, model_dir: Path, ids: list[int], num_tokens: int) -> str:
    """What transformers itself writes after these ids."""
    output = model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, eos_token_id=0
    )
    return load_tokenizer(model_dir).core.decode(output[0, len(ids) :].tolist())


def post(served: Served, path: str, body: bytes, **headers: str) -> tuple[int, dict]:
    """Status and JSON of an answer to a hand-made request."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    call = urllib.request.Request(f"{served.url}{path}", body or None, {"Content-Type": "application/json", **named})
    try:
        with urllib.request.urlopen(call, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_names(served, outputs):
    client = served.client
    names = ["panda-talk", "panda-talk:1", "panda-talk@champion"]
    assert [model.id for model in client.models.list()] == names
    assert client.models.retrieve("panda-talk@champion").id == "panda-talk@champion"
    answers = [client.chat.completions.create(model=name, messages=HELLO, max_tokens=5) for name in names]
    assert {answer.model for answer in answers} == {"panda-talk:1"}
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    for other in ("x", "panda-talk:2", "panda-talk@challenger", str(outputs / "full" / "model")):
        with pytest.raises(openai.NotFoundError, match="served is 'panda-talk', 'panda-talk:1'") as error:
            client.chat.completions.create(model=other, messages=HELLO)
        assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    assert not (outputs.parent / "no-hub-cache").exists()


def test_health_and_what_it_says_at_the_start(served):
    assert post(served, "/health", b"") == (200, {"status": "ok"})
    said = served.log.read_text()
    assert f"models:/panda-talk/1 at http://127.0.0.1:{served.port}/v1" in said
    assert "vllm serve panda-talk-1 --served-model-name panda-talk panda-talk:1 panda-talk@champion --host" in said


def test_listeners_are_on_loopback(served):
    listening = [one.laddr for one in psutil.Process(served.process.pid).net_connections() if one.status == "LISTEN"]
    assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", served.port)]


def test_whole_and_streamed_are_what_the_model_writes_after_the_ids_of_training(served, outputs):
    """The user's text has special tokens in it, which stay text."""
    model_dir = outputs / "full" / "model"
    roles, texts = ["system", "user", "assistant", "user"], ["Be brief.", "hello", "world", "x</s><|im_end|>y"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    ids = ServedPrompt(load_tokenizer(model_dir)).of_chat(messages)  # test_served_prompt.py: those of training
    expected = greedy(LlamaForCausalLM.from_pretrained(model_dir), model_dir, ids, 12)
    request = {"model": "panda-talk", "messages": messages, "max_tokens": 12}
    whole = served.client.chat.completions.create(**request)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 12)
    chunks = list(served.client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == expected and len(pieces) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage and len({chunk.id for chunk in chunks}) == 1


def test_an_adapter_is_served_with_its_base(outputs):
    model_dir = outputs / "adapter" / "model"
    expected = greedy(load_deployed(model_dir), model_dir, trained_ids(model_dir, ["hello"], ["user"]), 12)
    base = outputs / "full" / "model"
    assert expected != greedy(LlamaForCausalLM.from_pretrained(base), base, trained_ids(base, ["hello"], ["user"]), 12)
    with serving(outputs, "panda-talk@challenger") as adapter:
        names = [model.id for model in adapter.client.models.list()]
        answer = adapter.client.chat.completions.create(model="panda-talk:2", messages=HELLO, max_tokens=12)
    assert names == ["panda-talk", "panda-talk:2", "panda-talk@challenger"]
    assert answer.choices[0].message.content == expected and answer.model == "panda-talk:2"


def test_completions(served, outputs):
    model_dir = outputs / "full" / "model"
    tokenizer = load_tokenizer(model_dir)
    ids = tokenizer.core.encode("hello world").ids
    expected = greedy(LlamaForCausalLM.from_pretrained(model_dir), model_dir, ids, 8)
    for prompt in ("hello world", ids):
        answer = served.client.completions.create(model="panda-talk", prompt=prompt, max_tokens=8)
        assert answer.choices[0].text == expected and answer.usage.prompt_tokens == len(ids)
    stream = served.client.completions.create(model="panda-talk", prompt="hello world", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_limits_of_an_answer(served):
    def ask(**options) -> tuple[str, str, int | None]:
        request = {"model": "panda-talk", "messages": HELLO, "max_tokens": 40, **options}
        if request.pop("stream", False):
            chunks = list(served.client.chat.completions.create(**request, stream=True))
            last = chunks[-1].choices[0]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            return text, last.finish_reason, None
        answer = served.client.chat.completions.create(**request)
        return answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.completion_tokens

    text, _, _ = ask()
    stop = text[6:9]
    before = text[: text.index(stop)]
    said, reason, num_tokens = ask(stop=stop)
    assert (said, reason) == (before, "stop") and num_tokens < 40
    assert ask(stop=["nowhere to be found", stop], stream=True)[:2] == (before, "stop")
    assert ask(max_completion_tokens=3)[1:] == ("length", 3)
    first, again = ask(temperature=1.5, seed=7), ask(temperature=1.5, seed=7)
    assert first == again and first[0] not in (text, ask(temperature=1.5, seed=8)[0])
    assert ask(temperature=1.5, seed=7, top_p=1e-6)[0] == text  # only the likeliest token is left
    whole = ask(max_tokens=None, stop=stop)
    assert whole[0] == before


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": CONTEXT}, "max_tokens", f"the context of this model has {CONTEXT}"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"n": 2}, "n", "not offered"),
        ({"tools": [{"type": "function"}]}, "tools", "not offered"),
        ({"max_token": 3}, "max_token", "unknown field"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "system"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "text"),
        ({"messages": None}, "messages", "required"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, None, "tokens; the context"),
    ],
)  # fmt: skip
def test_a_bad_body_names_the_field(served, outputs, options, field, message):
    body = json.dumps({"model": "panda-talk", "messages": HELLO, **options}).encode()
    status, answer = post(served, "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["param"] == field and message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error" and str(outputs.parent) not in str(answer)


def test_what_asks_for_nothing_is_taken(served):
    """Clients send these defaults without being told to."""
    answer = served.client.chat.completions.create(
        model="panda-talk", messages=[{"role": "developer", "content": [{"type": "text", "text": "hello"}]}],
        max_tokens=2, n=1, presence_penalty=0, frequency_penalty=0.0, user="me", logprobs=False,
        response_format={"type": "text"}, extra_body={"stop": None},
    )  # fmt: skip
    assert answer.usage.completion_tokens == 2


def test_requests_that_are_none(served):
    chat = "/v1/chat/completions"
    assert post(served, chat, b"{")[0] == 400 and post(served, chat, b"[1]")[0] == 400
    assert post(served, chat, b'{"model": "\\ud800"}')[0] == 400  # half a character
    assert post(served, chat, b"{}", Content_Type="text/plain")[0] == 415  # what a web page may send unasked
    assert post(served, "/health", b"", Host="evil.example")[0] == 403  # a name made to mean this machine
    assert post(served, "/health", b"", Host=f"localhost:{served.port}")[0] == 200
    assert post(served, "/v1/nothing", b"")[0] == 404 and post(served, chat, b"")[0] == 405
    wrong = b'{"model": "panda-talk", "prompt": [1, 100000]}'
    status, answer = post(served, "/v1/completions", wrong)
    assert status == 400 and answer["error"]["message"].startswith("prompt[1]: 100000 is no token of this model")
    assert post(served, "/v1/completions", b'{"model": "panda-talk", "prompt": ""}')[0] == 400


def test_a_body_that_is_too_large(served):
    """Refused when it has become too large, whatever length it was declared with."""
    status, answer = post(served, "/v1/completions", b'"' + b"x" * MAX_BODY_BYTES + b'"')
    assert status == 413 and str(MAX_BODY_BYTES) in answer["error"]["message"]


def long_answer(client: openai.OpenAI) -> openai.Stream:
    return client.chat.completions.create(model="panda-talk", messages=HELLO, max_tokens=LONG, stream=True)


def test_a_long_answer_holds_up_nobody_and_ends_with_its_client(served):
    stream = long_answer(served.client)
    next(stream)
    short = served.client.chat.completions.create(model="panda-talk", messages=HELLO, max_tokens=4)
    assert short.usage.completion_tokens == 4
    assert f"{LONG} tokens after" not in served.log.read_text()  # the long one is still in the making
    before = served.log.read_text().count("(cancelled)")
    stream.close()
    served.says("(cancelled)", before + 1)
    impatient = served.client.with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(model="panda-talk", messages=HELLO, max_tokens=LONG)
    served.says("(cancelled)", before + 2)


def test_more_than_can_wait_are_told_to_come_back(served):
    """All places are taken by answers that take seconds each."""

    async def ask(client: openai.AsyncOpenAI) -> int:
        try:
            async with await client.chat.completions.create(
                model="panda-talk", messages=HELLO, max_tokens=LONG, stream=True
            ):
                await asyncio.sleep(3600)
        except openai.APIStatusError as error:
            assert error.response.headers["retry-after"]
            return error.status_code
        return 200

    async def all_at_once() -> list[int]:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=300)
        tasks = [asyncio.create_task(ask(client)) for _ in range(MAX_ACTIVE + MAX_WAITING + 3)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(1)
        results = [task.result() for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()
        return results

    assert asyncio.run(all_at_once()) == [429, 429, 429]
    after = served.client.chat.completions.create(model="panda-talk", messages=HELLO, max_tokens=2)
    assert after.usage.completion_tokens == 2  # those that wait have gone with their clients


def test_a_signal_ends_it_in_the_middle_of_an_answer(outputs):
    with serving(outputs, "models:/panda-talk/1") as server:
        stream = long_answer(server.client)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="being stopped"):
            list(stream)
        assert server.process.wait(timeout=60) == -signal.SIGTERM


def test_an_address_that_is_taken_is_told_before_anything_is_loaded(outputs):
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        where = ["--output_dir", str(outputs), "--cache_dir", str(outputs.parent / "cache"), "--port", port]
        command = [sys.executable, "-m", "flows.cli.main", "serve", "panda-talk", *where]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr and "Loading" not in done.stderr
    with bind("localhost", 0) as bound:
        assert bound.family in (socket.AF_INET, socket.AF_INET6)
