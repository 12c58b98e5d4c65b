"""Records cut from the standard library: real pieces of it, whole files on a side, the same for the same seed."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.data.folder import read_folder, write_folder
from geoquant.data.stdlib import cut, library_files, stdlib_records
from geoquant.data.text import builtin_text
from geoquant.errors import UserError

ROOT = Path(sysconfig.get_path("stdlib"))
SIDES = ("members", "nonmembers", "holdout")


@pytest.fixture(scope="module")
def made():
    return stdlib_records(600, 3, canaries=8)


def test_every_piece_stands_in_a_file_of_its_side_alone(made):
    files = made.notes["files"]
    assert sum(count for side in SIDES for _, count in files[side]) == 600
    names = [name for side in SIDES for name, _ in files[side]]
    assert len(set(names)) == len(names)
    for side in SIDES:
        records = iter(getattr(made, side))
        for name, count in files[side]:
            source = (ROOT / name).read_text(encoding="utf-8")
            for _ in range(count):
                text = next(records).text
                first, last = text.split("\n")[0], text.split("\n")[-1]
                assert first in source
                assert last in source
                assert 200 <= len(text) <= 800
        assert next(records, None) is None


def test_no_text_is_on_two_sides_nor_in_the_calibration_text(made):
    texts = [record.text for side in SIDES for record in getattr(made, side)]
    assert len(set(texts)) == 600
    public = builtin_text()
    assert not any(text in public for text in texts)
    assert not any("test" in name.split("/")[:-1] for name, _ in library_files(ROOT))


def test_the_seed_decides(made, tmp_path):
    few = ROOT / "asyncio"
    assert stdlib_records(150, 3, root=few) == stdlib_records(150, 3, root=few)
    assert stdlib_records(150, 4, root=few).members != stdlib_records(150, 3, root=few).members
    assert len(made.canaries) == 8
    write_folder(made, tmp_path / "out")
    assert read_folder(tmp_path / "out").members == made.members


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot cut 99 records from .*; wanted 100 to \d+"):
        stdlib_records(99, root=ROOT / "asyncio")
    with pytest.raises(UserError, match="cannot cut 10000000 records"):
        stdlib_records(10**7, root=ROOT / "asyncio")
    with pytest.raises(UserError, match="cannot cut pieces of 10 characters"):
        stdlib_records(100, characters=10)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n" * 100)  # not UTF-8: nothing is taken from it
    with pytest.raises(UserError, match="wanted 100 to 0"):
        stdlib_records(100, root=tmp_path)


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab \n", max_size=300), max_size=12), st.integers(200, 400))
def test_pieces_are_in_order_and_of_the_length_asked_for(paragraphs, characters):
    source = "\n\n".join(paragraphs)
    pieces = list(cut(source, characters))
    assert all(piece.strip() and len(piece) <= characters for piece in pieces)
    place, bare = 0, "".join(source.split())
    for piece in pieces:
        place = bare.index("".join(piece.split()), place) + len("".join(piece.split()))
