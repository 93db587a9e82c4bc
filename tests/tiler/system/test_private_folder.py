"""Folders for temporary files: for this user alone, in places that others cannot change, and gone at the end."""

from __future__ import annotations

import os
import signal
import stat
import tempfile
from pathlib import Path

import pytest
from outsize.tiler.system.private_folder import PREFIX, TemporaryFolderError, private_folder, why_others_can_write

pytestmark = pytest.mark.system


def test_a_folder_is_for_this_user_alone_and_is_removed(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with private_folder(tmp_path / "new" / "place", "") as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            (folder / "inside").write_text("x")
    finally:
        os.umask(before)
    assert not folder.exists()


def test_a_fork_does_not_remove_its_parents_folder(tmp_path: Path) -> None:
    with private_folder(tmp_path, "") as folder:
        opened = private_folder(tmp_path, "")
        inner = opened.__enter__()
        child = os.fork()
        if not child:
            opened.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        assert inner.is_dir()
        opened.__exit__(None, None, None)
        assert not inner.exists()
        assert folder.is_dir()


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        opened = private_folder(tmp_path, "")
        (opened.__enter__() / "left").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.glob(f"{PREFIX}*")
    aim = tmp_path / "aim"
    (aim / "precious").mkdir(parents=True)
    (tmp_path / f"{PREFIX}link").symlink_to(aim)
    (tmp_path / f"{PREFIX}file").write_text("x")
    if not os.geteuid():
        other = tmp_path / f"{PREFIX}other"
        other.mkdir()
        os.chown(other, 4242, 4242)
    with private_folder(tmp_path, "") as first, private_folder(tmp_path, "") as second:
        assert not left.exists()
        assert first.is_dir()
        assert second.is_dir()
    assert (aim / "precious").is_dir()
    assert (tmp_path / f"{PREFIX}file").is_file()
    assert (tmp_path / f"{PREFIX}other").is_dir() == (not os.geteuid())


@pytest.mark.parametrize("mode", [0o777, 0o702])
@pytest.mark.parametrize("within", ["", "inside"])
def test_a_place_that_others_can_change_is_refused(tmp_path: Path, mode: int, within: str) -> None:
    place = tmp_path / "open"
    (place / within).mkdir(parents=True)
    place.chmod(mode)
    with pytest.raises(TemporaryFolderError, match=r"open.* can be changed by all users: .*; set TMPDIR$"):
        private_folder(place / within, "set TMPDIR").__enter__()
    # As in /tmp, others cannot touch what is ours there.
    place.chmod(mode | stat.S_ISVTX)
    with private_folder(place / within, ""):
        pass


def test_a_place_of_another_users_or_a_groups_is_refused(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give folders away")
    theirs = tmp_path / "theirs"
    (theirs / "mine").mkdir(parents=True)
    os.chown(theirs, 4242, 0)
    theirs.chmod(0o1777)
    assert "belongs to user 4242" in why_others_can_write(theirs / "mine")
    os.chown(theirs, 0, 4242)
    theirs.chmod(0o775)
    assert "can be changed by the group 4242" in why_others_can_write(theirs)
    theirs.chmod(0o755)
    assert why_others_can_write(theirs) == ""
    (tmp_path / "link").symlink_to(theirs)
    theirs.chmod(0o777)
    assert "can be changed by all users" in why_others_can_write(tmp_path / "link")


@pytest.mark.parametrize("place", ["/proc", "/dev/null", "/dev/null/x", 5, "a\0b", "/" + "x" * 300])
def test_a_place_where_nothing_can_be_written_is_told_in_one_line(place: str) -> None:
    with pytest.raises(TemporaryFolderError, match=r"^no temporary files in .*; set TMPDIR$"):
        private_folder(place, "set TMPDIR").__enter__()


def test_no_place_at_all_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    with pytest.raises(TemporaryFolderError, match=r"^no temporary files in any folder: No usable .*; set TMPDIR$"):
        private_folder(None, "set TMPDIR").__enter__()
