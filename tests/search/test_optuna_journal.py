"""The journal survives torn lines, killed writers and second writers."""

import json

import optuna
import pytest
from optuna.storages.journal import JournalFileSymlinkLock

from hyperdescent.search.optuna_journal import open_journal, repair


def study_on(path):
    return optuna.create_study(study_name="search", storage=open_journal(path), load_if_exists=True)


def add(study, count):
    for _ in range(count):
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize("torn", [1, 9, 40])
def test_a_torn_last_line_is_cut_off_and_appended_behind(tmp_path, torn):
    path = tmp_path / "trials.log"
    add(study_on(path), 3)
    cut(path, torn)
    again = study_on(path)
    assert len(again.trials) == 3
    add(again, 2)
    reread = study_on(path)
    assert len(reread.trials) == 5
    assert sum(t.state.is_finished() for t in reread.trials) >= 4
    for line in path.read_text().splitlines():
        json.loads(line)


def test_a_torn_line_breaks_optuna_by_itself(tmp_path):
    """The reason for `repair`; when this fails, Optuna has learned to do it."""
    path = tmp_path / "trials.log"
    add(study_on(path), 3)
    cut(path, 9)
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    with pytest.raises(Exception):  # noqa: B017  # which one differs by version
        unrepaired = optuna.load_study(
            study_name="search", storage=optuna.storages.JournalStorage(backend)
        )
        add(unrepaired, 1)
        study_on(path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b"a\n", b"a\n"),
        (b"a\nb", b"a\n"),
        (b"only a fragment", b""),
        (b"a\n\n", b"a\n\n"),
        (b"a\n\xff\xfe", b"a\n"),
    ],
)
def test_repair_keeps_whole_lines(tmp_path, before, after):
    path = tmp_path / "lines"
    path.write_bytes(before)
    repair(path)
    assert path.read_bytes() == after


def test_the_lock_of_a_killed_writer_is_taken_away(tmp_path):
    path = tmp_path / "trials.log"
    add(study_on(path), 1)
    # Not released: what kill -9 leaves behind. Optuna would wait 30 s for it.
    JournalFileSymlinkLock(str(path)).acquire()
    before = set(tmp_path.iterdir())
    storage = open_journal(path)
    assert len(before - set(tmp_path.iterdir())) == 1
    add(optuna.load_study(study_name="search", storage=storage), 1)


def test_a_journal_that_does_not_exist_yet_is_begun(tmp_path):
    assert study_on(tmp_path / "trials.log").trials == []
