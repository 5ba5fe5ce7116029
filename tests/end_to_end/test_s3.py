"""From S3 to S3, through the command line and an embedded Ray, on a real S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lesa_ray import ExpandConfig, UserError, expand
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.expansion.runner import InlineRunner

LESA_RAY = str(Path(sys.executable).parent / "lesa-ray")


@pytest.fixture(scope="module")
def remote_base(s3: str, bases: Callable[[str], str]) -> str:
    storage = Storage(f"{s3}/base")
    for file in Path(bases("llama")).iterdir():
        storage.write(file.name, file.read_bytes())
    return storage.url


def test_lesa_from_s3_to_s3_equals_the_local_run(
    s3: str, remote_base: str, bases: Callable[[str], str], tmp_path: Path
) -> None:
    out = f"{s3}/out/lesa"
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    command = [LESA_RAY, "expand", remote_base, out, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == 8
    storage = Storage(out)
    expand(ExpandConfig(base=bases("llama"), out=str(tmp_path / "local")), runner=InlineRunner())
    local = {f.name: f.read_bytes() for f in (tmp_path / "local").iterdir()}
    assert storage.list().keys() == local.keys()  # and nothing of the work is left
    assert not storage.exists(".lesa-ray")
    for name, data in local.items():
        if name not in ("expansion.json", "README.md"):  # these name the base
            assert storage.read(name) == data, name
    assert "secret" not in done.stdout + done.stderr + storage.read("expansion.json").decode()


@pytest.mark.parametrize("method", ["solar", "llama-pro", "avg-deus"])
def test_a_local_base_to_s3_and_back(
    method: str, s3: str, remote_base: str, bases: Callable[[str], str], tmp_path: Path
) -> None:
    there, back = f"{s3}/out/{method}", str(tmp_path / "back")
    expand(ExpandConfig(base=bases("llama"), out=there, method=method), runner=InlineRunner())
    expand(ExpandConfig(base=remote_base, out=back, method=method), runner=InlineRunner())
    for file in Path(back).glob("model*"):
        assert Storage(there).read(file.name) == file.read_bytes(), file.name
    again = expand(ExpandConfig(base=bases("llama"), out=there, method=method), runner=InlineRunner())
    assert again.reused


def test_a_bucket_that_is_not_there(s3: str, bases: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match="there is nothing at"):
        expand(ExpandConfig(base="s3://no-such-bucket/base", out="/nowhere"))
    with pytest.raises(UserError, match="OUT s3://no-such-bucket/out: cannot be written"):
        expand(ExpandConfig(base=bases("llama"), out="s3://no-such-bucket/out", method="solar"))
