"""What a submitted job writes does not go with the folder that Ray unpacked for it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import typer.testing
import yaml

from lesa_ray import UserError, cli
from lesa_ray.job_folder import check_kept
from pipelines import layerwise_study, study
from tests.cluster.manifests import CLUSTER

PIPELINES = CLUSTER.parent / "pipelines"
STORE = {"name": "x", "store": "kept", "factor": 1.5, "methods": ["solar"], "stages": {"expand": {}}}
FILES = {
    "fleet.yaml": STORE | {"families": [{"name": "a", "checkpoint": "b"}]},
    "compare.yaml": {
        "name": "x", "store": "kept", "base": "b", "data": "d", "tokens": 10, "arms": [{"method": "solar"}],
    },
}  # fmt: skip
RUNTIME = {"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip", "env_vars": {"AWS_REGION": "us-west-2"}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of a job, which this process is."""
    folder = tmp_path / "_ray_pkg_0123456789abcdef"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(yaml.safe_dump(content))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": RUNTIME, "metadata": {}}))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "expand b kept", "tokenize d t kept", "pretrain c --data d --out kept", "finetune c --data d --out kept",
        "evaluate c --data d --out kept", "analyze b --out kept", "export run kept", "report run --out kept",
        "layerwise kept --profile crown --layers 6 --params 990K --d-model 64 --kv-heads 1",
        "fleet fleet.yaml", "compare compare.yaml",
    ],
    ids=lambda command: command.split()[0],
)  # fmt: skip
def test_a_result_that_would_be_lost_is_refused(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lesa-ray", *command.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert " kept: lies in the folder that Ray unpacked for this job, and would go with it; give a URL" in line
    assert {path.name for path in folder.iterdir()} == set(FILES)


@pytest.mark.parametrize("job", [study, layerwise_study])
def test_studies_too(job: object, folder: Path) -> None:
    name = {study: "study_minutes.yaml", layerwise_study: "layerwise_study.yaml"}[job]  # type: ignore[index]
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(job.main)  # type: ignore[attr-defined]
    result = typer.testing.CliRunner().invoke(app, ["--config", str(PIPELINES / name), "--out", "kept"])
    assert result.exit_code == 2
    assert "would go with it" in result.stderr
    assert {path.name for path in folder.iterdir()} == set(FILES)


def test_other_places_and_other_processes_write_where_they_like(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(folder)
    for place in (".", "a/b", str(folder / "a"), str(tmp_path / "link" / "a")):
        with pytest.raises(UserError, match=r"^OUT "):
            check_kept("OUT", place)
    for kept in (None, "s3://bucket/a", str(tmp_path / "a"), "../a", "~/a", f"{folder}-2"):
        check_kept("OUT", kept)
    for environment in ({}, {"env_vars": {"AWS_REGION": "us-west-2"}}):  # on a machine's own folders
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": environment}))
        check_kept("OUT", "a")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    check_kept("OUT", "a")


def submitted() -> list[tuple[Path, list[str]]]:
    """The commands that files of settings give for a cluster."""
    found: list[tuple[Path, list[str]]] = []
    for path in sorted(PIPELINES.rglob("*.yaml")):
        lines = [line.removeprefix("#").split("  # ")[0] for line in path.read_text().splitlines() if line[:1] == "#"]
        whole = "\n".join(lines).replace("\\\n", " ").splitlines()
        found += [(path, shlex.split(line)) for line in whole if " -- " in line and "submit" in line]
    return found


@pytest.mark.parametrize(("path", "command"), submitted(), ids=lambda value: getattr(value, "name", ""))
def test_jobs_that_are_shipped_write_to_a_store(path: Path, command: list[str]) -> None:
    assert command[:5] == ["lesa-ray", "submit", "--", "python", "-m"]
    assert str(path.relative_to(CLUSTER.parent)) in command
    settings = yaml.safe_load(path.read_text())
    for place in {settings.get("out"), settings.get("store")} - {None}:
        assert place.startswith("s3://BUCKET/") or f"s3://BUCKET/{place}" in command
