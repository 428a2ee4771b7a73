"""The loader: who wins, where a value comes from, what is written reads back equal."""

import pytest
import yaml

from configs import docs
from configs.docs import with_origins
from configs.errors import ConfigError
from configs.load import CONFIG_DIR, dump, load
from configs.settings import PandaSettings
from flows.parts import preflight

GUIDE_DEFAULTS = {
    "num_workers": 2,
    "prefetch_factor": 2,
    "max_seq_length": 2048,
    "per_gpu_train_batch_size": 1,
    "per_gpu_eval_batch_size": 2,
    "optimizer": "AdamW",
    "learning_rate": 0.001,
    "lr_scheduler": "warmup",
    "gradient_accumulation_steps": 64,
    "weight_decay": 0.0,
    "adam_epsilon": 1e-6,
    "adam_betas": (0.9, 0.99),
    "max_grad_norm": 0.3,
    "num_train_epochs": 1,
    "max_steps": -1,
    "warmup_proportion": 0,
    "warmup_steps": 50,
    "bit_training": False,
    "use_lora": False,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "use_quant": False,
    "instruction_tuning_data_dir": "./dataset/instruction_tuning",
    "pretraining_data_dir": "./dataset/pretraining",
}


@pytest.fixture
def conf(tmp_path):
    def write(text: str):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("model", ["llama-7b", "llama-13b", "llama-33b", "llama-65b"])
def test_the_guides_models_have_the_guides_defaults(model):
    settings = load({"model": model}).settings
    assert {name: getattr(settings, name) for name in GUIDE_DEFAULTS} == GUIDE_DEFAULTS


def test_the_template_is_what_the_settings_say():
    assert (CONFIG_DIR / "template.yaml").read_text(encoding="utf-8") == docs.template(), "run: make docs"


def test_the_reference_is_what_the_settings_say():
    assert docs.REFERENCE.read_text(encoding="utf-8") == docs.reference(), "run: make docs"


def test_who_wins(conf):
    """template < model < preset < file < override < flag; one setting that each of them sets."""
    path = conf("learning_rate: 3e-4\n")
    layers = [
        ({"model": "llama-7b"}, [], None, 1e-3, "default"),
        ({"model": "panda-tiny"}, [], None, 3e-3, "model/panda-tiny.yaml"),
        ({"model": "panda-tiny", "preset": "lora"}, [], None, 2e-4, "preset/lora.yaml"),
        ({"model": "panda-tiny", "preset": "lora"}, [], path, 3e-4, str(path)),
        ({"model": "panda-tiny", "preset": "lora"}, ["learning_rate=4e-4"], path, 4e-4, "override"),
        ({"preset": "lora", "learning_rate": "5e-4"}, ["learning_rate=4e-4"], path, 5e-4, "flag"),
    ]
    for values, overrides, file, expected, origin in layers:
        loaded = load(values, overrides, file)
        assert (loaded.settings.learning_rate, loaded.origins["learning_rate"]) == (expected, origin)


def test_the_file_chooses_model_and_preset_and_flags_choose_again(conf):
    path = conf("model: llama-7b\npreset: lora\n")
    assert load(conf_path=path).settings.ckpt_path == "huggyllama/llama-7b"
    assert load(conf_path=path).settings.use_lora
    assert load({"model": "llama-13b"}, conf_path=path).settings.ckpt_path == "huggyllama/llama-13b"
    assert load(overrides=["model=llama-13b"], conf_path=path).settings.ckpt_path == "huggyllama/llama-13b"


@pytest.mark.parametrize(
    ("values", "overrides", "text", "expected"),
    [
        ({}, [], "", (5, 0.0)),
        ({"preset": "lora"}, [], "", (0, 0.03)),
        ({"preset": "lora"}, [], "warmup_steps: 7", (7, 0.0)),
        ({"preset": "lora"}, ["warmup_steps=8"], "", (8, 0.0)),
        ({"warmup_proportion": 0.1}, ["warmup_steps=8"], "", (0, 0.1)),
        ({"warmup_steps": 0, "warmup_proportion": 0.1}, [], "", (0, 0.1)),
        ({}, [], "warmup_steps: 0\nwarmup_proportion: 0.2", (0, 0.2)),
    ],
)
def test_the_last_kind_of_warmup_holds(values, overrides, text, expected, conf):
    settings = load(values, overrides, conf(text)).settings
    assert (settings.warmup_steps, settings.warmup_proportion) == expected


