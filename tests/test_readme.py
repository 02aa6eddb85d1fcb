"""What the README shows is what runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FENCED = (ROOT / "README.md").read_text().split("```")[1::2]
BLOCKS = [block.removeprefix("python\n") for block in FENCED if block.startswith("python\n")]


def test_readme_has_its_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.splitlines()[0][:30])
def test_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code.replace('budget="60s"', 'budget="3s"'), names)
    if "result" in names:
        assert names["result"].outcome == "ok"
        assert names["result"].loss < float("inf")
    else:
        rows = names["found"].rows
        assert rows[0].error == 0 and all(row.error < 0.01 for row in rows)
        assert (tmp_path / "methods.png").exists()


def test_every_command_line_in_the_readme_is_understood():
    from typer.testing import CliRunner

    from hyperdescent.scripts.command import app

    lines = re.findall(r"^hyperdescent (.+)$", "".join(FENCED), re.MULTILINE)
    assert lines
    for line in lines:
        command, *words = line.split()
        told = CliRunner().invoke(app, [command, "--help"])
        assert told.exit_code == 0, line
        for flag in (word for word in words if word.startswith("--")):
            assert flag in told.output, line
