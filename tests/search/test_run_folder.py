"""A run's folder: state survives, files change in one move, and it belongs to one run."""

import json
import os

import pytest
import torch

from hyperdescent.search.run_folder import RunFolder, write_text


def test_state_survives(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.load_state() is None
    state = {"rows": [{"loss": None, "on": True, "x": [1, "a"]}], "z": torch.randn(3).double()}
    folder.save_state(state)
    back = RunFolder(tmp_path).load_state()
    assert back["rows"] == state["rows"]
    torch.testing.assert_close(back["z"], state["z"], rtol=0, atol=0)


def test_no_partial_file_is_left(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save_state({"a": 1})
    write_text(tmp_path / "result.json", "{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json", "state.pt"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save_state({"a": 1})
    write_text(tmp_path / "result.json", "old")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.save_state({"a": 2})
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "result.json", "new")
    assert folder.load_state() == {"a": 1}
    assert (tmp_path / "result.json").read_text() == "old"


def test_the_same_settings_may_come_again(tmp_path):
    folder, settings = RunFolder(tmp_path / "run"), {"lr": 0.1, "learn": ("lr", "beta1")}
    for _ in range(2):
        with folder.claimed(settings):
            folder.save_state({})
    assert json.loads((folder.path / "settings.json").read_text())["learn"] == ["lr", "beta1"]


def test_other_settings_are_named_with_both_values(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.claimed({"seed": 0, "steps": 5}):
        folder.save_state({})
    with pytest.raises(ValueError, match="seed was 0, now 1") as told, folder.claimed({"seed": 1}):
        pass
    assert "steps was 5, now None" in str(told.value)
    assert str(tmp_path) in str(told.value)
    # The refusal changed nothing.
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 0, "steps": 5}


def test_a_claim_that_evaluated_nothing_binds_nobody(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(RuntimeError), folder.claimed({"steps": 10**9}):
        raise RuntimeError("such as a budget too small for so many steps")
    with folder.claimed({"steps": 10}):
        pass
