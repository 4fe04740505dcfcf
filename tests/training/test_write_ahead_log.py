"""The write-ahead log survives torn writes, and knows which steps were lost."""

import errno
import pathlib

import pytest

from dpoptax.training._resume.write_ahead_log import SLOT_SIZE, WriteAheadLog


def test_a_torn_log_keeps_its_other_slot(tmp_path):
    path = tmp_path / "log"
    log = WriteAheadLog(path)
    log.begin_segment("a", 0)
    log.authorize(10)
    log.authorize(20)
    whole = path.read_bytes()
    assert WriteAheadLog(path).segments == [("a", 0, 20)]
    newest = 3 % 2
    torn = bytearray(whole)
    torn[newest * SLOT_SIZE + 40] ^= 1
    path.write_bytes(torn)
    assert WriteAheadLog(path).segments == [("a", 0, 10)]
    path.write_bytes(b" " * len(whole))
    assert WriteAheadLog(path).segments == []
    path.write_bytes(b"x" * len(whole))
    with pytest.raises(ValueError, match="unknown how many steps were released"):
        WriteAheadLog(path)


def test_a_write_torn_at_any_byte_leaves_the_log_before_or_after_it(tmp_path):
    path = tmp_path / "log"
    log = WriteAheadLog(path)
    log.begin_segment("a", 0)
    log.authorize(10)
    before = path.read_bytes()
    log.authorize(20)
    after = path.read_bytes()
    slot = 3 % 2 * SLOT_SIZE
    for length in (0, 1, 63, 64, 65, 100, 200, SLOT_SIZE - 1, SLOT_SIZE):
        torn = before[:slot] + after[slot : slot + length] + before[slot + length :]
        path.write_bytes(torn)
        # All bytes after the text are padding, so a write of 200 bytes is complete.
        assert WriteAheadLog(path).segments == [("a", 0, 20 if length >= 200 else 10)]


def test_lost_steps_are_those_that_no_later_segment_kept(tmp_path):
    log = WriteAheadLog(tmp_path / "log")
    for program, first, end in (("a", 0, 100), ("b", 60, 150), ("c", 40, 90)):
        log.begin_segment(program, first)
        log.authorize(end)
    assert sorted(log.lost_steps(90)) == [(40, 100), (60, 150)]
    assert sorted(log.lost_steps(70)) == [(40, 100), (60, 150), (70, 90)]
    assert log.continues("c", 50)
    assert not log.continues("c", 39)
    assert not log.continues("c", 91)
    assert not log.continues("b", 50)


def test_a_log_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    log = WriteAheadLog(tmp_path / "log")
    log.begin_segment("a", 0)

    def full(self, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        log.authorize(1)


def test_a_log_of_too_many_segments_is_full(tmp_path):
    log = WriteAheadLog(tmp_path / "log")
    log.begin_segment("a" * (SLOT_SIZE // 2), 0)
    with pytest.raises(OSError, match="is full: the run was changed too often"):
        log.begin_segment("a" * (SLOT_SIZE // 2), 1)


def test_only_its_owner_can_read_the_log(tmp_path):
    log = WriteAheadLog(tmp_path / "log")
    log.begin_segment("a", 0)
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0
    assert (tmp_path / "log").stat().st_size == 2 * SLOT_SIZE
