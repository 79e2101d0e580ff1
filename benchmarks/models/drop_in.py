# SPDX-License-Identifier: Apache-2.0
"""Other projects' models before and after the one line that gives them our operator.

    python -m benchmarks.models.drop_in
    python -m benchmarks.models.drop_in --cases deformable-detr --rounds 3
    python -m benchmarks.models.drop_in --publish    # writes benchmarks/results/drop-in-cpu.json

Deformable DETR, Grounding DINO and Mask2Former of the installed transformers, in their default
sizes with random weights, on one image of 800 x 1066. Original and patched take turns in one
process, and each part is timed inside the same forward pass of the whole model, so that "encoder"
and "whole model" are of one run. Offsets and weights depend on the query, as after training.

Outputs are compared first, those of the part and those of the model: a ratio is printed where they
agree to 1e-4 of the largest value. With random weights Grounding DINO's whole model does not agree
with itself rounded otherwise: it keeps the 900 best of 17821 nearly equal scores. Mask2Former turns
its masks into yes and no for every layer of its decoder. What the encoders hand on agrees.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import options, report
from benchmarks.common.console import LOOK, columns, span, times, wide_console
from benchmarks.common.timing import Timing
from benchmarks.models.common import record_of, say, say_written
from vitadapter_ops.compat.transformers import patch_transformers
from vitadapter_ops.testing.tolerances import DROP_IN_MODEL_SHARE

ORIGINAL, PATCHED = "original", "patched"


@dataclass(frozen=True)
class Model:
    """A model to time.

    Attributes:
        name: what --cases calls it.
        package: as `patch_transformers` names it.
        build: the model, and the arguments of its forward.
        part: the submodule that is timed beside the whole model, and what to call it.
        compared: outputs of the whole model that have to agree.
    """

    name: str
    package: str
    build: Callable[[Any], tuple[nn.Module, dict[str, Tensor]]]
    part: tuple[str, str]
    compared: tuple[str, ...]


def image() -> Tensor:
    return torch.randn(1, 3, 800, 1066)


def deformable_detr(transformers: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
    )
    return transformers.DeformableDetrForObjectDetection(config), {"pixel_values": image()}


def grounding_dino(transformers: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GroundingDinoConfig()
    words = torch.tensor([[101, 4937, 1012, 3899, 1012, 102]])  # [CLS] cat . dog . [SEP]
    return transformers.GroundingDinoForObjectDetection(config), {
        "pixel_values": image(),
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "token_type_ids": torch.zeros_like(words),
    }


def mask2former(transformers: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.Mask2FormerConfig()
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    return model, {"pixel_values": image()}


MODELS = (
    Model(
        "deformable-detr",
        "deformable_detr",
        deformable_detr,
        ("model.encoder", "encoder"),
        ("logits", "pred_boxes"),
    ),
    Model(
        "grounding-dino",
        "grounding_dino",
        grounding_dino,
        ("model.encoder", "encoder"),
        ("logits", "pred_boxes"),
    ),
    Model(
        "mask2former",
        "mask2former",
        mask2former,
        ("model.pixel_level_module.decoder", "pixel decoder"),
        ("class_queries_logits", "masks_queries_logits"),
    ),
)


def perturb(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            nn.init.normal_(parameter, std=0.02)


class Stopwatch:
    """Seconds that a submodule takes within a forward pass, by its hooks."""

    def __init__(self, module: nn.Module) -> None:
        self.seconds = 0.0
        self.output: Any = None
        self._begin = 0.0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, module: nn.Module, arguments: object) -> None:
        self._begin = time.perf_counter()

    def _stop(self, module: nn.Module, arguments: object, output: object) -> None:
        self.seconds = time.perf_counter() - self._begin
        self.output = output


def tensors_in(output: Any) -> list[Tensor]:
    """All floating tensors of a submodule's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if hasattr(output, "values"):
        output = output.values()
    elif not isinstance(output, list | tuple):
        return []
    return [tensor for each in output for tensor in tensors_in(each)]


def difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference as a share of the largest expected value, over all tensors."""
    shares = []
    for mine, theirs in zip(got, expected, strict=True):
        finite = theirs.isfinite()
        error = (mine - theirs)[finite].abs().max() if mine.isfinite().equal(finite) else torch.inf
        shares.append(float(error / theirs[finite].abs().max()))
    return max(shares)


def measure(
    entry: Model, transformers: Any, rounds: int
) -> tuple[dict[str, float], dict[tuple[str, str], Timing]]:
    """Differences of the outputs by part, and timings by (part, variant)."""
    torch.manual_seed(0)
    model, inputs = entry.build(transformers)
    perturb(model)
    model.eval()
    path, part = entry.part
    stopwatch = Stopwatch(model.get_submodule(path))
    samples: dict[tuple[str, str], list[float]] = {}

    def run(variant: str) -> Any:
        begin = time.perf_counter()
        output = model(**inputs)
        seconds = time.perf_counter() - begin
        samples.setdefault((part, variant), []).append(stopwatch.seconds)
        samples.setdefault(("whole model", variant), []).append(seconds)
        return output

    with torch.inference_mode():
        whole = run(ORIGINAL)
        expected = tensors_in(stopwatch.output)
        with patch_transformers(entry.package):
            patched = run(PATCHED)
        shares = {
            part: difference(tensors_in(stopwatch.output), expected),
            "whole model": difference(
                [patched[name] for name in entry.compared], [whole[name] for name in entry.compared]
            ),
        }
        samples.clear()  # the first pass of each pays for caches and allocations
        for _ in range(rounds):
            run(ORIGINAL)
            with patch_transformers(entry.package):
                run(PATCHED)
    return shares, {key: Timing(tuple(values)) for key, values in samples.items()}


def as_json(
    shares: dict[str, float], timings: dict[tuple[str, str], Timing]
) -> dict[str, dict[str, Any]]:
    """For each part what was measured; `faster` is None where the outputs do not agree."""
    found = {}
    for part, share in shares.items():
        before, after = timings[part, ORIGINAL], timings[part, PATCHED]
        found[part] = {
            ORIGINAL: before.as_json(),
            PATCHED: after.as_json(),
            "difference": share,
            "faster": before.median / after.median if share <= DROP_IN_MODEL_SHARE else None,
        }
    return found


def table(name: str, parts: dict[str, dict[str, Any]]) -> Table:
    result = Table(title=name, **LOOK)
    columns(result, "", "original [s]", "patched [s]", "faster", "outputs differ by")
    for part, found in parts.items():
        result.add_row(
            part,
            span(found[ORIGINAL], "s"),
            span(found[PATCHED], "s"),
            times(found["faster"]),
            f"{found['difference']:.1e}",
        )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_cases(parser, [model.name for model in MODELS])
    options.add_rounds(parser, 5)
    options.add_threads(parser)
    options.add_output(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        import transformers
    except ModuleNotFoundError as missing:
        raise SystemExit(f"{missing.name} is not installed: pip install transformers") from missing
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    console = wide_console()
    record = record_of(torch.device("cpu"), ("fp32",), "transformers")
    say(console, report.caption(record))
    say(console, f"transformers {record['versions']['transformers']}, fp32")
    console.print()
    record["settings"] = {"rounds": args.rounds, "image": list(image().shape)}
    record["models"] = {}
    agree = True
    for model in options.matching(MODELS, args.cases):
        parts = as_json(*measure(model, transformers, args.rounds))
        record["models"][model.name] = parts
        agree &= parts[model.part[1]]["faster"] is not None
        console.print(table(model.name, parts))
        console.print()
    say(console, "Medians of the rounds, with the 20th and 80th percentile.")
    path = report.result_file(args.out, "drop-in", "cpu")
    report.write_json(path, record)
    say_written(console, path)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
