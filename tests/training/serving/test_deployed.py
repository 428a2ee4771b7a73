"""How answers come out of a model: text piece by piece, stop strings, drawn tokens, turns of several threads."""

import threading
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.errors import PandaError
from tests.support.tiny_models import save_adapter, save_full_model
from training.errors import ModelError
from training.serving.chat import chat
from training.serving.deployed import BASE_VARIABLE, Sampling, Text, _Sampler, check_room, load
from training.serving.turns import Turns


@pytest.fixture(scope="module")
def bytewise() -> Tokenizer:
    """A token a byte, and one special token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=257, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    return core


@pytest.mark.parametrize(
    ("said", "stops", "expected"),
    [
        ("a plain text", (), "a plain text"),
        ("héllo 中文 😀", (), "héllo 中文 😀"),  # characters of several tokens
        ("one\n\nUser: two", ("\n\nUser:",), "one"),
        ("aab aaab", ("aaab",), "aab "),  # begins again inside what was held
        ("xyz", ("z", "y"), "x"),  # the first in the text, not in the list
        ("xyz", ("yz", "xy"), ""),
        ("中文。文", ("文",), "中"),
        ("almost a sto", ("stop",), "almost a sto"),  # what was held is said at the end
    ],
)
def test_text_comes_in_pieces_and_ends_before_a_stop_string(bytewise, said, stops, expected):
    pieces: list[str] = []
    text = Text(bytewise, stops, pieces.append)
    stopped = any(text.add(token) for token in bytewise.encode(said).ids)
    assert text.end() == stopped == (expected != said)
    assert "".join(pieces) == expected and "" not in pieces and not any("�" in piece for piece in pieces)
    assert len(pieces) > 2 or len(expected) < 3 or stops


def test_a_model_without_room_is_refused_before_it_is_loaded(tmp_path):
    model = save_full_model(tmp_path)
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    check_room(tmp_path, torch.device("cpu"), needed, 4)
    with pytest.raises(ModelError, match=r"0.0 GB are free on this cpu. .* panda export .*tensor-parallel-size"):
        check_room(tmp_path, torch.device("cpu"), needed - 1, 4)


def test_an_unfinished_character_is_said_at_the_end_as_in_the_whole_text(bytewise):
    ids = [*bytewise.encode("a中").ids[:-1], bytewise.token_to_id("</s>")]
    pieces: list[str] = []
    text = Text(bytewise, (), pieces.append)
    for token in ids:
        text.add(token)
    text.end()
    assert "".join(pieces) == bytewise.decode(ids, skip_special_tokens=True)
    assert pieces[0] == "a" and "�" in pieces[-1]


def test_tokens_are_drawn_as_their_probabilities_say():
    """Against the softmax itself, 20,000 draws; and by one generator of its own."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampler = _Sampler(Sampling(1, temperature=0.5, top_p=0.99, seed=3), torch.device("cpu"))
    state = torch.get_rng_state()
    drawn = Counter(int(sampler(torch.zeros(1, 1), logits).argmax()) for _ in range(20_000))
    assert torch.equal(torch.get_rng_state(), state)
    expected = (logits[0] / 0.5).softmax(-1)
    kept = expected[:3] / expected[:3].sum()  # 0.99 of the mass is in three of them
    assert set(drawn) == {0, 1, 2}
    assert torch.tensor([drawn[i] / 20_000 for i in range(3)]).allclose(kept, atol=0.01)


def test_a_conversation_stays_within_the_context(tmp_path):
    """256 tokens: the answer gets what is left, and where nothing is left that is said."""
    save_full_model(tmp_path / "model")
    deployed = load(tmp_path / "model", tmp_path / "cache")
    said: list[str] = []
    chat(deployed, ["x" * 250, "/quit"], Sampling(50), None, said.append)
    assert said[-1] == " [...]\n"
    written = deployed.write(deployed.prompt.of_text("x" * 250), Sampling(50), said.append, lambda: False)
    assert (written.num_tokens, written.reason) == (1, "cancelled")
    with pytest.raises(PandaError, match="the conversation has 256 tokens, the model's context 256"):
        chat(deployed, ["x" * 256], Sampling(50), None, said.append)


def test_the_base_of_an_adapter_may_have_moved(tmp_path, monkeypatch):
    save_full_model(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "model")

    def answer(**where) -> list[str]:
        deployed, said = load(tmp_path / "model", tmp_path / "cache", **where), []
        deployed.write(deployed.prompt.of_text("hello"), Sampling(8), said.append)
        return said

    expected = answer()
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(PandaError, match="is gone; name its directory with --base"):
        answer()
    assert answer(base=tmp_path / "moved") == expected
    monkeypatch.setenv(BASE_VARIABLE, str(tmp_path / "moved"))
    assert answer() == expected


def test_turns_go_round_in_the_order_of_arrival():
    turns, said = Turns(), []
    arrived = [threading.Event() for _ in range(3)]

    def speak(number: int) -> None:
        arrived[number].set()
        with turns:
            for _ in range(4):
                said.append(number)
                turns.pass_on()

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(3)]
    with turns:  # until all stand in line
        for number, thread in enumerate(threads):
            thread.start()
            arrived[number].wait()
            while len(turns._line) < number + 2:
                pass
    for thread in threads:
        thread.join()
    assert said == [0, 1, 2] * 4


def test_a_failure_gives_the_turn_back():
    turns = Turns()
    with pytest.raises(RuntimeError), turns:
        raise RuntimeError
    with turns:
        turns.pass_on()
