"""Files are whole or absent, keep their permissions, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mmheads import paths


@pytest.fixture
def umask():
    """Sets the umask of this process until the test ends."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


def mode(path) -> str:
    return f"{path.stat().st_mode & 0o777:03o}"


def write(path, text: str) -> None:
    with paths.write_whole(path) as temporary:
        assert temporary.suffix == path.suffix
        temporary.write_text(text)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("mask", "expected"), [(0o022, "644"), (0o077, "600"), (0o002, "664")])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path, umask, mask, expected):
    umask(mask)
    write(tmp_path / "a.csv", "new")
    assert mode(tmp_path / "a.csv") == expected


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    path.chmod(0o640)
    write(path, "new")
    assert (path.read_text(), mode(path)) == ("new", "640")


def test_the_file_behind_a_symbolic_link_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real.csv", tmp_path / "link.csv"
    real.write_text("old")
    link.symlink_to(real)
    write(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert (names(real.parent), names(tmp_path)) == (["real.csv"], ["elsewhere", "link.csv"])
    real.unlink()
    write(link, "made")
    assert real.read_text() == "made"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def fail() -> None:
        with paths.write_whole(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (path.read_text(), names(tmp_path)) == ("old", ["a.csv"])


def test_a_loop_of_links_is_an_error_of_the_system(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match=r"\[Errno"):
        write(tmp_path / "a" / "c.csv", "text")


KILLED = """
import sys, time
from pathlib import Path
from mmheads import paths
with paths.write_whole(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "a.csv"
    command = [sys.executable, "-c", KILLED, f"{path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        (left,) = names(tmp_path)
        write(tmp_path / "b.csv", "of another process that runs on")
        assert names(tmp_path) == sorted([left, "b.csv"])
        process.send_signal(signal.SIGKILL)
    time.sleep(0.1)
    paths._remove_leftovers.cache_clear()  # as in a new process
    write(path, "whole")
    assert names(tmp_path) == ["a.csv", "b.csv"]
