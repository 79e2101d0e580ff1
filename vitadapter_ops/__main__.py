# SPDX-License-Identifier: Apache-2.0
"""`python -m vitadapter_ops`: what works on this machine, and why."""

from __future__ import annotations

import platform

import torch

from . import __version__, available_backends, explain_backend


def main() -> None:
    """Prints versions, devices and the choice of backend for each device."""
    print(
        f"vitadapter {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    print(f"CPU threads: {torch.get_num_threads()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            print(f"GPU {index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    else:
        print("GPU: none that torch can use")
    print(f"available backends: {', '.join(available_backends())}")
    print(explain_backend("cpu"))
    if torch.cuda.is_available():
        print(explain_backend("cuda"))


if __name__ == "__main__":
    main()
