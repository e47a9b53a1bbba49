"""What a loader is expected to skip, and how much is fetched on a guess."""

from __future__ import annotations

import pytest

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.prefetch.skip_learner import EXPECTED_BLOCKS, LEAST_BLOCKS, SkipLearner
from lazyfs.prefetch.skip_rules import MOST_ERRORS, SkipRules, role_of

BLOCK = 10
LAYERS = 400


def test_the_role_of_a_tensor_is_its_name_without_its_layer() -> None:
    assert role_of("model.layers.17.experts.3.up") == "model.layers.#.experts.3.up"
    assert role_of("lm_head") == "lm_head"


class TestRules:
    def test_a_skip_is_expected_after_so_many_in_a_row(self) -> None:
        rules = SkipRules(2)
        assert not rules.expects_skip("a")
        assert not rules.passed("a")
        assert not rules.expects_skip("a")
        assert rules.passed("a"), "from now on"
        assert rules.expects_skip("a")
        assert not rules.passed("a"), "it was expected before"
        assert not rules.expects_skip("b")

    def test_a_read_begins_the_count_anew(self) -> None:
        rules = SkipRules(2)
        rules.passed("a")
        assert not rules.read("a"), "no skip was expected"
        assert not rules.passed("a")
        assert rules.passed("a")
        assert rules.read("a"), "a skip was expected"
        assert not rules.expects_skip("a")

    def test_a_role_that_surprised_too_often_is_not_predicted_any_more(self) -> None:
        rules = SkipRules(1)
        for _ in range(MOST_ERRORS):
            assert rules.passed("a")
            assert rules.read("a")
        assert not rules.passed("a")
        assert not rules.expects_skip("a")
        assert rules.passed("b")

    def test_a_read_is_expected_after_a_read(self) -> None:
        rules = SkipRules(1)
        assert not rules.expects_read("a")
        rules.read("a")
        assert rules.expects_read("a")
        rules.passed("a")
        assert not rules.expects_read("a")


class Learner:
    """A learner, and a file of layers with a tensor `a` and one `b`, each of one block."""

    def __init__(self, times: int = 1) -> None:
        self.map = BlockMap(BLOCK)
        self.map.add_file(2, 2 * LAYERS * BLOCK)
        blocks = self.map.files[2]
        roles = [f"layers.#.{'ab'[at % 2]}" for at in range(2 * LAYERS)]
        blocks.set_pieces([at * BLOCK for at in range(2 * LAYERS)], roles)
        self.learner = SkipLearner(self.map.files, self.map.moved, times)
        self.learner.add_tensors(2)

    def read(self, piece: int, *passed: int) -> None:
        self.learner.read(2, piece, passed, lambda number: False)

    def place(self, number: int) -> Place:
        return self.map.place(BlockId(2, number))

    def speculated(self, numbers: range) -> int:
        """How many of these blocks are fetched on a guess, one after the other."""
        count = 0
        for number in numbers:
            if self.learner.may_speculate(BlockId(2, number)):
                self.learner.add_speculative(BlockId(2, number))
                count += 1
        return count


class TestLearner:
    def test_what_is_skipped_is_passed_over_in_all_layers_until_it_is_read(self) -> None:
        made = Learner()
        made.map.moved(BlockId(2, 5), Place.LOCAL)
        made.read(0)
        made.read(2, 1)
        assert [made.place(number) for number in range(2, 8)] == [
            Place.ABSENT, Place.PASSED, Place.ABSENT, Place.LOCAL, Place.ABSENT, Place.PASSED,
        ]  # fmt: skip
        made.read(3)
        assert {made.place(number) for number in (1, 3, 7, 9)} == {Place.ABSENT}

    def test_a_block_that_is_shared_with_a_tensor_that_is_read_is_not_passed_over(self) -> None:
        made = Learner()
        made.map.add_file(3, 4 * BLOCK)
        made.map.files[3].set_pieces([0, 5, 25, 35], ["0", "layers.#.b", "0", "layers.#.b"])
        made.learner.add_tensors(3)
        made.read(2, 1)
        places = [made.map.place(BlockId(3, number)) for number in range(4)]
        assert places == [Place.ABSENT, Place.PASSED, Place.ABSENT, Place.ABSENT]

    def test_files_whose_tensors_become_known_later_are_passed_over_too(self) -> None:
        made = Learner()
        made.read(2, 1)
        made.map.add_file(3, 2 * BLOCK)
        made.map.files[3].set_pieces([0, BLOCK], ["layers.#.a", "layers.#.b"])
        made.learner.add_tensors(3)
        places = [made.map.place(BlockId(3, number)) for number in range(2)]
        assert places == [Place.ABSENT, Place.PASSED]

    def test_what_may_have_been_read_in_the_page_cache_was_not_skipped(self) -> None:
        made = Learner()
        made.learner.read(2, 2, [1], lambda number: True)
        assert made.place(3) == Place.ABSENT
        made.read(4, 3)
        assert made.place(5) == Place.PASSED

    def test_what_was_fetched_and_skipped_is_counted_until_it_is_read(self) -> None:
        made = Learner()
        made.map.moved(BlockId(2, 1), Place.LOCAL)
        made.read(2, 1)
        made.read(4, 3)
        assert made.learner.passed_by_blocks == 1, "3 was never fetched"
        made.read(1)
        assert made.learner.passed_by_blocks == 0

    @pytest.mark.parametrize(("read", "budget"), [(0, LEAST_BLOCKS), (LAYERS // 2, 200 // 16 + 1)])
    def test_guesses_are_limited_by_what_was_read(self, read: int, budget: int) -> None:
        made = Learner(times=LAYERS)
        for layer in range(read):
            made.read(2 * layer)
            made.read(2 * layer)  # a second read of it is no more
        assert made.speculated(range(2 * read + 1, 2 * LAYERS, 2)) == budget

    def test_a_guess_that_was_read_makes_room_for_another(self) -> None:
        made = Learner(times=LAYERS)
        made.speculated(range(2 * LAYERS))
        made.read(3)
        assert made.speculated(range(20, 40, 2)) == 1

    def test_more_is_fetched_of_what_was_read_in_the_last_layer(self) -> None:
        made = Learner(times=LAYERS)
        made.read(0)
        assert made.speculated(range(2, 2 * LAYERS, 2)) == EXPECTED_BLOCKS
        assert made.speculated(range(3, 2 * LAYERS, 2)) == 0

    def test_wrong_guesses_end_guessing(self) -> None:
        made = Learner(times=LAYERS)
        made.speculated(range(1, 2 * LEAST_BLOCKS, 2))
        made.read(2 * LEAST_BLOCKS, *range(1, 2 * LEAST_BLOCKS, 2))
        assert made.speculated(range(101, 2 * LAYERS, 2)) == 0
        made.read(1)
        assert made.speculated(range(100, 2 * LAYERS, 2)) > 0, "one of them was right after all"

    def test_wrong_guesses_that_are_predicted_from_now_on_do_not_count(self) -> None:
        made = Learner(times=LEAST_BLOCKS)
        made.speculated(range(1, 2 * LEAST_BLOCKS, 2))
        made.read(2 * LEAST_BLOCKS, *range(1, 2 * LEAST_BLOCKS, 2))
        assert made.speculated(range(101, 2 * LAYERS, 2)) == LEAST_BLOCKS
