# SPDX-License-Identifier: Apache-2.0
"""What the comparisons with other projects share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors are tiny: threads would only wait for each other, ten times as long on a busy CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
