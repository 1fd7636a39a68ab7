import pytest
from hotpath_pack.hotpath.selection import check_selection, select_blocks
from hypothesis import given
from hypothesis import strategies as st


def test_all_and_none():
    assert select_blocks("double_blocks", "all", 3) == {0, 1, 2}
    assert select_blocks("double_blocks", " None ", 3) == frozenset()
    assert select_blocks("double_blocks", "all", 0) == frozenset()


def test_ranges_are_inclusive():
    assert select_blocks("single_blocks", "0-2, 5,7 - 8", 9) == {0, 1, 2, 5, 7, 8}


@given(st.sets(st.integers(0, 40), min_size=1))
def test_any_set_of_blocks_can_be_written(blocks):
    assert select_blocks("double_blocks", ",".join(map(str, blocks)), 41) == blocks


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60))
def test_a_range_selects_its_blocks_or_says_why_not(count, first, last):
    text = f"{first}-{last}"
    if last < first:
        with pytest.raises(ValueError, match=f"runs backwards. Write '{last}-{first}'"):
            check_selection("double_blocks", text)
    elif last >= count:
        with pytest.raises(ValueError, match=rf"double_blocks: block {last} is outside .* {count} \(0-{count - 1}\)"):
            select_blocks("double_blocks", text, count)
    else:
        assert select_blocks("double_blocks", text, count) == set(range(first, last + 1))


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "1,,2", "0-9;12", "1.5", "all,1", "\u0663", "1-2-3"])
def test_malformed_text_is_named(text):
    with pytest.raises(ValueError, match="single_blocks: cannot read .* Use 'all', 'none' or ranges"):
        check_selection("single_blocks", text)


@given(st.text(max_size=12))
def test_any_text_is_accepted_or_refused_by_name(text):
    try:
        check_selection("double_blocks", text)
    except ValueError as error:
        assert str(error).startswith("double_blocks: ")


def test_a_model_without_blocks_of_a_kind():
    with pytest.raises(ValueError, match="block 0 is outside this model, which has none"):
        select_blocks("double_blocks", "0", 0)


def test_a_huge_range_is_refused_at_once():
    with pytest.raises(ValueError, match="block 999999999999 is outside"):
        select_blocks("double_blocks", "0-999999999999", 19)
