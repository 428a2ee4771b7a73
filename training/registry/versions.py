"""Versions of registered models: name one, list them, have their files on this machine, move their aliases.

In: what a person types (`models:/NAME/7`, `models:/NAME@champion`, `NAME`) and the URI of MLflow. Out: `Version`, plain
values. Two aliases have a meaning: `champion`, the version to use, and `challenger`, the newest one that has not become
it. Cost: one or two requests to MLflow each.
"""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import PandaError, did_you_mean
from training.registry.proof import WEIGHTS, local_path
from training.registry.register import FINAL_ERRORS
from training.tracking.redact import redact_text, what_it_says
from training.tracking.sync import connect
from training.tracking.tags import BENCHMARK_TAG, TAKEDOWN_TAG, tagged

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CHAMPION, CHALLENGER = "champion", "challenger"
MAX_TAG_CHARS = 4500  # MLflow takes 5,000 bytes and more, depending on its database
MAX_DESCRIPTION_CHARS = 5000  # PostgreSQL refuses a longer one
REFERENCE = re.compile(r"^(?:models:/)?(?P<name>[^/@:]+)(?:[/:](?P<version>\d+)|@(?P<alias>[\w-]+))?$")


class RegistryError(PandaError):
    """What was asked for is not in the registry, or MLflow does not answer."""


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    version: int
    run_id: str
    source: str  # models:/<id of the logged model>
    created_ms: int
    tags: dict[str, str]
    aliases: list[str] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def taken_down(self) -> list[str]:
        """Content hashes of records this version has seen and that were taken down since."""
        return sorted(tagged(self.tags, TAKEDOWN_TAG))

    @property
    def benchmarks(self) -> dict[str, str]:
        """Task -> what this version scored."""
        return dict(sorted(tagged(self.tags, BENCHMARK_TAG).items()))


