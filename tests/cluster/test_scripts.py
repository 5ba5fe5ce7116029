"""Shell that is shipped passes shellcheck: scripts, and the commands in the launcher's file."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.manifests import CLUSTER

ROOT = CLUSTER.parent


def check(*scripts: Path) -> None:
    found = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([found, *map(str, scripts)], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_pass_shellcheck() -> None:
    check(ROOT / ".ci" / "run", *CLUSTER.rglob("*.sh"))


def test_commands_of_the_launcher_s_file_pass_shellcheck(tmp_path: Path) -> None:
    launcher = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    commands = [line for name, lines in launcher.items() if name.endswith("_commands") for line in lines]
    assert len(commands) >= 6
    script = tmp_path / "commands.sh"
    script.write_text("#!/usr/bin/env bash\n" + "\n".join(commands) + "\n")
    check(script)


def test_shellcheck_would_find_something(tmp_path: Path) -> None:
    script = tmp_path / "wrong.sh"
    script.write_text("#!/usr/bin/env bash\ncd $1\n")
    with pytest.raises(AssertionError, match="SC2086"):
        check(script)
