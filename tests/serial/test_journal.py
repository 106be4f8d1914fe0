"""The journal of a job: what it has is there after any end, torn, damaged or full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mpishard.errors import UserError
from mpishard.storage import journal as module
from mpishard.storage.journal import Journal, write_whole

FACTS = {"input": "sha256 12", "seed": 3, "stop": ["a"]}
MADE = [(4, b'{"id": "four"}'), (0, b'{"text": "1 2\\n"}'), (17, "é".encode())]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.journal"


def write(path: Path, made: list[tuple[int, bytes]] = MADE) -> bytes:
    """A journal of `made`, and its bytes."""
    journal = Journal(path, FACTS)
    journal.append(made)
    journal.close()
    return path.read_bytes()


def read(path: Path) -> dict[int, bytes]:
    """What a journal has, before it is closed again."""
    journal = Journal(path, FACTS)
    content = {place: journal[place] for place in range(20) if place in journal}
    assert len(content) == len(journal)
    journal.close()
    return content


def test_what_is_appended_is_there(path):
    write(path, MADE[:1])
    write(path, [MADE[1], (4, b"another"), MADE[2]])
    assert read(path) == dict(MADE), "what is there first stays"
    assert path.read_bytes().count(b"\n") == 4


def test_it_can_be_read_while_it_grows(path):
    journal = Journal(path, FACTS)
    for place, content in MADE:
        journal.append([(place, content)])
        assert journal[place] == content and len(journal) == MADE.index((place, content)) + 1
    journal.close()


def test_however_it_is_torn_what_is_whole_is_kept(path):
    """Cut at every byte: after the repair nothing is lost but the line that was cut, and another
    can follow."""
    whole = write(path)
    ends = [end + 1 for end, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = max(0, sum(end <= length for end in ends) - 1)
        assert read(path) == dict(MADE[:kept]), length
        write(path)
        assert read(path) == dict(MADE) and path.read_bytes() == whole


def test_a_damaged_line_is_left_out_and_done_again(path):
    whole = write(path)
    lines = whole.splitlines(keepends=True)
    for place in range(len(lines[2])):
        spoilt = bytearray(lines[2])
        spoilt[place] ^= 1
        path.write_bytes(b"".join([lines[0], lines[1], bytes(spoilt), lines[3]]))
        journal = Journal(path, FACTS)
        assert 4 in journal
        assert (0 in journal, 17 in journal) == (False, b"\n" in spoilt[-1:]), place
        assert journal.damaged in (1, 2) or spoilt.count(b"\n") != 1
        journal.append([MADE[1], MADE[2]])
        assert {place: journal[place] for place in (0, 4, 17)} == dict(MADE)
        journal.close()
        assert read(path) == dict(MADE)


def test_lines_of_another_jobs_journal_are_left_out(path):
    """As a disk may mix them up, or somebody who means well."""
    own = write(path, MADE[:1])
    other = Journal(path.with_name("foreign"), {**FACTS, "seed": 4})
    other.append([(1, b"foreign"), (30, b"beyond"), (4, b"foreign")])
    other.close()
    foreign = path.with_name("foreign").read_bytes().splitlines(keepends=True)
    header, line = own.splitlines(keepends=True)
    path.write_bytes(b"".join([header, *foreign[1:], line, b"00000000 x y\n"]))
    journal = Journal(path, FACTS)
    assert (len(journal), journal.damaged, journal[4]) == (1, 4, MADE[0][1])
    journal.close()


def test_zeros_that_a_crash_leaves_are_left_out(path):
    whole = write(path)
    path.write_bytes(whole[:-9] + bytes(500))
    assert read(path) == dict(MADE[:2])


def test_another_jobs_is_refused(path):
    before = write(path)
    for facts, sentence in (
        ({**FACTS, "seed": 4}, "its seed is 3, here it is 4; give the same command to go on"),
        ({"input": "x"}, 'its input is "sha256 12", here it is "x"'),
        ({**FACTS, "top_k": 2}, "its top_k is null, here it is 2"),
        ({"input": "sha256 12", "seed": 3}, 'its stop is ["a"], here it is null'),
    ):
        with pytest.raises(UserError) as refused:
            Journal(path, facts)
        assert f"{path} is the journal of another job: {sentence}" in str(refused.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["my thesis", "{}", "[1]\n", '{"journal', "\n", "\x80", "[" * 99999]
)
def test_what_is_no_journal_is_left_alone(path, content):
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError) as refused:
        Journal(path, {"other": 1} if content == '{"journal' else FACTS)
        assert content == '{"journal', "torn as our own would be"
        raise UserError(f"{path} is in the way")
    assert f"{path} is in the way" in str(refused.value)
    if content != '{"journal':
        assert path.read_text(encoding="latin-1") == content


def test_two_jobs_do_not_write_to_one(path):
    first = Journal(path, FACTS)
    with pytest.raises(UserError, match="is in use: another job writes to it; wait for its end"):
        Journal(path, FACTS)
    first.close()
    assert read(path) == {}


def test_a_disk_that_is_full_leaves_what_was_there(path, monkeypatch):
    """A part of the lines may have been written already."""
    before = write(path, MADE[:1])
    journal = Journal(path, FACTS)
    calls = []

    def full(file: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_really(file, bytes(data[:7]))

    write_really = os.write
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError) as refused:
        journal.append(MADE[1:])
    monkeypatch.undo()
    assert str(refused.value) == (
        f"{path} cannot be written: No space left on device; make room, and the same command "
        "goes on from here"
    )
    journal.close()
    assert path.read_bytes() == before


def test_syncs_are_rare_and_take_a_fiftieth_of_the_time(path, monkeypatch):
    clock, syncs = [100.0], []
    monkeypatch.setattr(module, "perf_counter", lambda: clock[0])

    def sync(file: int) -> None:
        syncs.append(clock[0])
        clock[0] += 0.5  # a slow disk

    monkeypatch.setattr(os, "fsync", sync)
    journal = Journal(path, FACTS)
    syncs.clear()
    start = clock[0]
    for place in range(1000):
        clock[0] += 0.1
        journal.append([(place, b"")])
    spent = 0.5 * len(syncs)
    assert 3 <= len(syncs) and spent < 0.03 * (clock[0] - start)
    journal.close()
    assert len(syncs) > 3, "at the end in any case"


def test_the_output_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "out"

    def lines(fails: bool):
        yield b"a"
        assert not target.exists()
        if fails:
            raise OSError(errno.EFBIG, "File too large")
        yield b"b"

    with pytest.raises(UserError, match="--output .*out cannot be written: File too large; make"):
        write_whole(target, lines(True))
    assert list(tmp_path.iterdir()) == []
    write_whole(target, lines(False))
    assert target.read_bytes() == b"a\nb\n" and list(tmp_path.iterdir()) == [target]
