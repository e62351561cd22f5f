"""Files of JSON lines that grow: whole lines or none, a cut last line is dropped and said, damage elsewhere is
named."""

import resource

import pytest

from convert.core import json_lines as lines
from convert.core.errors import UserError

ROWS = [{"step": i, "text": "é\n" * i} for i in range(3)]


@pytest.fixture
def file(tmp_path):
    lines.append(tmp_path / "rows.jsonl", ROWS)
    return tmp_path / "rows.jsonl"


def test_rows_come_back(file):
    assert lines.read(file) == ROWS and file.read_bytes().count(b"\n") == 3
    assert lines.read(file.with_name("none.jsonl")) == []


def test_wherever_a_power_cut_ends_the_file_its_whole_rows_stay(file, capsys):
    """At every byte: the rows before it are read, and after the repair the next row is one of its own."""
    whole = file.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        for rest in (b"", b"\0" * 40, b"\0" * 40 + b"\n"):
            file.write_bytes(whole[:size] + rest)
            kept = sum(end < size for end in ends) + (not rest and size in ends)
            assert lines.read(file) == ROWS[:kept], (size, rest)
            lines.mend(file)
            lines.append(file, [{"new": 1}])
            assert lines.read(file) == [*ROWS[:kept], {"new": 1}], (size, rest)
    assert "was cut short, as by a power cut; it is dropped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", [b'{"step": 1, "te', b"\0" * 30, b"[1]", b"7", b"\xff\xfe", b'{"a": ' * 100_000, b"9" * 6000]
)
def test_damage_before_the_end_is_named_by_file_and_line(file, damage):
    whole = file.read_bytes().split(b"\n")
    whole[1] = damage
    file.write_bytes(b"\n".join(whole))
    for call in (lines.read, lines.mend, lambda file: lines.keep(file, bool)):
        with pytest.raises(
            UserError, match=rf"^Line 2 of {file} .*\. Put back a copy of the file, or take that line out\.$"
        ):
            call(file)
    assert file.read_bytes() == b"\n".join(whole)


def test_kept_rows_stay_as_they_were_written(file):
    before = file.read_bytes().splitlines(keepends=True)
    lines.keep(file, lambda row: row["step"] != 1)
    assert file.read_bytes() == before[0] + before[2]


def test_a_full_disk_takes_all_rows_or_none(file):
    before, limit = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limit[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            lines.append(file, ROWS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.read_bytes() == before
