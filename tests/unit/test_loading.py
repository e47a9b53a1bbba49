"""Whether a load is under way."""

from lazyfs.fetch.loading import BEHIND_S, Loading


def test_a_load_needs_a_reader() -> None:
    load = Loading()
    assert not load.is_under_way(101.0, open_files=0, in_flight=3)
    load.opened(direct=False)
    assert load.is_under_way(101.0, open_files=1, in_flight=3)
    assert not load.is_under_way(101.0, open_files=0, in_flight=3)


def test_a_reader_has_some_time_for_what_came_last() -> None:
    load = Loading()
    load.opened(direct=False)
    load.landed(120.0)
    assert load.is_under_way(120.0 + BEHIND_S / 2, open_files=1, in_flight=0)
    assert not load.is_under_way(120.0 + BEHIND_S, open_files=1, in_flight=0)


def test_direct_readers_leave_nothing_in_the_page_cache() -> None:
    load = Loading()
    load.opened(direct=False)
    load.opened(direct=True)
    assert not load.is_under_way(101.0, open_files=2, in_flight=3)
