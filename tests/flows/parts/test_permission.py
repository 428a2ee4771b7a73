"""What parameters of a deployed run may say, field by field; command line and files of the machine may say more."""

import typing
from pathlib import Path

import pytest
import yaml

from configs.errors import ConfigError
from configs.field_types import plain
from configs.settings import PandaSettings
from flows.parts import permission
from flows.parts.form import configure, read
from flows.parts.permission import ADDRESSES, CHECKPOINTS, HARMLESS, MAPPINGS, OWNERS_ALONE, PATHS

OUTSIDE = "outside of the directories that parameters of a run may name"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project directory; a server asks for what is run."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "00000000-0000-0000-0000-000000000000")
    monkeypatch.setenv("SECRET", "hunter2")
    return folder


def by_hand(monkeypatch) -> None:
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID")


def refusal(**parameters) -> str:
    with pytest.raises(ConfigError) as caught:
        read(parameters)
    return str(caught.value)


def test_every_setting_has_been_asked_what_it_can_do():
    """A new text, list or mapping has to be put into one of the sets; a set names nothing that is gone."""
    simple = {
        name
        for name, info in PandaSettings.model_fields.items()
        if (kind := plain(info.annotation)) in (bool, int, float) or typing.get_origin(kind) is typing.Literal
    }
    sets = [PATHS, CHECKPOINTS, ADDRESSES, MAPPINGS, HARMLESS, OWNERS_ALONE]
    assert sum(map(len, sets)) == len(set().union(*sets))
    assert set().union(*sets) | simple == PandaSettings.model_fields.keys()
    assert simple & set().union(*sets) == {"trust_remote_code"}


@pytest.mark.parametrize("name", sorted(PATHS | CHECKPOINTS))
def test_paths_outside(project, name):
    (project / "link").symlink_to("/etc")
    for value in ("/etc", "../elsewhere", "~/x", "link/x", "a\0/b"):
        with pytest.raises(ConfigError, match="no path" if "\0" in value else OUTSIDE):
            permission.check_settings(PandaSettings(**{name: value}), {name})
    assert f"a line in {project}/panda.toml: allowed_roots = [" in refusal(**{name: "/etc/x"})
    assert OUTSIDE in refusal(overrides=[f"{name}=/etc/x"])


@pytest.mark.parametrize("name", sorted(PATHS))
def test_paths_inside(project, name):
    for value in ("my/folder", str(project / "x"), "./x/../y"):
        permission.check_settings(PandaSettings(**{name: value}), {name})
    assert getattr(read({name: "my/folder"}).settings, name) == "my/folder"


def test_a_root_that_the_owner_adds(project, tmp_path):
    (project / "panda.toml").write_text(f'allowed_roots = ["{tmp_path}/disk", "../other"]')
    assert read({"output_dir": f"{tmp_path}/disk/outputs", "cache_dir": f"{tmp_path}/other"})
    assert OUTSIDE in refusal(output_dir=f"{tmp_path}/disk2")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "out").symlink_to("/etc")
    assert "(that is /etc)" in refusal(output_dir=f"{tmp_path}/disk/out")


@pytest.mark.parametrize("value", ["llama-7b", "owner/name", "models/mine"])
def test_names_of_models_are_no_paths_outside(project, value):
    (project / "pretrained-models").mkdir()
    assert read({"model": value}).settings.model == value
    assert read({"ckpt_path": value}).settings.ckpt_path == value


def test_a_link_below_pretrained_models_leads_somewhere(project, tmp_path):
    (tmp_path / "disk" / "mine").mkdir(parents=True)
    (project / "pretrained-models").mkdir()
    (project / "pretrained-models" / "mine").symlink_to(tmp_path / "disk" / "mine")
    assert f'allowed_roots = ["{tmp_path}/disk/mine"]' in refusal(ckpt_path="mine")
    (project / "panda.toml").write_text(f'allowed_roots = ["{tmp_path}/disk"]')
    assert read({"ckpt_path": "mine"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mlflow_tracking_uri", "http://evil:5000"), ("mlflow_tracking_uri", "sqlite:////etc/mlflow.db"),
        ("mlflow_tracking_uri", "file:///etc"), ("mlflow_tracking_uri", "/etc"),
        ("prepare_cluster", "tcp://evil:8786"), ("master_addr", "10.0.0.1"),
    ],
)  # fmt: skip
def test_addresses(project, name, value):
    said = refusal(**{name: value})
    assert f'a line in {project}/panda.toml: allowed_addresses = ["{value}"]' in said
    assert refusal(overrides=[f"{name}='{value}'"])
    (project / "panda.toml").write_text(f'allowed_addresses = ["{value}"]')
    assert getattr(read({name: value}).settings, name) == value


CORPUS = "instruction_tuning_data_dir"


