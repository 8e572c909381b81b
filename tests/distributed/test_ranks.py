"""The processes of a run: what they exchange, and that one which fails or dies ends all of them, soon, with one
message."""

import json
import os
import signal
import socket
import sys
import threading

import pytest
import torch.distributed as dist
from _ranks import (
    ADVICE,
    Group,
    a_collective_fails_of_itself,
    all_fail,
    exchange,
    first_fails,
    first_fails_within,
    first_is_killed,
    interrupted_while_first_saves,
    one_after_the_other,
    second_fails,
    second_fails_within,
    second_is_interrupted,
    second_is_killed,
    second_is_killed_and_first_does_not_wait_for_it,
    stops_at_the_second_signal,
    waits,
)

from lowmem_drf.distributed import links
from lowmem_drf.distributed.links import Pcie
from lowmem_drf.distributed.ranks import Ranks, join, launched, rank_device
from lowmem_drf.distributed.watch import Watch, watch
from lowmem_drf.errors import BadInputError, LowmemError

ENDS_S = 30.0
"""The issue's word for a process that was killed."""
ENVIRONMENT = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
DIED = "Error: rank {} died without a word (killed, or out of host memory: see dmesg). The run was stopped."


def test_one_process_needs_nobody():
    ranks = Ranks()
    assert ranks.chief
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    assert (ranks.gather("a"), ranks.any(True), ranks.any(False), ranks.from_chief("b"), ranks.barrier()) == (
        ["a"],
        True,
        False,
        "b",
        None,
    )
    ranks.leave()
    assert not dist.is_initialized()
    before, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    with pytest.raises(KeyError, match="odd"), watch(ranks, lambda: ADVICE) as guard:
        assert (signal.getsignal(signal.SIGTERM), threading.active_count()) == (before, threads)
        guard.fail_now(KeyError("odd"))


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
        (
            "auto",
            1,
            Ranks(1, 2, 1, 2),
            "rank 1 has no card of its own: 2 processes on this machine, 1 CUDA card visible. Start as many .*--num-processes 1",
        ),
        (
            "cuda",
            2,
            Ranks(7, 8, 3, 4),
            "rank 7 has no card of its own: 4 processes on this machine, 2 CUDA cards visible.*CUDA_VISIBLE_DEVICES.*-s device=cpu",
        ),
        ("auto", 1, Ranks(0, 2, 0, 2), "rank 0 has a card, but not every process has one: 2 processes on this machine"),
        (
            "cuda",
            0,
            Ranks(0, 1, 0, 1),
            "rank 0 has no card of its own: 1 process on this machine, no CUDA cards visible. Show its cards",
        ),
    ],
)
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


def test_what_processes_exchange(tmp_path):
    ended = Group(tmp_path, exchange, count=3).ended()
    assert (ended.codes, ended.said()) == ([0, 0, 0], [])
    for rank, text in enumerate(ended.out):
        assert json.loads(text) == [
            rank == 0,
            ["g0", "g1", "g2"],
            [True, False],
            [2 * rank, 2 * rank + 1],
            {"of": 0},
            "cpu",
        ]


