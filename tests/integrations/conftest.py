# SPDX-License-Identifier: Apache-2.0
"""What the comparisons with other projects share."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """Tensors are tiny: threads would only wait for each other, ten times as long on a busy CPU."""
    threads(1)