def test_a_corpus_at_an_address_lies_below_one_that_the_owner_names(project):
    value = "s3://team/corpora"
    assert f'a line in {project}/panda.toml: allowed_addresses = ["{value}"]' in refusal(**{CORPUS: value})
    (project / "panda.toml").write_text('allowed_addresses = ["s3://team/corpora/"]')
    for inside in (value, f"{value}/", f"{value}/medical/2026"):
        assert getattr(read({CORPUS: inside}).settings, CORPUS) == inside


def test_corpora_at_other_addresses(project):
    (project / "panda.toml").write_text('allowed_addresses = ["s3://team/corpora"]')
    for value in (
        "s3://team/corpora-of-others", "s3://team", "s3://team/corpora/../secrets", "s3://team/corpora/%2e%2e/secrets",
        "s3://team/corpora//x", "s3://team/corpora/./x", "s3a://team/corpora", "S3://team/corpora", "file:///etc",
        "zip://x::s3://team/corpora", "s3://team/corpora?versionId=1", "https://user:hunter2@host/x",
    ):  # fmt: skip
        said = refusal(**{CORPUS: value})
        assert CORPUS in said and "hunter2" not in said


@pytest.mark.parametrize("parameters", [{"trust_remote_code": True}, {"overrides": ["trust_remote_code=true"]}])
def test_code_of_strangers(project, parameters):
    said = refusal(**parameters)
    assert "the owner of this machine can write `trust_remote_code: true` into a YAML file that conf_path names" in said
    assert not read({"trust_remote_code": False}).settings.trust_remote_code


def test_whose_code_is_not_for_others_to_say_where_it_is_trusted(project):
    (project / "weekly.yaml").write_text("trust_remote_code: true\nckpt_path: mine/model\n")
    assert read({"conf_path": "weekly.yaml", "max_steps": 5}).settings.trust_remote_code
    for parameters in ({"ckpt_path": "evil/model"}, {"overrides": ["ckpt_path=evil/model"]}, {"model": "evil/model"}):
        assert "decides which code runs here" in refusal(conf_path="weekly.yaml", **parameters)


def test_a_hostfile_starts_commands_on_other_machines(project):
    assert "it makes this machine run code" in refusal(hostfile="hosts.txt")


@pytest.mark.parametrize(
    "parameters",
    [
        {"experiment_name": "${oc.env:SECRET}"},
        {"overrides": ["experiment_name=${oc.env:SECRET}"]},
        {"overrides": ["experiment_name='\\${oc.env:SECRET}'"]},
        {"architecture": {"model_type": "llama", "x": ["${oc.env:SECRET}"]}},
        {"template": {"_target_": "mine.template", "${oc.env:SECRET}": 1}},
        {"conf_path": "${oc.env:SECRET}.yaml"},
    ],
)
def test_nothing_of_the_environment_is_told(project, parameters):
    said = refusal(**parameters)
    assert "is resolved in files of this machine only" in said and "hunter2" not in said


def test_the_name_of_a_run_tells_nothing_of_the_environment(project, monkeypatch):
    """It is made before the run can refuse anything."""
    from flows.parts import form

    parameters = {"overrides": ["ckpt_path=${oc.env:SECRET}/x"]}
    monkeypatch.setattr(form, "flow_run", type("FlowRun", (), {"id": None, "parameters": parameters, "tags": []}))
    assert form.run_title().endswith(" configuration error")
    by_hand(monkeypatch)
    assert "x on" in form.run_title()


def test_a_configuration_may_say_anything_where_it_may_lie(project, tmp_path):
    wide = {"output_dir": "/srv/outputs", "mlflow_tracking_uri": "http://mlflow", "experiment_name": "${oc.env:SECRET}"}
    (project / "weekly.yaml").write_text(yaml.safe_dump({**wide, "trust_remote_code": True}))
    settings = read({"conf_path": "weekly.yaml", "learning_rate": 0.5}).settings
    assert (settings.output_dir, settings.experiment_name, settings.learning_rate) == ("/srv/outputs", "hunter2", 0.5)
    (tmp_path / "weekly.yaml").write_text("{}")
    assert f'allowed_roots = ["{tmp_path}"]' in refusal(conf_path=str(tmp_path / "weekly.yaml"))
    (project / "panda.toml").write_text(f'allowed_roots = ["{tmp_path}"]')
    assert read({"conf_path": str(tmp_path / "weekly.yaml")})


