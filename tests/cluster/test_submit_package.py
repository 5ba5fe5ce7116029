"""What of a checkout travels with a submitted job, and what it is called there."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from lesa_ray import UserError
from lesa_ray.distributed import submit
from lesa_ray.distributed.submit import packaged

ROOT = Path(submit.__file__).parents[2]


def contents(folder: str, tmp_path: Path) -> set[str]:
    """The files of the package that Ray's client would upload."""
    package = tmp_path / "package.zip"
    create_package(folder, package, include_gitignore=True, excludes=["__pycache__"])
    with zipfile.ZipFile(package) as archive:
        return set(archive.namelist())


def test_the_code_travels_and_nothing_else_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with packaged(["python", "-m", "pipelines.expand"]) as (folder, command):
        sent = contents(folder, tmp_path)
    assert command == ["python", "-m", "pipelines.expand"]
    assert not Path(folder).exists()
    code = [file for name in ("lesa_ray", "pipelines") for file in (ROOT / name).rglob("*")]
    assert {str(file.relative_to(ROOT)) for file in code if file.suffix in (".py", ".yaml")} <= sent
    assert {path.split("/")[0] for path in sent} == {"lesa_ray", "pipelines", ".gitignore", ".rayignore"}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with nothing in its packages; the current folder is inside."""
    checkout = tmp_path / "checkout"
    for name in ("lesa_ray", "pipelines", "cluster", "tests"):
        (checkout / name).mkdir(parents=True)
        (checkout / name / "__init__.py").write_text("")
    for name in ("pyproject.toml", ".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, checkout / name)
    monkeypatch.chdir(checkout / "pipelines")  # the current folder's checkout, not the one that this package lies in
    return checkout


def test_what_a_checkout_may_hold_stays_here(checkout: Path, tmp_path: Path) -> None:
    left = [
        ".env", "lesa_ray/.env", "prod.env.pem", "pipelines/id.key", "demo/base/model.safetensors", "dist/x.whl",
        "model/model-00001.safetensors", "blocks/0.parquet", ".git/config", ".venv/bin/python", "model/weights.bin",
        "lesa_ray/__pycache__/x.pyc",
        "README.md", "notes/mine.txt", "others/inner/module.py", "result/config.json", ".hidden.py",
    ]  # fmt: skip
    taken = [
        "mine.py", "helper.py", "crown/config.json", "heldout.jsonl", "own/inner/module.py", "own/inner/table.csv",
    ]  # fmt: skip
    for name in left + taken:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("hello")
    (checkout / ".env").write_text("secret")
    (tmp_path / "above.txt").write_text("")
    given = ["python", "-m", "own.inner.module", "mine.py", "--architecture=crown/config.json"]
    given += ["--data", "heldout.jsonl", "result", "notes", "pipelines/__init__.py", ".env", "../above.txt"]
    given += [str(tmp_path / "above.txt"), "", "-m", "tests.cluster", "-c", "print(1)" * 1000]
    with packaged(given) as (folder, command):
        sent = contents(folder, tmp_path)
    assert command == given
    assert sent == {"lesa_ray/__init__.py", "pipelines/__init__.py", ".gitignore", ".rayignore", *taken}


def test_more_than_a_head_should_hold_is_refused_by_name(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_MOST_BYTES", 100_000)
    for name, nbytes in (("pipelines/out/a.txt", 60_000), ("pipelines/out/b.txt", 60_000), ("pipelines/c.txt", 70_000)):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_bytes(bytes(nbytes))
    (checkout / "pipelines" / "left.safetensors").write_bytes(bytes(500_000))
    with (
        pytest.raises(UserError, match=r"^pipelines/out: 120\.0 kB of the 19\d\.\d kB .* may be 100\.0 kB; move it"),
        packaged(["python", "-m", "pipelines.expand"]),
    ):
        pass
    (checkout / "pipelines" / ".rayignore").write_text("/out/\n")
    with packaged(["python", "-m", "pipelines.expand"]) as (folder, _):
        assert Path(folder, "pipelines").is_dir()


def test_yaml_files_of_this_machine_travel_and_others_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my.yaml").write_text("mine")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "my.yaml").write_text("another")
    monkeypatch.chdir(tmp_path)
    given = ["python", "-m", "pipelines.expand", "--config", "my.yaml", f"--cluster={tmp_path}/deep/my.yaml"]
    given += ["s3://bucket/x.yaml", "pipelines/expand.yaml", "missing.yaml", "a=b.yaml"]
    with packaged(given) as (folder, command):
        sent = contents(folder, tmp_path)
        first, second = command[4], command[5].removeprefix("--cluster=")
        assert (Path(folder, first).read_text(), Path(folder, second).read_text()) == ("mine", "another")
    assert {first, second} <= sent
    assert Path(first).name == Path(second).name == "my.yaml"
    assert command[:4] + command[6:] == given[:4] + given[6:]


def test_of_an_installation_the_packages_alone_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    site.mkdir()
    for name in ("lesa_ray", "pipelines", "torch"):
        (site / name / "inner").mkdir(parents=True)
        (site / name / "inner" / "module.py").write_text("")
    (site / "secrets.txt").write_text("")
    monkeypatch.setattr(submit, "__file__", str(site / "lesa_ray" / "distributed" / "submit.py"))
    monkeypatch.chdir(tmp_path)
    with packaged(["python", "-m", "pipelines.expand"]) as (folder, _):
        assert contents(folder, tmp_path) == {"lesa_ray/inner/module.py", "pipelines/inner/module.py"}
