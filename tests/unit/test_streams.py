"""Where readers seem to be."""

from __future__ import annotations

from lazyfs.prefetch.streams import FOLLOWED, REACH, SILENCE, Streams


def test_a_reader_that_goes_on_is_one_stream() -> None:
    streams = Streams()
    assert streams.read(2, 0) == range(0)
    assert streams.read(2, 0) is None, "it was there already"
    assert streams.read(2, 1) == range(1, 1)
    assert streams.read(2, 5) == range(2, 5)
    assert list(streams) == [(2, 5)]


def test_a_read_before_all_streams_or_of_another_file_begins_one() -> None:
    streams = Streams()
    streams.read(2, 10)
    assert streams.read(2, 5) == range(0)
    assert streams.read(3, 11) == range(0)
    assert list(streams) == [(3, 11), (2, 5), (2, 10)], "the most recent one first"
    assert streams.read(2, 12) == range(11, 12), "of the stream that is nearest"
    assert list(streams) == [(2, 12), (3, 11), (2, 5)]
    assert len(streams) == 3


def test_a_read_at_the_same_piece_makes_a_stream_the_most_recent() -> None:
    streams = Streams()
    streams.read(2, 0)
    streams.read(3, 0)
    assert streams.read(2, 0) is None
    assert list(streams) == [(2, 0), (3, 0)]


def test_a_reader_does_not_jump_far() -> None:
    streams = Streams()
    streams.read(2, 0)
    assert streams.read(2, REACH) == range(1, REACH)
    assert streams.read(2, 2 * REACH + 1) == range(0)
    assert list(streams) == [(2, 2 * REACH + 1), (2, REACH)]


def test_a_stream_ends_when_others_go_on_without_it() -> None:
    streams = Streams()
    streams.read(2, 0)
    moves = SILENCE * 2
    for piece in range(moves):
        streams.read(3, piece)
    assert len(streams) == 2
    streams.read(3, moves)
    assert list(streams) == [(3, moves)]


def test_a_stream_that_is_read_without_moving_goes_on() -> None:
    streams = Streams()
    for piece in range(10 * SILENCE):
        streams.read(2, 0)
        streams.read(3, piece)
    assert len(streams) == 2


def test_there_are_only_so_many_streams() -> None:
    streams = Streams()
    for inode in range(FOLLOWED):
        streams.read(inode, 0)
    assert len(streams) == FOLLOWED
    streams.read(FOLLOWED, 0)
    assert sorted(inode for inode, _ in streams) == list(range(1, FOLLOWED + 1))


def test_streams_of_one_file_are_forgotten() -> None:
    streams = Streams()
    for inode, piece in ((2, 0), (3, 0), (2, 900)):
        streams.read(inode, piece)
    streams.forget(2)
    assert list(streams) == [(3, 0)]