@pytest.mark.parametrize("name", ["dataset/records.json", "dataset/x.yaml", "/etc/passwd", "cache/x.yml", "mine.txt"])
def test_what_others_write_is_no_configuration(project, name):
    """JSON is YAML: a corpus that a stranger has written could say anything."""
    if not name.startswith("/"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("trust_remote_code: true")
    said = refusal(conf_path=name)
    assert "only" in said or "whose files others write" in said


def test_hydra_is_not_configured_by_the_user(project, monkeypatch):
    by_hand(monkeypatch)
    (project / "mine.yaml").write_text("hydra: {searchpath: [/tmp]}")
    assert "`hydra` is no setting" in refusal(conf_path="mine.yaml")


@pytest.mark.parametrize(
    "value",
    [
        {"_target_": "mine.log", "file": "/etc/passwd"},
        {"_target_": "mine.log", "files": [{"x": "../../elsewhere"}]},
        {"_target_": "mine.log", "where": "http://evil/"},
    ],
)
def test_places_in_the_fields_of_a_node(project, value):
    assert "panda.toml" in refusal(callbacks=[value])
    assert "panda.toml" in refusal(reader=value)
    assert read({"callbacks": [{"_target_": "mine.log", "file": "losses.txt", "separator": "/", "tag": "a/b"}]})


@pytest.mark.parametrize("override", ["+reader.file=/etc/x", "+read_tensor.file=/etc/x"])
def test_a_setting_is_known_by_the_name_of_the_guide_too(project, override):
    """`read_tensor` is `reader`: what it may say does not depend on how it is spelled."""
    assert "reader='/etc/x': outside" in refusal(overrides=["+reader._target_=mine.read", override])


def test_an_architecture_names_no_kernels_of_the_hub(project):
    said = refusal(architecture={"model_type": "llama", "attn_implementation": "evil/kernel"})
    assert "'evil/kernel' is no value of a model's configuration but a place" in said
    assert refusal(overrides=["+architecture._attn_implementation=evil/kernel"])
    assert read({"architecture": {"model_type": "llama", "hidden_act": "silu", "rope_scaling": {"rope_type": "yarn"}}})


def test_a_node_in_a_parameter_is_refused_at_once(project):
    (project / "dataset" / "instruction_tuning").mkdir(parents=True)
    (project / "dataset" / "instruction_tuning" / "a.json").write_text('[{"input": "a", "target": "b"}]')
    node = {"_target_": "builtins.print", "x": {"_target_": "subprocess.getoutput", "cmd": "touch pwned"}}
    with pytest.raises(ConfigError) as caught:
        configure({"template": node})
    assert "template: builtins.print may not be named by `_target_`" in str(caught.value)
    assert "template: subprocess.getoutput may not be named" in str(caught.value)
    assert not (project / "pwned").exists()


def test_what_the_owner_wrote_into_prefect_yaml_is_his(project):
    """Parameters of deployments and of schedules, of the Kubernetes example too; a server's own are not."""
    mine = {"output_dir": "/data/outputs", "trust_remote_code": True, "ckpt_path": "mine/model"}
    schedule = {"parameters": {"conf_path": "/srv/weekly.yaml", "overrides": ["cache_dir=/data/cache"]}}
    deployments = {"deployments": [{"name": "default", "parameters": mine, "schedules": [schedule, {"cron": "x"}]}, {}]}
    (project / "prefect.yaml").write_text(yaml.safe_dump(deployments))
    settings = read({**mine, "overrides": ["cache_dir=/data/cache"]}).settings
    assert settings.trust_remote_code and settings.cache_dir == "/data/cache"
    assert OUTSIDE in refusal(**{**mine, "output_dir": "/data/others"})
    assert "decides which code runs here" in refusal(**{**mine, "ckpt_path": "evil/model"})
    assert "overrides" not in refusal(conf_path="/srv/weekly.yaml")  # allowed to be read; it is not there
    assert OUTSIDE in refusal(overrides=["cache_dir=/data/cache", "output_dir=/data/others"])
    (project / "deploy" / "kubernetes").mkdir(parents=True)
    kubernetes = Path(__file__).parents[3] / "deploy" / "kubernetes" / "prefect.yaml"
    parameters = yaml.safe_load(kubernetes.read_text())["deployments"][0]["parameters"]
    assert refusal(**parameters)
    (project / "deploy" / "kubernetes" / "prefect.yaml").write_text(kubernetes.read_text())
    assert read(parameters).settings.output_dir == "/data/outputs"


def test_a_run_to_resume_cannot_bring_a_place_in(project):
    assert OUTSIDE in refusal(resume=True, output_dir="/tmp")


def test_a_person_at_the_machine_may_say_anything(project, monkeypatch):
    by_hand(monkeypatch)
    given = {"output_dir": "/srv/outputs", "trust_remote_code": True, "mlflow_tracking_uri": "http://mlflow:5000"}
    assert read({**given, "overrides": ["experiment_name=${oc.env:SECRET}"]}).settings.experiment_name == "hunter2"
    assert not permission.check_parameters(given)
