"""The one line a user sees."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.errors import UserError, missing_package, unknown_name


def test_parts_come_in_order_and_missing_ones_leave_no_trace():
    whole = UserError("bits out of range", got=9, wanted="2 to 8", fix="lower --bits")
    assert str(whole) == "bits out of range; got 9; wanted 2 to 8; lower --bits"
    assert str(UserError("no text")) == "no text"


def test_falsy_values_are_still_shown():
    assert str(UserError("keep", got=0)) == "keep; got 0"
    assert str(UserError("name", got="''")) == "name; got ''"


@settings(deadline=None, max_examples=50)
@given(*[st.text(max_size=30)] * 3)
def test_it_is_one_line_whatever_other_libraries_put_in(what, got, fix):
    assert len(str(UserError(what, got=got, fix=fix)).splitlines()) <= 1


def test_a_near_miss_is_guessed():
    line = str(unknown_name("method", "babay", ["rtn", "babai", "dqc"]))
    assert line == "unknown method 'babay'; wanted one of babai, dqc, rtn; did you mean 'babai'?"


def test_a_far_miss_lists_the_choices_once():
    line = str(unknown_name("method", "xyzzy", {"rtn": 1, "babai": 2}))
    assert line == "unknown method 'xyzzy'; choose one of: babai, rtn"


def test_a_missing_package_names_the_extra():
    line = str(missing_package("peft", "peft", "verifying kept columns"))
    assert line == "verifying kept columns needs the package 'peft'; run: pip install 'geoquant[peft]'"


def test_it_is_an_exception_of_its_own():
    # `except ValueError` in a library must not swallow it.
    assert not issubclass(UserError, ValueError | OSError)
    with pytest.raises(UserError):
        raise UserError("x")