def test_who_is_done_goes_and_nobody_is_alarmed(tmp_path):
    ended = Group(tmp_path, one_after_the_other, count=3).ended()
    assert (ended.codes, ended.said(), ended.out) == ([0, 0, 0], [], ["done\n"] * 3)


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (second_fails, 1, ["Error: rank 1: the reward is nan", ADVICE]),
        (first_fails, 2, ["Error: the prompts have changed"]),
        (all_fail, 2, ["Error: the prompts have changed"]),
        (
            second_fails_within,
            1,
            ["Error: rank 1: unexpected KeyError: 'lost'", "Run the same command with --debug to see where.", ADVICE],
        ),
        (
            first_fails_within,
            1,
            [
                "Error: out of memory: 2 GiB",
                "Try: -s micro_batch=1, fewer video.frames, or a smaller video.width.",
                ADVICE,
            ],
        ),
        (
            a_collective_fails_of_itself,
            1,
            [
                "Error: rank 1: unexpected RuntimeError: Gloo: odd",
                "Run the same command with --debug to see where.",
                ADVICE,
            ],
        ),
        (interrupted_while_first_saves, 130, ["Interrupted after update 3; it is saved."]),
        (second_is_interrupted, 130, ["Interrupted."]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_failure_ends_all_with_one_message_of_rank_0(tmp_path, work, code, said):
    ended = Group(tmp_path, work, count=3).ended()
    assert (ended.codes, ended.err[0].splitlines(), ended.err[1:]) == ([code] * 3, said, ["", ""])
    if work is second_fails:
        assert ended.out[0] == "kept in a buffer\n"
    if work is interrupted_while_first_saves:
        assert ended.out[0] == "saved\n"


@pytest.mark.parametrize(
    ("work", "killed", "speaks"),
    [(second_is_killed, 1, 0), (second_is_killed_and_first_does_not_wait_for_it, 1, 0), (first_is_killed, 0, 1)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_death_without_a_word_ends_all_within_seconds(tmp_path, work, killed, speaks):
    ended = Group(tmp_path, work, count=3).ended()
    assert ended.codes == [-signal.SIGKILL if rank == killed else 1 for rank in range(3)]
    assert ended.said() == [DIED.format(killed), ADVICE]
    assert ended.err[speaks]
    assert max(ended.at) - ended.at[killed] < ENDS_S


def test_debug_shows_where_another_rank_failed(tmp_path):
    ended = Group(tmp_path, second_fails, argv=("--debug",)).ended()
    first, *_, last, _ = ended.err[0].splitlines()
    assert (first, last) == ("Traceback (most recent call last):", "Error: rank 1: the reward is nan")
    assert "in second_fails" in ended.err[0]


def test_a_second_signal_is_nobodys_death(tmp_path):
    group = Group(tmp_path, stops_at_the_second_signal)
    for rank in (0, 1):
        group.until(rank, "ready")
    group.send(signal.SIGINT)
    group.until(1, "asked")
    group.send(signal.SIGINT)
    ended = group.ended()
    assert (ended.codes, ended.said()) == ([130, 130], [f"Interrupted. {ADVICE}"])


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
def test_sigterm_ends_all_in_order(tmp_path, ranks):
    group = Group(tmp_path, waits)
    for rank in (0, 1):
        group.until(rank, "ready")
    group.send(signal.SIGTERM, *ranks)
    ended = group.ended()
    assert (ended.codes, ended.said()) == ([130, 130], ["Interrupted."])


@pytest.mark.parametrize(
    ("terminal", "shown"), [(True, "\x1b[?25h\nError: odd \\udce4\n"), (False, "Error: odd \\udce4\n")]
)
def test_on_a_terminal_the_message_stands_below_the_progress_and_the_cursor_is_back(
    monkeypatch, capfd, terminal, shown
):
    monkeypatch.setattr(os, "isatty", lambda number: terminal)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        Watch(Ranks(), lambda: ADVICE)._exit(1, "Error: odd \udce4\n")  # of a path that is not UTF-8
    assert (ended.value.code, capfd.readouterr().err) == (1, shown)


def test_strangers_are_not_let_in(monkeypatch):
    monkeypatch.setattr(links, "CONNECT_S", 1.0)
    monkeypatch.setattr(links, "GREET_S", 0.2)
    ranks = Ranks(0, 2, 0, 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        strangers = []
        for greeting in (b"GET / HTTP/1.1\n", b'{"token": "guess", "rank": 1}\n', b"[]\n", b""):
            strangers.append(socket.create_connection(server.getsockname()))
            strangers[-1].sendall(greeting)
        with pytest.raises(LowmemError, match="rank 1 did not reach rank 0 within 1 s"):
            links._accept(server, ranks, "token")
        port = server.getsockname()[1]
        accepting = threading.Thread(target=lambda: found.update(links._accept(server, ranks, "token")))
        found: dict[int, Pcie] = {}
        accepting.start()
        mine = links._reach(["127.0.0.1"], port, "token", Ranks(1, 2, 1, 2))
        accepting.join()
        assert list(found) == [1]
        found[1].send(say="bye")
        assert mine.receive() == {"say": "bye"}
        for link in (mine, found[1]):
            link.close()
    with pytest.raises(LowmemError, match=f"rank 1 cannot reach rank 0 .127.0.0.1, port {port}."):
        links._reach(["127.0.0.1"], port, "token", Ranks(1, 2, 1, 2))


def test_rank_0_is_reached_at_its_own_address_where_there_are_several_machines(monkeypatch):
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    monkeypatch.setitem(os.environ, "MASTER_PORT", "29500")
    assert links._addresses(Ranks(0, 2, 0, 2)) == ["127.0.0.1"]
    assert links._addresses(Ranks(0, 4, 0, 2)) == list(dict.fromkeys(["127.0.0.1", socket.gethostname()]))
    with links._server(Ranks(0, 4, 0, 2)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()


def test_parts_differ_by_one_at_most_and_leave_nothing_out():
    for count in (1, 2, 3, 5):
        for items in range(8):
            parts = Ranks(0, count).parts(items)
            assert [place for part in parts for place in part] == list(range(items))
            assert len(parts) == count and max(map(len, parts)) - min(map(len, parts)) <= 1
            assert list(map(len, parts)) == sorted(map(len, parts), reverse=True)
