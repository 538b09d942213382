"""Who waits for company: nobody alone, everybody among many, and nobody while there is time to spare."""

from __future__ import annotations

from itertools import pairwise

import pytest

from service.inference.company import COUNT_EVERY, LONGEST_SPACING_SECONDS, Company

HOLD_SECONDS = 0.004
STEP_SECONDS = 0.01
"""From one request to the next."""
UNTIL_JOINED = 10
"""More requests than there are before the first probe."""


class Machine:
    """A clock, and a process that uses a share of it."""

    def __init__(self, share: float) -> None:
        self.share, self.seconds, self.used = share, 0.0, 0.0

    def passes(self, seconds: float) -> None:
        self.seconds += seconds
        self.used += self.share * seconds

    def company(self) -> Company:
        return Company(HOLD_SECONDS, lambda: self.seconds, lambda: self.used)


@pytest.fixture
def busy() -> Machine:
    return Machine(share=0.9)


def held(machine: Machine, company: Company, requests: int, joined_by: int = 0) -> list[float]:
    """How long each of these requests was held, when so many others come to whoever is."""
    seconds = []
    for _ in range(requests):
        machine.passes(STEP_SECONDS)
        seconds.append(company.hold_seconds())
        company.came(1 + joined_by)
    return seconds


def test_a_lone_caller_is_held_ever_more_rarely(busy: Machine) -> None:
    company = busy.company()
    seconds = held(busy, company, 20_000)
    assert set(seconds) == {0.0, HOLD_SECONDS}
    probes = [index for index, held_for in enumerate(seconds) if held_for]
    assert probes[0] < UNTIL_JOINED
    spacings = [later - earlier for earlier, later in pairwise(probes)]
    assert spacings[0] < spacings[2] < spacings[-1]
    assert spacings[-1] * STEP_SECONDS >= LONGEST_SPACING_SECONDS
    assert len(probes) * HOLD_SECONDS < 0.011 * 20_000 * STEP_SECONDS


def test_once_others_joined_as_many_are_waited_for(busy: Machine) -> None:
    company = busy.company()
    held(busy, company, UNTIL_JOINED, joined_by=15)
    assert company.expected == 16
    assert company.hold_seconds() == HOLD_SECONDS
    assert not company.is_complete(15)
    assert company.is_complete(16)


def test_now_and_then_more_than_before_show_themselves(busy: Machine) -> None:
    company = busy.company()
    held(busy, company, UNTIL_JOINED, joined_by=3)
    open_ended = 0
    for _ in range(2 * COUNT_EVERY):
        company.hold_seconds()
        open_ended += not company.is_complete(4)
        company.came(4)
    assert open_ended == 2


def test_when_the_others_stay_away_requests_are_run_as_they_come(busy: Machine) -> None:
    company = busy.company()
    held(busy, company, UNTIL_JOINED, joined_by=3)
    assert held(busy, company, 4) == [HOLD_SECONDS, HOLD_SECONDS, HOLD_SECONDS, 0.0]


def test_nobody_waits_while_the_process_has_time_to_spare() -> None:
    idle = Machine(share=0.2)
    company = idle.company()
    assert set(held(idle, company, 1000, joined_by=15)) == {0.0}


def test_one_that_is_late_is_expected_again(busy: Machine) -> None:
    company = busy.company()
    held(busy, company, UNTIL_JOINED, joined_by=15)
    held(busy, company, 1, joined_by=1)
    assert company.expected == 12


def test_a_run_that_nobody_waited_for_teaches_nothing(busy: Machine) -> None:
    company = busy.company()
    company.came(40)
    assert company.expected == 1
