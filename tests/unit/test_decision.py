"""What follows a step: a table of cases, and laws over all combinations of what may be known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest

from fundamentallm.config import TrainingConfig
from fundamentallm.training.decision import (
    Cadence,
    Decision,
    End,
    RollBack,
    Save,
    StepEnd,
    StepFacts,
    decide,
)

# Epochs of 10 steps, evaluation every 4; saves with every evaluation, or every 3.
WITH_EVALUATION = Cadence(10, log_steps=5, eval_steps=4, eval_epochs=True, checkpoint_steps=None)
EVERY_3 = replace(WITH_EVALUATION, checkpoint_steps=3)
EACH = replace(WITH_EVALUATION, eval_steps=1)
GO_ON, STOP, FINISH, ROLL_BACK = End.GO_ON, End.STOP, End.FINISH, End.ROLL_BACK
ON_SCHEDULE, FOR_A_STOP = Save.ON_SCHEDULE, Save.FOR_A_STOP


@dataclass(frozen=True)
class Known:
    """Everything that a decision goes by, side by side; the facts of a step in between."""

    step: int
    last_step: int | None = 50
    cadence: Cadence = WITH_EVALUATION
    finish: str = ""
    rolling_back: bool = False
    exhausted: bool = False
    leaving: bool = False
    data_fault: bool = False
    evaluated: bool = False
    saved: End | None = None
    unmeasured: bool = False


def decided(known: Known) -> Decision:
    facts = StepFacts()
    for name in ("finish", "exhausted", "leaving", "data_fault", "evaluated", "saved"):
        setattr(facts, name, getattr(known, name))
    facts.roll_back = RollBack(None, "a fault") if known.rolling_back else None
    before = dict(vars(facts))
    decision = decide(StepEnd(known.step, known.last_step, known.cadence, facts, known.unmeasured))
    assert vars(facts) == before
    return decision


def at(step: int, cadence: Cadence = WITH_EVALUATION, **known: Any) -> Known:
    """The end of a step of a run of 50 that has something to validate with."""
    return Known(step, cadence=cadence, **{"unmeasured": True, **known})


DONE = {"evaluated": True, "unmeasured": False}
CUT_OFF = {"evaluated": True, "unmeasured": True}
NO_DATA = {"unmeasured": False}
LAST, BUDGET = "the last step is done", "the budget is used up"

# name: what is known; the end, its reason, whether to evaluate, why to save, whether it is pending
TABLE: dict[str, tuple[Known, Decision]] = {
    "a plain step": (at(1), Decision(GO_ON)),
    "step 0 is saved": (at(0), Decision(GO_ON, save=ON_SCHEDULE)),
    "step 0 is not saved twice": (at(0, saved=GO_ON), Decision(GO_ON)),
    "an evaluation is due": (at(4), Decision(GO_ON, "", True, ON_SCHEDULE, True)),
    "an evaluation after every step": (at(1, EACH), Decision(GO_ON, "", True, ON_SCHEDULE, True)),
    "an epoch ends": (at(10), Decision(GO_ON, "", True, ON_SCHEDULE, True)),
    "an epoch ends, evaluation there is off": (
        at(10, replace(WITH_EVALUATION, eval_epochs=False)),
        Decision(GO_ON),
    ),
    "saved, to be evaluated": (at(4, saved=GO_ON), Decision(GO_ON, "", True, None, True)),
    "evaluated, to be saved": (at(4, **DONE), Decision(GO_ON, save=ON_SCHEDULE)),
    "evaluated and saved": (at(4, saved=GO_ON, **DONE), Decision(GO_ON)),
    "due without data, told to whoever listens": (
        at(4, **NO_DATA),
        Decision(GO_ON, "", True, ON_SCHEDULE),
    ),
    "a save of its own cadence": (at(3, EVERY_3), Decision(GO_ON, save=ON_SCHEDULE)),
    "an evaluation between two saves": (at(4, EVERY_3), Decision(GO_ON, "", True, None, True)),
    "both at once": (at(12, EVERY_3), Decision(GO_ON, "", True, ON_SCHEDULE, True)),
    "the last step": (at(50), Decision(FINISH, LAST, True, ON_SCHEDULE, True)),
    "the last step, saved": (at(50, saved=FINISH), Decision(FINISH, LAST, True, None, True)),
    "the last step, all done": (at(50, saved=FINISH, **DONE), Decision(FINISH, LAST)),
    "a budget used up": (at(7, exhausted=True), Decision(FINISH, BUDGET, True, ON_SCHEDULE, True)),
    "a budget used up at the last step": (
        at(50, exhausted=True),
        Decision(FINISH, BUDGET, True, ON_SCHEDULE, True),
    ),
    "a wish to finish": (
        at(7, finish="enough"),
        Decision(FINISH, "enough", True, ON_SCHEDULE, True),
    ),
    "a wish to finish comes before the budget's reason": (
        at(50, finish="enough", exhausted=True, **DONE),
        Decision(FINISH, "enough", save=ON_SCHEDULE),
    ),
    "a wish to finish that the evaluation brought": (
        at(4, finish="enough", saved=GO_ON, **DONE),
        Decision(FINISH, "enough"),
    ),
    "the same where no save was due": (
        at(4, EVERY_3, finish="enough", **DONE),
        Decision(FINISH, "enough", save=ON_SCHEDULE),
    ),
    "a wish to finish that the save brought": (
        at(4, finish="enough", saved=GO_ON),
        Decision(FINISH, "enough", True, ON_SCHEDULE, True),
    ),
    "the same between two evaluations": (
        at(3, EVERY_3, finish="enough", saved=GO_ON),
        Decision(FINISH, "enough", True, ON_SCHEDULE, True),
    ),
    "a stop": (at(7, leaving=True), Decision(STOP, save=FOR_A_STOP)),
    "a stop that is saved": (at(7, leaving=True, saved=STOP), Decision(STOP)),
    "a stop where an evaluation is due": (
        at(4, leaving=True),
        Decision(STOP, save=ON_SCHEDULE, pending=True),
    ),
    "a stop where one is due between two saves": (
        at(4, EVERY_3, leaving=True),
        Decision(STOP, save=FOR_A_STOP, pending=True),
    ),
    "a stop where one is due without data": (
        at(4, leaving=True, **NO_DATA),
        Decision(STOP, save=ON_SCHEDULE),
    ),
    "a stop during the evaluation": (
        at(4, leaving=True, saved=GO_ON, **CUT_OFF),
        Decision(STOP, pending=True),
    ),
    "a stop during an evaluation between two saves": (
        at(4, EVERY_3, leaving=True, **CUT_OFF),
        Decision(STOP, save=FOR_A_STOP, pending=True),
    ),
    "a stop after the evaluation": (at(4, leaving=True, **DONE), Decision(STOP, save=ON_SCHEDULE)),
    "a stop where only a save is due": (
        at(3, EVERY_3, leaving=True),
        Decision(STOP, save=ON_SCHEDULE),
    ),
    "a stop at the last step evaluates first": (
        at(50, leaving=True),
        Decision(FINISH, LAST, True, ON_SCHEDULE, True),
    ),
    "a stop during the last evaluation": (
        at(50, leaving=True, saved=FINISH, **CUT_OFF),
        Decision(STOP, pending=True),
    ),
    "a stop during a last evaluation between two of the cadence": (
        at(7, finish="enough", leaving=True, saved=FINISH, **CUT_OFF),
        Decision(STOP, pending=True),
    ),
    "a stop after the last evaluation": (
        at(50, leaving=True, saved=FINISH, **DONE),
        Decision(FINISH, LAST),
    ),
    "an evaluation that nobody made": (
        at(4, saved=GO_ON, **CUT_OFF),
        Decision(GO_ON, pending=True),
    ),
    "a rollback": (at(7, rolling_back=True), Decision(ROLL_BACK)),
    "a rollback comes before the end of the run": (
        at(50, rolling_back=True, finish="enough", exhausted=True, leaving=True),
        Decision(ROLL_BACK),
    ),
    "a rollback that the evaluation brought": (
        at(4, rolling_back=True, **DONE),
        Decision(ROLL_BACK),
    ),
    "a state that turned out not to be fit to be saved": (
        at(50, rolling_back=True, saved=FINISH, **DONE),
        Decision(ROLL_BACK),
    ),
    "data that cannot be read": (at(7, data_fault=True), Decision(STOP, save=FOR_A_STOP)),
    "data that cannot be read before the first step": (
        at(0, data_fault=True),
        Decision(STOP, save=FOR_A_STOP),
    ),
    "data that cannot be read, and an evaluation after every step": (
        at(1, EACH, data_fault=True),
        Decision(STOP, save=FOR_A_STOP, pending=True),
    ),
    "data that cannot be read, after a save": (at(4, data_fault=True, saved=GO_ON), Decision(STOP)),
    "validation data that cannot be read at the last step": (
        at(50, data_fault=True, saved=FINISH, **CUT_OFF),
        Decision(STOP),
    ),
    "validation data that cannot be read between two saves": (
        at(4, EVERY_3, data_fault=True, **CUT_OFF),
        Decision(STOP, save=FOR_A_STOP, pending=True),
    ),
    "data that cannot be read behind an unhealthy step": (
        at(7, data_fault=True, rolling_back=True),
        Decision(STOP),
    ),
}


@pytest.mark.parametrize(("known", "expected"), TABLE.values(), ids=TABLE)
def test_the_table_of_cases(known: Known, expected: Decision) -> None:
    assert decided(known) == expected


def test_of_a_new_step_nothing_is_wished_or_done() -> None:
    facts = StepFacts()
    fields = [getattr(facts, name) for name in StepFacts.__annotations__]
    assert fields == ["", None, *[False] * 8, None]
    assert decide(StepEnd(1, 50, WITH_EVALUATION, facts, True)) == Decision(GO_ON)


def combinations() -> Iterator[Known]:
    flags = [False, True]
    for values in product(
        (0, 3, 4, 7, 10, 50),
        (50, None),
        (WITH_EVALUATION, EVERY_3),
        ("", "enough"),
        *[flags] * 5,
        (None, GO_ON, STOP, FINISH),
        flags,
    ):
        yield Known(*values)


def is_over(known: Known) -> bool:
    return bool(known.finish) or known.exhausted or known.step == known.last_step


def test_laws_of_every_decision() -> None:
    for known in combinations():
        decision = decided(known)
        said = f"{known} -> {decision}"
        # A step is asked for what is not done yet, and never for what is.
        assert not (decision.evaluate and known.evaluated), said
        if decision.save and known.saved:
            assert (decision.end, known.saved) in {(FINISH, GO_ON), (FINISH, STOP)}, said
        if known.rolling_back:
            assert not decision.evaluate, said
            assert decision.save is None, said
            assert decision.end is (STOP if known.data_fault else ROLL_BACK), said
            continue
        assert decision.end is not ROLL_BACK, said
        assert bool(decision.reason) == (decision.end is FINISH), said
        assert decision.ends_run == (known.data_fault or known.leaving or is_over(known)), said
        if decision.end is STOP:
            assert decision.save or known.saved, said
            assert not decision.evaluate, said
        if decision.end is FINISH:
            assert decision.save or known.saved is FINISH or known.evaluated, said
            assert decision.save or known.saved, said
            assert decision.evaluate or known.evaluated or known.step == 0, said
        # Who leaves with an evaluation owed is not finished.
        if known.leaving and decision.pending and not decision.evaluate:
            assert decision.end is STOP, said
        # Why a state is saved does not depend on a stop, so a run that was stopped counts alike.
        if decision.save and not is_over(known) and not known.data_fault:
            scheduled = known.cadence.saves_at(known.step, known.cadence.evaluates_at(known.step))
            assert (decision.save is ON_SCHEDULE) == scheduled, said


@dataclass(frozen=True)
class Happens:
    """What comes of an evaluation or a save: `decide`'s facts that change."""

    in_evaluation: tuple[tuple[str, Any], ...]
    in_save: tuple[tuple[str, Any], ...]


