"""Which tile a launch takes: the first one of the card, or the one that was chosen for its sizes."""

import json

import pytest
import torch

from lowmem_drf.kernels import tiles
from lowmem_drf.kernels.tiles import CARDS, Tile, Tuned, choices, take_choices, tile_words, timing

SLOW, FAST, OTHER = (Tile({"BLOCK": size}, 4, 1, cards, "") for size, cards in ((64, CARDS), (32, CARDS), (16, (80,))))


class Kernel:
    """As a ``triton.jit`` function, but it only remembers which tiles it was launched with."""

    arg_names = ("p_x", "p_ranges", "L", "GROUP", "BLOCK")
    __name__ = "a_kernel"

    def __init__(self, broken=()):
        self.launches, self.broken = [], broken

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            if constants["BLOCK"] in self.broken:
                raise RuntimeError("out of resources")
            self.launches.append(constants["BLOCK"])

        return launch


@pytest.fixture
def kernel(monkeypatch):
    """Makes a kernel with the three tiles as on an RTX 4090, and launches it: (L, ...) -> its tile."""
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "this_card", lambda: 89)
    monkeypatch.setattr(tiles, "_choices", {})
    monkeypatch.setattr(tiles, "_tuned", [])

    def make(broken=(), table=(SLOW, FAST, OTHER)):
        fn = Kernel(broken)
        tuned = Tuned(fn, table, ["p_ranges", "L", "GROUP"])

        def launch(length, group=1, ranges=None, dtype=torch.bfloat16):
            tuned[(1,)](torch.empty(1, dtype=dtype), ranges, length, GROUP=group)
            return tuned.launched.kwargs["BLOCK"]

        return fn, launch

    return make


def seconds_of(fn):
    """A timer that finds small blocks fast."""

    def timer(run):
        run()
        return fn.launches[-1] / 1000

    return timer


def test_nothing_is_timed_at_a_launch(kernel):
    fn, launch = kernel()
    assert launch(1000) == 64 and fn.launches == [64]


def test_the_fastest_tile_of_the_card_is_chosen_for_its_sizes(kernel):
    fn, launch = kernel()
    with timing(seconds_of(fn)):
        assert launch(1000) == 32
        timed = len(fn.launches)
        assert launch(1024) == 32 and len(fn.launches) == timed + 1, "of the same power of two"
    assert launch(1000) == 32 and fn.launches.count(16) == 0, "a tile of other cards"
    assert launch(9000) == 32, "the nearest sizes that have a choice"
    assert launch(1000, group=7) == 64 == launch(1000, ranges=torch.empty(1)) == launch(1000, dtype=torch.float16)


def test_a_tile_that_fails_is_infinitely_slow(kernel):
    fn, launch = kernel(broken=(32,))
    with timing(seconds_of(fn)):
        assert launch(1000) == 64
    fn, launch = kernel(broken=(32, 64))
    with timing(seconds_of(fn)), pytest.raises(RuntimeError, match="out of resources"):
        launch(1000)


def test_choices_are_taken_again_from_a_file(kernel):
    fn, launch = kernel()
    with timing(seconds_of(fn)):
        launch(1000), launch(30_000, group=7)
    rows = json.loads(json.dumps(choices()))
    assert rows[0] == {
        "kernel": "a_kernel", "case": "p_ranges=0 GROUP=1 bfloat16", "sizes": [1024],
        "tile": "BLOCK=32 4 warps 1 stages",
    }  # fmt: skip
    take_choices([])
    assert launch(1000) == 64 and not choices()
    take_choices(rows)
    assert launch(1000) == 32 == launch(30_000, group=7) and choices()[1]["sizes"] == [32768]
    take_choices([{**rows[0], "sizes": [1024, 1024]}])
    assert launch(1000) == 64, "sizes of another kernel"
    take_choices([{**rows[0], "tile": "BLOCK=8 4 warps 1 stages"}])
    assert launch(1000) == 64, "a tile that is no more"


def test_one_tile_needs_no_choice(kernel, monkeypatch):
    monkeypatch.setattr(tiles, "this_card", lambda: pytest.fail("asked for the card"))
    fn, launch = kernel(table=(SLOW,))
    with timing(seconds_of(fn)):
        assert launch(1000) == 64 and not choices()


def test_tiles_have_names_of_their_own():
    from test_compile import tables

    for table, every in tables().items():
        words = [tile_words(config) for config in Tuned(Kernel(), every, []).configs]
        assert len(set(words)) == len(words), table
