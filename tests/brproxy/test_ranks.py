"""DP ranks behind one URL: every text is a list of ranks, or an error in one line."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brproxy.ranks import RANK_MAX, RANKS_MAX, rank_line, read_ranks
from brproxy.types import InvalidInputError


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("0", (0,)),
        ("0-7", tuple(range(8))),
        ("0,2,4-6", (0, 2, 4, 5, 6)),
        ("4-6, 2,0", (0, 2, 4, 5, 6)),
        ("65535", (65535,)),
        (f"0-{RANKS_MAX - 1}", tuple(range(RANKS_MAX))),
    ],
)
def test_lists(text, ranks):
    assert read_ranks(text) == ranks


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must be numbers and ranges like"),
        ("0-", "'0-' is none"),
        ("a", "'a' is none"),
        ("-1", "'-1' is none"),
        ("٣", "is none"),
        ("1\n", "is none"),
        ("0,,1", "'' is none"),
        ("7-0", "ranges that rise, to 65535 at most: '7-0'"),
        ("65536", "'65536' is none"),
        ("0-3,2", "must name each rank once: '2' names one again"),
        ("2,0-3", "'0-3' names one again"),
        (f"0-{RANKS_MAX}", f"must be {RANKS_MAX} ranks at most"),
        ("0-65535", f"must be {RANKS_MAX} ranks at most"),
    ],
)
def test_mistakes(text, told):
    with pytest.raises(InvalidInputError) as caught:
        read_ranks(text)
    assert told in str(caught.value)


@given(st.one_of(st.text(max_size=30), st.text("0123456789-, ", max_size=30)))
@example("0-1023,1024")
def test_every_text_is_a_bounded_list_or_one_line(text):
    told = ""
    try:
        ranks = read_ranks(text)
    except InvalidInputError as error:
        told = str(error)
    assert "\n" not in told
    if told:
        return
    assert ranks == tuple(sorted(set(ranks)))
    assert 1 <= len(ranks) <= RANKS_MAX
    assert 0 <= ranks[0] <= ranks[-1] <= RANK_MAX


@given(st.sets(st.integers(0, RANK_MAX), min_size=1, max_size=50))
def test_a_list_of_numbers_is_those_numbers(ranks):
    assert set(read_ranks(",".join(map(str, ranks)))) == ranks


def test_the_line():
    assert rank_line(12) == b"X-data-parallel-rank: 12\r\n"