OUTCOMES = [
    Happens(evaluation, save)
    for evaluation in (
        (("unmeasured", False),),
        (("leaving", True),),  # cut off
        (("unmeasured", False), ("leaving", True)),
        (("unmeasured", False), ("finish", "no better")),
        (("unmeasured", False), ("rolling_back", True)),
        (("data_fault", True),),
        (),  # nobody made it
    )
    for save in ((), (("rolling_back", True),), (("finish", "enough"),))
]


def carried_out(known: Known, happens: Happens) -> tuple[Decision, list[Any], Known]:
    """Do what is decided until nothing is left; return the last decision and what was done."""
    done: list[Any] = []
    for _ in range(6):
        decision = decided(known)
        if decision.evaluate or decision.save:
            assert not known.rolling_back, f"{known} -> {decision}"  # it is not healthy
        if decision.save is not None:
            done.append(decision.save)
            known = replace(known, saved=decision.end, **dict(happens.in_save))
        elif decision.evaluate:
            done.append("evaluate")
            known = replace(known, evaluated=True, **dict(happens.in_evaluation))
        else:
            return decision, done, known
    raise AssertionError(f"no end: {known}, {done}")


def test_laws_of_what_is_carried_out() -> None:
    for known, happens in product(combinations(), OUTCOMES):
        if known.evaluated or known.saved or known.data_fault:
            continue
        end, done, after = carried_out(known, happens)
        said = f"{known}, {happens}: {done}, {end}"
        saves = [each for each in done if each != "evaluate"]
        assert done.count("evaluate") <= 1, said
        # What is saved at this step is saved before its evaluation; only where none was due does an
        # evaluation that ends the run bring one.
        if saves and done[-1] != "evaluate" and "evaluate" in done:
            assert known.cadence is EVERY_3, said
            assert done[0] == "evaluate", said
            assert done.index("evaluate") == 0, said
        if known.rolling_back:
            assert done == [], said
        if end.end is STOP and not after.rolling_back:
            assert saves, said
        if end.end is FINISH:
            assert saves, said
            assert after.evaluated or known.step == 0, said


def test_the_cadence_is_that_of_the_configuration() -> None:
    config = TrainingConfig(log_steps=5, eval_steps=4, eval_epochs=True, checkpoint_steps=3)
    cadence = Cadence.resolve(config, 10)
    assert cadence == EVERY_3
    assert [s for s in range(1, 21) if cadence.logs_at(s)] == [5, 10, 15, 20]
    assert [s for s in range(1, 21) if cadence.evaluates_at(s)] == [4, 8, 10, 12, 16, 20]
    assert [s for s in range(21) if cadence.saves_at(s, False)] == [0, 3, 6, 9, 12, 15, 18]
    behind_a_cut = replace(cadence, epochs_from=7)
    assert [s for s in range(7, 30) if behind_a_cut.ends_epoch(s)] == [7, 17, 27]
    assert WITH_EVALUATION.saves_at(4, True)
    assert not WITH_EVALUATION.saves_at(3, False)
