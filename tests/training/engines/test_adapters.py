"""Every kind of adapter on every engine, for real on two ranks: same losses, exact resume, and a merge that is equal.

All runs share one start of the ranks (`tests.support.many`).
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.plan.reader import open_plan
from tests.support import tiny
from tests.support.plans import write_plan
from tests.training.engines.test_modes import assert_same_training, weights
from training.bases.tokens import with_tokens
from training.errors import ModelError
from training.export.export import MAX_MEAN_KL, Source, export
from training.launch.run_config import read_config
from training.models.build import load_deployed, load_model
from training.models.loss import CausalLMLoss, micro_batch
from training.models.shards import tensors_of
from training.settings import TrainSettings
from training.trainer.state_files import read_index

pytestmark = pytest.mark.distributed

NEW = ["<one>", "<two>"]
NEW_IDS = [tiny.VOCABULARY, tiny.VOCABULARY + 1]
KINDS = {  # name -> (base, settings)
    "rslora+": ("tied", {"use_rslora": True, "loraplus_lr_ratio": 4}),
    "dora": ("tied", {"use_dora": True}),
    "dora-4-bits": ("tied", {"use_dora": True, "use_quant": True, "gradient_checkpointing": True}),
    "pissa": ("tied", {"init_lora_weights": "pissa"}),
    "whole-tied": ("tied", {"modules_to_save": ["lm_head"]}),
    "whole-untied": ("untied", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "tokens-tied": ("grown-tied", {"add_tokens": NEW, "trainable_token_indices": [5]}),
    "tokens-untied": ("grown-untied", {"add_tokens": NEW, "trainable_token_indices": [5], "use_dora": True}),
}
ENGINES = {
    "zero0": {"zero_stage": 0},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "fsdp": {"strategy": "fsdp"},
}
BFLOAT16 = {"use_dora": True, "modules_to_save": ["lm_head"], "add_tokens": NEW, "precision": "bf16"}
LORA = {"use_lora": True, "lora_r": 4, "lora_dropout": 0.2, "learning_rate": 0.005}
TABLE = list(itertools.product(KINDS, ENGINES))
PROMPTS = [[0, 5, 6, 7], [0, 9, 11, 13, 15, 17], [0, 40, 41]]


def write_base(directory: Path, tokenizer: Path, tied: bool) -> Path:
    config = AutoConfig.for_model(**tiny.ARCHITECTURE | {"tie_word_embeddings": tied, "vocab_size": tiny.VOCABULARY})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for file in tokenizer.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def write_rows(root: Path) -> Path:
    """A plan of counting examples, in which two words are the new tokens."""
    new = dict(zip((20, 30), NEW_IDS, strict=True))
    examples = [([new.get(i, i) for i in ids], runs) for ids, runs in tiny.counting_examples(40)]
    rows = [[(i, 0, len(examples[i][0])), (i + 1, 0, len(examples[i + 1][0]))] for i in range(0, 40, 2)]
    return write_plan(root, examples, max_seq_length=32, rows=rows[:16], validation=rows[16:], pad_id=tiny.PAD)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Bases, and all runs, whole and resumed after step 2 of 3: a directory each."""
    root = tmp_path_factory.mktemp("adapters")
    tokenizer = tiny.write_tokenizer(root / "tokenizer")
    for tied in ("tied", "untied"):
        base = write_base(root / tied, tokenizer, tied == "tied")
        (root / f"grown-{tied}").symlink_to(with_tokens(base, NEW, root / "cache"))
    plans = {False: tiny.write_counting_plan(root / "cache", num_rows=16), True: write_rows(root / "new")}
    runs = []

    def add(name: str, base: str, source: str = "", **settings) -> None:
        run_dir = root / name
        model = {"model_dir": root / base, "plan_dir": plans[base.startswith("grown")]}
        tiny.write_run(root, name, **model, save_steps=2, keep_last=5, max_steps=3, **LORA, **settings)
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        config["paths"]["tokenizer_dir"] = str(root / base)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
        copy = {"from": str(root / source), "drop": ["step-000003"]} if source else None
        runs.append({"run_dir": str(run_dir), "resume": bool(source), "copy": copy})

    add("lora", "tied", zero_stage=2)
    for kind, engine in TABLE:
        base, asked = KINDS[kind]
        add(f"{kind}-{engine}", base, **asked, **ENGINES[engine])
        add(f"{kind}-{engine}-again", base, f"{kind}-{engine}", **asked, **ENGINES[engine])
    add("float32", "grown-untied", **BFLOAT16 | {"precision": "float32"}, zero_stage=2)
    for engine, settings in ENGINES.items():
        add(f"bf16-{engine}", "grown-untied", **BFLOAT16, **settings)
    together = root / "ranks"
    together.mkdir()
    (together / "config.yaml").write_text(yaml.safe_dump({"runs": runs}))
    codes = tiny.wait(tiny.start(together, 2, module="tests.support.many"), seconds=900)
    assert codes == [0, 0], tiny.logs(together)
    return root


