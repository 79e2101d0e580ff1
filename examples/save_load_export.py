# SPDX-License-Identifier: Apache-2.0
"""A model's weights to a file and back, and the model as a graph of torch.export."""

import tempfile
from pathlib import Path

import torch

from vitadapter import create_model, load_checkpoint

image = torch.randn(1, 3, 64, 96)
model = create_model("vit_adapter_tiny", task="detection").eval()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    file = Path(folder) / "model.pth"
    torch.save(model.state_dict(), file)
    again = create_model("vit_adapter_tiny", task="detection").eval()
    print(load_checkpoint(again, file, strict=True))
    maps = model(image)
    assert all(map(torch.equal, again(image), maps))

    program = torch.export.export(model, (image,))
    torch.export.save(program, Path(folder) / "model.pt2")
    graph = torch.export.load(Path(folder) / "model.pt2").module()
    for got, expected in zip(graph(image), maps, strict=True):
        torch.testing.assert_close(got, expected)
print("the same maps from the file and from the graph")
