"""The ledger: what it says of a step, and that it survives a checkpoint."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.errors import CheckpointError
from fundamentallm.training.interventions import Interventions, RateCut

CUTS = st.lists(
    st.tuples(st.integers(1, 50), st.integers(1, 20), st.sampled_from([0.5, 0.25, 0.1]))
)


@given(CUTS, st.integers(0, 80))
def test_the_rate_is_multiplied_by_every_cut_that_holds(cuts, step):
    ledger = Interventions()
    expected = 1.0
    for first, num_steps, factor in cuts:
        ledger.cut_rate(first, num_steps, factor)
        if step in range(first, first + num_steps):
            expected *= factor
    assert ledger.rate_factor(step) == expected


@given(CUTS, st.sets(st.integers(1, 100)))
def test_a_ledger_survives_json(cuts, skipped):
    ledger = Interventions()
    ledger.skip(skipped)
    for cut in cuts:
        ledger.cut_rate(*cut)
    other = Interventions({7}, [])
    other.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert other == ledger
    assert other.skipped == skipped


@pytest.mark.parametrize(
    "saved",
    [
        {"skipped": ["3"], "cuts": []},
        {"skipped": [3.0], "cuts": []},
        {"skipped": [True], "cuts": []},
        {"skipped": [], "cuts": [["1", 2, 0.5]]},
        {"skipped": [], "cuts": [[1, 2.5, 0.5]]},
        {"skipped": [], "cuts": [[1, 2, "0.5"]]},
        {"skipped": [], "cuts": [[1, 2, math.nan]]},
        {"skipped": [], "cuts": [[1, 2, math.inf]]},
    ],
)
def test_what_is_no_number_is_refused_and_changes_nothing(saved):
    ledger = Interventions({7}, [RateCut(1, 2, 0.5)])
    with pytest.raises(CheckpointError, match="are no numbers"):
        ledger.load_state_dict(saved)
    assert ledger == Interventions({7}, [RateCut(1, 2, 0.5)])
