"""What `--help` says of commands and options."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from typer.main import get_command

from lesa_ray import cli
from tests.test_cli import run


def test_summaries_of_commands_are_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, monkeypatch, "--help")
    summaries = dict(re.findall(r"^  (\w+)  +(\S.*)$", out.partition("Commands:")[2], re.MULTILINE))
    group: Any = get_command(cli.app)
    assert (code, summaries.keys()) == (0, group.commands.keys())
    assert [name for name, text in summaries.items() if not text.endswith(".") or text.endswith("...")] == []


def test_every_option_says_what_it_is() -> None:
    group: Any = get_command(cli.app)
    helps = {
        f"{name} {option.opts[0]}": option
        for name, command in group.commands.items()
        for option in command.params
        if option.param_type_name == "option"
    }
    assert [name for name, option in helps.items() if not option.help or re.match(r"\[|None", option.help)] == []
    assert [name for name, option in helps.items() if re.search(r"None[: ]", option.help)] == []
    for name in ("pretrain --data", "pretrain --out", "finetune --data", "finetune --out"):
        assert helps[name].help.endswith("[required; here or in --config]")
    assert helps["pretrain --loggers"].metavar == "mlflow|wandb"
    assert "`2-8`" in helps["finetune --workers"].help


@pytest.mark.parametrize("command", ["expand", "compare"])
def test_help_waits_for_no_torch(command: str) -> None:
    script = (
        f"import sys; from lesa_ray import cli; sys.argv = ['lesa-ray', '{command}', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, timeout=360)
