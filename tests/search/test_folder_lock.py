"""One process at a time in a folder."""

import subprocess
import sys

import pytest

from hyperdescent.search.folder_lock import sole_writer


class TestSoleWriter:
    def test_a_second_writer_is_told_which_folder(self, tmp_path):
        folder = tmp_path / "run"
        with (
            sole_writer(folder),
            pytest.raises(BlockingIOError, match="in use by another run") as told,
            sole_writer(folder),
        ):
            pass
        assert str(folder) in str(told.value)

    def test_another_process_is_a_second_writer(self, tmp_path):
        code = (
            "import sys, pathlib\n"
            "from hyperdescent.search.folder_lock import sole_writer\n"
            "with sole_writer(pathlib.Path(sys.argv[1])): pass"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        with sole_writer(tmp_path):
            told = subprocess.run(command, capture_output=True, text=True)
            assert "BlockingIOError" in told.stderr and str(tmp_path) in told.stderr
        # And once it is let go, the other one may have it.
        subprocess.run(command, check=True)

    def test_the_folder_is_free_again_after_an_error(self, tmp_path):
        with pytest.raises(RuntimeError), sole_writer(tmp_path):
            raise RuntimeError
        with sole_writer(tmp_path):
            pass

    def test_a_system_without_flock_has_no_lock_but_everything_else(self, tmp_path):
        code = (
            "import pathlib, sys\n"
            "sys.modules['fcntl'] = None\n"
            "import hyperdescent\n"
            "from hyperdescent.search.folder_lock import sole_writer\n"
            "with sole_writer(pathlib.Path(sys.argv[1]) / 'new'): pass"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        assert (tmp_path / "new").is_dir()

    def test_folders_are_made(self, tmp_path):
        with sole_writer(tmp_path / "a" / "b"):
            assert (tmp_path / "a" / "b").is_dir()
