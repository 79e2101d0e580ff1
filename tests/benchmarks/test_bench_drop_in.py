# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/models/drop_in.py compares and records."""

import pytest
import torch

from benchmarks.common.timing import Timing
from benchmarks.models import drop_in


def test_difference_is_a_share_of_the_largest_value():
    expected = [torch.tensor([1.0, -4.0, torch.inf])]
    assert drop_in.difference([torch.tensor([1.0, -4.1, torch.inf])], expected) == (
        pytest.approx(0.1 / 4, rel=1e-5)
    )


def test_speed_is_recorded_only_where_outputs_agree():
    timings = {
        (part, variant): Timing((seconds,))
        for part in ("encoder", "whole model")
        for variant, seconds in ((drop_in.ORIGINAL, 4.0), (drop_in.PATCHED, 1.0))
    }
    found = drop_in.as_json({"encoder": 1e-6, "whole model": 1e-3}, timings)
    assert found["encoder"]["faster"] == 4.0
    assert found["whole model"]["faster"] is None
