"""The processes of a run: rank, card, share of the work, and collectives."""

import os

import pytest
import torch.distributed as dist

from lowmem_drf.distributed.ranks import Ranks, join, launched, rank_device
from lowmem_drf.errors import BadInputError

ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
ENVIRONMENT |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_one_process_needs_nobody():
    ranks = Ranks()
    assert ranks.chief
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    assert (ranks.gather("a"), ranks.any(True), ranks.any(False), ranks.from_chief("b")) == (["a"], True, False, "b")
    ranks.barrier()
    ranks.leave()
    assert not dist.is_initialized()


def test_shares_are_contiguous_equal_and_without_overlap():
    for count in (1, 2, 4):
        shares = [Ranks(rank, count).share(list("abcdefgh")) for rank in range(count)]
        assert "".join(letter for share in shares for letter in share) == "abcdefgh"
        assert len({len(share) for share in shares}) == 1
    with pytest.raises(ValueError, match="3 items cannot be split evenly over 2"):
        Ranks(0, 2).share("abc")


@pytest.mark.parametrize(
    ("wish", "cards", "local_count", "device"),
    [
        ("auto", 0, 2, "cpu"),
        ("cpu", 0, 2, "cpu"),
        ("cpu", 1, 2, "cpu"),
        ("auto", 2, 2, "cuda"),
        ("cuda", 8, 2, "cuda"),
        ("cuda", 1, 1, "cuda"),
    ],
)
def test_the_device_of_a_rank(wish, cards, local_count, device):
    assert rank_device(wish, Ranks(0, 4, 0, local_count), cards) == device


@pytest.mark.parametrize(
    ("wish", "cards", "place", "said"),
    [
        ("auto", 1, Ranks(1, 2, 1, 2),
         "rank 1 has no card of its own: 2 processes on this machine, 1 CUDA card visible. "
         "Start as many .*--num-processes 1"),
        ("cuda", 2, Ranks(7, 8, 3, 4),
         "rank 7 has no card of its own: 4 processes on this machine, 2 CUDA cards visible"
         ".*CUDA_VISIBLE_DEVICES.*-s device=cpu"),
        ("auto", 1, Ranks(0, 2, 0, 2), "rank 0 has a card, but not every process has one: 2 processes on this machine"),
        ("cuda", 0, Ranks(0, 1, 0, 1),
         "rank 0 has no card of its own: 1 process on this machine, no CUDA cards visible. Show its cards"),
    ],
)  # fmt: skip
def test_a_rank_without_its_card_is_refused_by_all_of_its_machine(wish, cards, place, said):
    with pytest.raises(BadInputError, match=said):
        rank_device(wish, place, cards)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR not. Launch with torchrun, deepspeed or --num-processes"),
        ({"LOCAL_WORLD_SIZE": None}, "LOCAL_WORLD_SIZE not"),
        ({"RANK": "one"}, "must be whole numbers"),
        ({"RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 of LOCAL_WORLD_SIZE=1"),
        ({"LOCAL_WORLD_SIZE": None, "LOCAL_SIZE": "3"}, "LOCAL_RANK=1 of LOCAL_SIZE=3"),
    ],
)
def test_an_environment_of_no_launcher_is_refused(monkeypatch, change, said):
    for name, value in (ENVIRONMENT | change).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert launched()
    with pytest.raises(BadInputError, match=said):
        join("cpu")
    assert not dist.is_initialized()


def exchanged(ranks):
    flags = [ranks.any(ranks.rank == 1), ranks.any(False)]
    ranks.barrier()
    share, chief = ranks.share(range(6)), ranks.from_chief({"of": ranks.rank})
    return ranks.chief, ranks.gather(f"g{ranks.rank}"), flags, list(share), chief, os.environ["DS_ACCELERATOR"]


def test_what_processes_exchange(pair):
    for rank, got in enumerate(pair(exchanged)):
        assert got == (rank == 0, ["g0", "g1"], [True, False], [3 * rank, 3 * rank + 1, 3 * rank + 2], {"of": 0}, "cpu")


def one_after_the_other(ranks, file):
    with ranks.one_first():
        there = file.exists()
        file.touch()
    return there


def test_one_process_of_a_machine_goes_first(pair, tmp_path):
    assert pair(one_after_the_other, tmp_path / "made") == [False, True]


def test_parts_differ_by_one_at_most_and_leave_nothing_out():
    for count in (1, 2, 3, 5):
        for items in range(8):
            parts = Ranks(0, count).parts(items)
            assert [place for part in parts for place in part] == list(range(items))
            assert len(parts) == count and max(map(len, parts)) - min(map(len, parts)) <= 1
            assert list(map(len, parts)) == sorted(map(len, parts), reverse=True)
