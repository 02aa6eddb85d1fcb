"""What the README shows is what runs."""

import re
from pathlib import Path

import pytest
import torch

from hyperdescent.inner.registry import RULES, WRAPPERS, find_rule
from hyperdescent.scripts.catalogue import MARKS, table

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
        if "softsign" in names:
            check_softsign(names)
        if "averaged" in names:
            check_mixed(names["rule"], names["averaged"])
    else:
        rows = names["found"].rows
        assert rows[0].error == 0 and all(row.error < 0.01 for row in rows)
        assert (tmp_path / "methods.png").exists()


def check_softsign(names):
    """The rule of the reader's own learns all three, and its torch form is its mathematics."""
    assert names["result"].route == "gradient" and len(names["result"].hypers) == 3
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    p.grad = torch.tensor([3.0, -0.5])
    names["Softsign"]([p], lr=0.1, beta=0.0, eps=4.0).step()
    expected = torch.tensor([1 - 0.1 * 3 / 5, -2 + 0.1 * 0.5 / 16.25**0.5])
    torch.testing.assert_close(p.detach(), expected)


def check_mixed(rule, averaged):
    assert rule == find_rule("clip_norm(cautious(muon), max_norm=0.5)")
    assert {"max_norm", "lr", "momentum"} <= rule.hypers.keys()
    assert averaged.readout and {"decay", "rest_lr", "aux_lr"} <= averaged.hypers.keys()


def test_the_table_of_rules_is_that_of_the_registry():
    text = (ROOT / "README.md").read_text()
    first, last = MARKS
    found = text[text.index(first) : text.index(last) + len(last)]
    assert found == table(RULES.values()), "run `hyperdescent rules --markdown` and put it there"


def test_every_wrapper_is_named():
    text = (ROOT / "README.md").read_text()
    assert all(re.search(rf"\b{name}[,.]", text) for name in WRAPPERS)


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