@pytest.mark.parametrize(("kind", "engine"), TABLE)
def test_a_resumed_run_is_the_same_to_the_last_bit(root, kind, engine):
    ours, others = (tiny.metrics(root / f"{kind}-{engine}{end}") for end in ("-again", ""))
    assert [(line["loss"], line["grad_norm"]) for line in ours] == [
        (line["loss"], line["grad_norm"]) for line in others
    ]
    again, before = weights(root / f"{kind}-{engine}-again"), weights(root / f"{kind}-{engine}")
    assert again.keys() == before.keys() and all(torch.equal(again[key], before[key]) for key in before)


@pytest.mark.parametrize(("kind", "engine"), [entry for entry in TABLE if entry[1] != "zero0"])
def test_engines_train_the_same(root, kind, engine):
    assert_same_training(root / f"{kind}-{engine}", root / f"{kind}-zero0")


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_not_the_same_training(root, kind):
    """Otherwise the tests around would compare plain adapters."""
    ours, others = (tiny.losses(tiny.metrics(root / name)) for name in (f"{kind}-zero2", "lora"))
    assert ours != pytest.approx(others, rel=1e-5)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize(("kind", "engine"), TABLE)
def test_merged_it_says_the_same(root, kind, engine, tmp_path):
    done = export(Source(root / f"{kind}-{engine}" / "model", PROMPTS), tmp_path / "out", lambda done: "")
    assert done.kind == "streamed" and done.difference.mean_kl < MAX_MEAN_KL / 100
    base, merged = (tensors_of(folder) for folder in (root / KINDS[kind][0], tmp_path / "out"))
    assert base.keys() == merged.keys()
    moved = [name for name, info in merged.items() if not torch.equal(info.read(), base[name].read())]
    assert len([name for name in moved if "_proj" in name]) == 2 * 7, "all linear layers of both layers"
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & base.keys():
        rows = (merged[name].read() != base[name].read()).any(1).nonzero().flatten().tolist()
        if kind.startswith("tokens"):
            assert rows == [5, *NEW_IDS], "no other row has moved by a bit"
        else:
            assert (len(rows) > 10) is kind.startswith("whole")


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_follows_float32(root, engine):
    """What GPUs do when nothing is said."""
    ours, others = (tiny.losses(tiny.metrics(root / name)) for name in (f"bf16-{engine}", "float32"))
    assert ours == pytest.approx(others, rel=0.01)


def test_b_of_an_adapter_moves_faster_with_lora_plus(root):
    """Adam's first updates are as long as the learning rate, whatever the gradient."""

    def longest(name: str) -> float:
        index = read_index(root / name / "checkpoints" / "step-000002")
        return max(states["weight"].whole().abs().max().item() for name, states in index.items() if ".lora_B." in name)

    for engine in ENGINES:
        assert longest(f"rslora+-{engine}") == pytest.approx(4 * longest("lora"), rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_says_what_ours_says(root, kind):
    from peft import PeftModel

    model = root / f"{kind}-zero2" / "model"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / KINDS[kind][0]), model).eval()
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, load_deployed(model)(ids).logits, rtol=1e-4, atol=1e-5)


def test_pissa_leaves_the_model_as_it_was_at_the_start(root):
    """The first loss is that of the plain adapter, which changes nothing; what is deployed has the last one."""
    before = {name: tiny.metrics(root / name, "evaluations.jsonl")[0]["eval_loss"] for name in ("pissa-fsdp", "lora")}
    assert before["pissa-fsdp"] == pytest.approx(before["lora"], rel=1e-6)
    after = tiny.metrics(root / "pissa-zero3", "evaluations.jsonl")[-1]["eval_loss"]
    plan = open_plan(read_config(root / "pissa-zero3" / "config.yaml").plan_dir, "validation")
    batch = micro_batch(plan.batch(np.arange(plan.num_rows)), range(plan.num_rows))
    with torch.no_grad():
        deployed = CausalLMLoss(load_deployed(root / "pissa-zero3" / "model"))(batch, "each").mean().item()
    assert deployed == pytest.approx(after, rel=1e-5) != before["lora"], "on the base as it was"


def test_an_original_base_with_a_row_more_for_each_token_will_do(root):
    """What `ServedModel` does where the base with the tokens is not there."""
    from peft import PeftModel

    for kind, base in (("tokens-tied", "tied"), ("tokens-untied", "untied")):
        model = root / f"{kind}-fsdp" / "model"
        original = AutoModelForCausalLM.from_pretrained(root / base)
        original.resize_token_embeddings(tiny.VOCABULARY + len(NEW))
        ids = torch.tensor([[0, *NEW_IDS, 7]])
        with torch.no_grad():
            expected = load_deployed(model)(ids).logits
            torch.testing.assert_close(PeftModel.from_pretrained(original, model).eval()(ids).logits, expected)
        with pytest.raises(ModelError, match="no adapter of this model"):
            load_deployed(model, base_dir=root / base)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"modules_to_save": ["embed_tokens", "wte"]}, r"no module .* ends in wte; it has .*embed_tokens"),
        ({"modules_to_save": ["q_proj"], "use_quant": True}, "q_proj.*: a layer that is kept in 4 bits"),
        ({"trainable_token_indices": [3, 64]}, "there is no row 64; the embedding has 64"),
    ],
)
def test_what_a_model_does_not_have_is_named(root, settings, reason):
    asked = TrainSettings(use_lora=True, **settings)
    with pytest.raises(ModelError, match=reason):
        load_model(asked, str(root / "tied"), str(root / "tokenizer"), torch.float32)