class Registry:
    """The registry at one URI."""

    def __init__(self, uri: str):
        self.uri = uri

    @property
    def shown_uri(self) -> str:
        """The URI without a password."""
        return redact_text(self.uri)

    @property
    def client(self) -> "MlflowClient":
        return connect(self.uri)

    def names(self) -> list[str]:
        """Registered models."""
        return sorted(model.name for model in pages(self.client.search_registered_models))

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions (of a model), by name and number."""
        found = [version for one in ([name] if name else self.names()) for version in self._versions(one)]
        return sorted(found, key=lambda version: (version.name, version.version))

    def _versions(self, name: str) -> list[Version]:
        aliases = self._aliases(name)
        found = pages(self.client.search_model_versions, filter_string=f"name = '{name}'")
        return [_version(entity, aliases) for entity in found]

    def _aliases(self, name: str) -> dict[str, int]:
        try:
            return {alias: int(number) for alias, number in self.client.get_registered_model(name).aliases.items()}
        except _mlflow_error() as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise

    def resolve(self, reference: str) -> Version:
        """The version a person means; a bare name means its champion, without one the newest version."""
        match = REFERENCE.match(reference)
        if not match:
            raise RegistryError(f"{reference!r}: write NAME, NAME@ALIAS or NAME:VERSION (or models:/NAME/VERSION)")
        name, number, alias = match["name"], match["version"], match["alias"]
        versions = self.versions(name)
        if not versions:
            near = did_you_mean(name, self.names())
            raise RegistryError(f"{reference!r}: no registered model {name!r} in {self.shown_uri}{near}")
        wanted = [version for version in versions if _is_meant(version, number, alias)]
        if wanted:
            return wanted[0]
        if alias or number:
            known = ", ".join(str(one.version) + "".join(f"@{a}" for a in one.aliases) for one in versions)
            raise RegistryError(f"{reference!r}: there is no such version of {name}; it has {known}")
        return versions[-1]

    def champion(self, name: str) -> Version | None:
        """The version to use; None as long as no version was good enough."""
        return next((version for version in self.versions(name) if CHAMPION in version.aliases), None)

    def of_run(self, run_id: str) -> Version | None:
        """The version that a run registered."""
        found = pages(self.client.search_model_versions, filter_string=f"run_id = '{run_id}'")
        return _version(found[0], self._aliases(found[0].name)) if found else None

    def tag(self, version: Version, tags: dict[str, str]) -> None:
        """Set tags of a version; long texts are cut."""
        for name, value in tags.items():
            self.client.set_model_version_tag(version.name, str(version.version), name, value[:MAX_TAG_CHARS])

    def describe(self, version: Version, markdown: str) -> None:
        """Set the description that MLflow shows with a version; a long one loses its last lines."""
        if len(markdown) > MAX_DESCRIPTION_CHARS:
            markdown = markdown[: markdown.rfind("\n", 0, MAX_DESCRIPTION_CHARS)]
        self.client.update_model_version(version.name, str(version.version), markdown)

    def set_alias(self, version: Version, alias: str) -> None:
        self.client.set_registered_model_alias(version.name, alias, str(version.version))

    def drop_alias(self, version: Version, alias: str) -> None:
        """Take an alias away from this version, if it has it."""
        if self._aliases(version.name).get(alias) == version.version:
            self.client.delete_registered_model_alias(version.name, alias)

    def files(self, version: Version, cache_dir: Path) -> Path:
        """The model's files (weights, tokenizer) on this machine: where MLflow keeps them, else fetched once.

        :raises RegistryError: MLflow has them no more.
        """
        try:
            location = self.client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
            stored = local_path(location)
            if stored and (stored / WEIGHTS).is_dir():
                return stored / WEIGHTS
            return self._fetched(version, cache_dir)
        except _mlflow_error() as error:
            if error.error_code not in FINAL_ERRORS:
                raise
            raise RegistryError(f"{version.uri}: its files are not there any more: {what_it_says(error)}") from error

    def _fetched(self, version: Version, cache_dir: Path) -> Path:
        final = cache_dir / "registry" / version.source.removeprefix("models:/")
        if not final.is_dir():
            from mlflow.artifacts import download_artifacts

            final.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".fetching-", dir=final.parent) as directory:
                fetched = Path(download_artifacts(version.source, dst_path=directory, tracking_uri=self.uri))
                if not (fetched / WEIGHTS).is_dir():
                    raise RegistryError(f"{version.uri}: no {WEIGHTS} in it; it was not registered by this project")
                shutil.move(fetched / WEIGHTS, final)
        return final

    def file(self, version: Version, name: str) -> bytes | None:
        """An artifact of the run behind a version; None if it has none of that name."""
        with tempfile.TemporaryDirectory(prefix="panda-artifact-") as directory:
            try:
                return Path(self.client.download_artifacts(version.run_id, name, directory)).read_bytes()
            except (_mlflow_error(), OSError):
                return None

    def artifact(self, version: Version, name: str) -> str | None:
        """The same as text."""
        content = self.file(version, name)
        return None if content is None else content.decode()

    def json_artifact(self, version: Version, name: str) -> Any:
        """An artifact that is JSON, {} if it is not there."""
        text = self.artifact(version, name)
        return json.loads(text) if text else {}


def _is_meant(version: Version, number: str | None, alias: str | None) -> bool:
    if number:
        return version.version == int(number)
    return (alias or CHAMPION) in version.aliases


def _version(entity: Any, aliases: dict[str, int]) -> Version:
    number = int(entity.version)
    return Version(
        name=entity.name,
        version=number,
        run_id=entity.run_id or "",
        source=entity.source,
        created_ms=int(entity.creation_timestamp),
        tags=dict(entity.tags),
        aliases=sorted(alias for alias, owner in aliases.items() if owner == number),
    )


def pages(search: Any, **options: Any) -> list[Any]:
    """All results of a search of MLflow."""
    found, token = [], None
    while True:
        page = search(page_token=token, **options)
        found += page
        token = page.token
        if not token:
            return found


def _mlflow_error() -> Any:
    """MLflow's exception, whose import takes seconds."""
    from mlflow.exceptions import MlflowException

    return MlflowException
