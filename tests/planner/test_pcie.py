"""Copies beside the computation: what the plan's clock makes of them."""

import math

import pytest
import torch

from lowmem_drf.planner.costs import Pcie, Rates
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.stand_ins import planned_store

CPU = torch.device("cpu")
MIB = 1024**2


def test_copies_queue_up_each_way_by_itself():
    link = Pcie(10.0, in_flight=100)
    assert link.fetch(now=1.0, nbytes=20, written=0.0) == 3.0
    assert link.fetch(now=1.5, nbytes=10, written=0.0) == 4.0  # behind the first
    assert link.fetch(now=9.0, nbytes=10, written=12.0) == 13.0  # not before it is there
    assert link.send(now=1.0, nbytes=20) == (3.0, 1.0)  # the other way is free
    assert (link.up_bytes, link.down_bytes, link.busy_s) == (40, 20, 6.0)
    assert link.quiet(now=0.0) == 13.0


def test_a_full_way_to_the_host_is_waited_for():
    link = Pcie(10.0, in_flight=100)
    # the newest alone may be more than allowed
    assert [link.send(now=0.0, nbytes=60)[1] for _ in range(3)] == [0.0, 6.0, 12.0]
    assert link.sent(now=0.0) == 18.0


def product(seconds):
    """Computes for so long at 10^9 operations a second."""
    n = round((seconds * 1e9 / 2) ** (1 / 3))
    torch.ones(n, n) @ torch.ones(n, n)


def test_what_was_started_in_time_is_not_waited_for():
    rates = Rates({torch.float32: 1e9}, 1e9, math.inf, link=MIB)
    for compute, stall in ((2.0, 0.0), (0.25, 0.75)):
        with Ledger(rates=rates) as ledger:
            held = planned_store().put(torch.ones(MIB // 4))
            ledger.wait(ledger.link.quiet(ledger.seconds))
            before = ledger.spent
            held.prefetch()
            product(compute)
            held.get()
            spent = ledger.spent - before
        assert spent.stalled == pytest.approx(stall, abs=0.01) and spent.copying == 1.0 and spent.to_card == MIB
        assert spent.seconds == pytest.approx(max(1.0, compute), rel=0.01)


def test_a_copy_on_the_link_takes_no_time_of_the_card():
    with Ledger(rates=Rates({torch.float32: 1e9}, 1e9, 1e6)) as ledger:
        held = planned_store().put(torch.ones(MIB))
        made = ledger.seconds
        held.get()
        assert ledger.seconds == made