def test_a_whole_architecture_replaces_and_a_part_changes(conf):
    whole = conf("architecture: {model_type: gpt2, n_embd: 64}")
    assert load(conf_path=whole).settings.architecture == {"model_type": "gpt2", "n_embd": 64}
    part = load(conf_path=conf("architecture: {hidden_size: 64}")).settings.architecture
    assert (part["hidden_size"], part["model_type"]) == (64, "llama")
    over = load(overrides=["architecture.hidden_size=32"]).settings.architecture
    assert (over["hidden_size"], over["model_type"]) == (32, "llama")


@pytest.mark.parametrize("values", [{}, {"model": "llama-65b", "preset": "qlora"}, {"model": "owner/name"}])
def test_what_is_written_reads_back_equal(values, conf):
    settings = load(values).settings
    assert load(conf_path=conf(dump(settings))).settings == settings
    assert load(conf_path=conf(with_origins(load(values)))).settings == settings


def test_the_config_of_a_run_reads_back(conf):
    settings = load({"preset": "lora", "seed": 3}).settings
    text = dump(settings) + yaml.safe_dump({"paths": {"run_dir": "/somewhere"}})
    assert load(conf_path=conf(text)).settings == settings


def test_every_line_shows_its_origin(conf):
    path = conf("max_grad_norm: 0.5")
    lines = with_origins(load({"model": "llama-7b", "seed": 1}, ["lora_r=3"], path)).splitlines()
    shown = {line.split(":")[0]: line.rsplit("# ", 1)[1] for line in lines if line and not line.startswith("#")}
    assert set(shown) == set(PandaSettings.model_fields)
    expected = {"seed": "flag", "lora_r": "override", "max_grad_norm": str(path), "ckpt_path": "model/llama-7b.yaml"}
    assert {name: shown[name] for name in expected} == expected
    assert shown["learning_rate"] == "default"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_r: 0", "lora_r=0: must be a whole number >= 1 ({path})"),
        ("learnig_rate: 1", "unknown setting 'learnig_rate'; did you mean learning_rate? ({path})"),
        ("learing_rate: 1\nlearning_rate: 2", "learing_rate is the guide's name of learning_rate; give one of the two"),
        ("lora_r: [", "{path}: while parsing"),
        ("lora_r: 1\nlora_r: 2", "{path}: while constructing a mapping"),
        ("- 1", "{path}: a mapping of settings is expected, not a list"),
        ("defaults: [model: llama-7b]", "{path}: a defaults list has no place here"),
    ],
)
def test_problems_of_a_file(text, message, conf):
    path = conf(text)
    with pytest.raises(ConfigError) as caught:
        load(conf_path=path)
    assert caught.value.problems[0].startswith(message.format(path=path))


@pytest.mark.parametrize(
    ("given", "implied"),
    [
        ({"use_quant": "true"}, {"use_lora": True}),
        ({"bit_training": "true"}, {"zero_stage": 0}),
        ({"use_nvlamb": "true"}, {"optimizer": "LAMB", "zero_stage": 0}),
        ({"optimizer": "lamb"}, {"zero_stage": 0}),
    ],
)
def test_a_flag_of_the_guide_works_alone(given, implied):
    """Defaults that contradict it give way, and say why; what somebody gave stays."""
    from training.planning.compatibility import problems
    from training.settings import TrainSettings

    loaded = load({"model": "llama-65b", **given})
    assert {name: getattr(loaded.settings, name) for name in implied} == implied
    assert all(loaded.origins[name].startswith("follows from ") for name in implied)
    assert problems(TrainSettings.of(loaded.settings), {"model_type": "llama"}, packing=True) == []
    assert load({"model": "llama-65b", **given, "zero_stage": 1}).settings.zero_stage == 1


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(conf_path=tmp_path / "none.yaml")


def test_a_group_takes_its_part_of_the_whole():
    from data_prep.settings import PackSettings

    settings = load({"seed": 9}).settings
    assert PackSettings.of(settings).seed == 9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1: 2", "1 is the name of no setting"),
        ("architecture: {null: 3}", "no text"),
        ("architecture: &a\n  model_type: llama\n  again: *a", "stands inside the very value that it names"),
        ("mixture: &a [*a]", "stands inside the very value that it names"),
    ],
)
def test_yaml_that_is_no_tree_of_texts_is_one_clear_error(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load({}, conf_path=tmp_path / "mine.yaml")


def test_a_password_in_the_address_of_mlflow_is_refused_for_a_run():
    settings = load({"mlflow_tracking_uri": "http://me:hunter2@mlflow:5000"}).settings
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD in the environment") as caught:
        preflight.check(settings, set())
    assert "hunter2" not in str(caught.value)
