# SPDX-License-Identifier: Apache-2.0
"""The contract of the operators, on one page: schema, fallback, fake and autograd.

`ms_deform_attn` and `ms_deform_attn_from_offsets` are native: csrc/ registers their CPU and CUDA
kernels when a library is loaded, and until then (or on any other device) the reference serves.
`<name>_reference` has the same contract and is always the reference, so that it can be asked for by
name; `<name>_triton` is triton/operators.py.

Their autograd kernels have first-order reverse mode by the backward operators. Where torch wants
more, that is under torch.func's transforms and in forward mode, they call the reference, which
torch differentiates as it does any other torch code.

`caller` gives the way to each, and a short one for plain calls.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._decomp import register_decomposition
from torch.autograd import forward_ad
from torch.library import Library, impl, register_fake

from . import _arguments, _grid_sample, _memory, reference

# spatial_shapes is H0, W0, H1, W1, ...; SymInt keeps one compiled graph for all image sizes.
_VALUE = "Tensor value, SymInt[] spatial_shapes, SymInt[] level_start_index, "
_LOCATED = _VALUE + "Tensor sampling_locations, Tensor attention_weights"
_OFFSETS = _VALUE + (
    "int[] points_per_level, Tensor reference_points, Tensor sampling_offsets, "
    "Tensor attention_logits, Tensor? padding_mask, Tensor? offset_scale"
)

# torch.library's Library is untyped.
LIB: Any = Library("vitadapter_ops", "DEF")  # type: ignore[no-untyped-call]


def _like(tensor: Tensor, needed: bool) -> Tensor:
    """A fake gradient: contiguous, as the kernels allocate it; empty where it is not needed."""
    return tensor.new_empty(tensor.shape if needed else (0,))


def _fake_out(value: Tensor, queries: int) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty((batch, queries, heads * channels))


class Contract(NamedTuple):
    """What every implementation of an operator has in common.

    Attributes:
        name: of the operator.
        schema: arguments and results of the operator and of its backward.
        fakes: shapes and dtypes of the results of both.
        definition: computes the same in torch's own operators.
        setup_context: saves what the backward needs.
        backward: (ctx, which inputs need a gradient, the backward operator, gradients of the
            results) -> gradients of the inputs.
        composite: computes the same in operators that ONNX has.
    """

    name: str
    schema: tuple[str, str]
    fakes: tuple[Callable[..., Any], Callable[..., Any]]
    definition: Callable[..., Any]
    setup_context: Callable[..., None]
    backward: Callable[[Any, tuple[bool, ...], Any, Any], Any]
    composite: Callable[..., Any]

    def function(self, op: str) -> type[torch.autograd.Function]:
        """The implementation `op`, differentiable.

        Its first argument computes the result from the others, which are the operator's.
        """

        ops = torch.ops.vitadapter_ops
        backward = getattr(ops, f"{op}_backward").default
        short = functools.partial(_below_autograd, backward)

        def forward(ctx: Any, below: Callable[..., Any], *arguments: Any) -> Any:
            result = below(*arguments)
            self.setup_context(ctx, arguments, result)
            return result

        def gradients(ctx: Any, *grads: Tensor | None) -> Any:
            # With create_graph, autograd has to see the call, to refuse its gradient.
            chosen = backward if torch.is_grad_enabled() or not is_plain() else short
            if torch.are_deterministic_algorithms_enabled():
                # Not asked of a saved tensor: activation checkpointing lets them be asked for once.
                given = next(grad for grad in grads if grad is not None)
                chosen = getattr(ops, deterministic_backward(self.name, op, given)).default
            return None, *self.backward(ctx, ctx.needs_input_grad[1:], chosen, grads)

        members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
        return type(f"{op}_function", (torch.autograd.Function,), members)


def deterministic_backward(name: str, op: str, grad: Tensor) -> str:
    """The backward of the implementation `op` of `name` whose bits repeat, for a device and dtype.

    Atomics on a GPU add floats in any order. Our CUDA kernels have integers instead, but for fp64;
    the reference's index_add_ obeys torch.use_deterministic_algorithms.
    """
    if grad.device.type == "cpu":
        return f"{op}_backward"
    kind = "deterministic" if op == name and grad.dtype != torch.float64 else "reference"
    return f"{name}_{kind}_backward"


# --- the short way ------------------------------------------------------------------------------


def is_plain() -> bool:
    """Whether a call is just a call: torch neither compiles, traces nor transforms it."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def is_differentiated_by_torch(*arguments: Any) -> bool:
    """Whether gradients go another way than through autograd's graph and a backward operator.

    That is under torch.func's transforms that differentiate, and where an argument has a tangent.
    """
    if torch._C._are_functorch_transforms_active():
        kinds = {each.key() for each in get_interpreter_stack() or ()}
        if kinds & {TransformType.Grad, TransformType.Jvp}:
            return True
    return forward_ad._current_level >= 0 and any(map(_has_tangent, arguments))


def _has_tangent(argument: Any) -> bool:
    if not isinstance(argument, Tensor):
        return False
    dual: Any = forward_ad.unpack_dual(argument)  # type: ignore[no-untyped-call]
    return dual.tangent is not None


def _below_autograd(op: Any, *arguments: Any) -> Any:
    """Calls an operator that no gradient is wanted of.

    Its autograd kernel is Python and takes as long as all the rest of a call, only to find out the
    same.
    """
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)
    except RuntimeError as error:
        _memory.explain(error)


_eager: dict[str, Callable[..., Any]] = {}
_composites: dict[str, Callable[..., Any]] = {}


def caller(op: str, plain: bool) -> Callable[..., Any]:
    """What calls the operator `op`; for plain calls the same result at half the host's time."""
    if plain:
        return _eager[op]
    operator = getattr(torch.ops.vitadapter_ops, op)
    if not torch._C._get_tracing_state():
        return operator
    # With dynamo=True the exporter takes a program's operators apart later.
    return (
        _composites[op] if torch.onnx.is_in_onnx_export() else functools.partial(_traced, operator)
    )


def _traced(op: Any, value: Tensor, *arguments: Any) -> Any:
    """Calls an operator while torch.jit traces, which makes all sizes constants.

    The graph fails where the pixels of value are not as many: its levels would be wrong ones.
    """
    return op(value.expand(-1, int(value.shape[1]), -1, -1), *arguments)


def _is_recorded(arguments: tuple[Any, ...]) -> bool:
    """Whether autograd has to know of a call."""
    if torch.is_grad_enabled():
        for each in arguments:
            if isinstance(each, Tensor) and each.requires_grad:
                return True
    return False


def _shortened(name: str, contract: Contract) -> Callable[..., Any]:
    """The operator `name` for plain calls: its autograd kernel before the dispatcher."""
    op = getattr(torch.ops.vitadapter_ops, name).default
    below = functools.partial(_below_autograd, op)
    differentiable: Any = contract.function(name)

    def shortened(*arguments: Any) -> Any:
        if _is_recorded(arguments):
            return differentiable.apply(below, *arguments)
        # As _below_autograd, for one Python call less.
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)
        except RuntimeError as error:
            _memory.explain(error)

    return shortened


# --- registration -------------------------------------------------------------------------------


def _register_one(
    op: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    # What Inductor asks of strides by default; of an operator on its list, see
    # _put_on_inductors_list, it asks what its tag says.
    LIB.define(f"{op}{schema}", tags=(torch.Tag.needs_exact_strides,))
    impl(LIB, op, "CompositeExplicitAutograd")(kernel)
    register_fake(f"vitadapter_ops::{op}", _arguments.checked(schema, fake, fake=True), lib=LIB)


def _register_autograd(op: str, function: Any, transformed: Callable[..., Any]) -> None:
    """Registers the autograd kernel of an operator.

    torch.library.register_autograd would give one that drops tangents without a word, and fails
    under torch.func.

    Args:
        op: its name.
        function: an autograd.Function whose first argument calls what lies below autograd; the
            others are the operator's.
        transformed: what is called instead where torch is to differentiate.
    """
    overload = getattr(torch.ops.vitadapter_ops, op).default

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if is_differentiated_by_torch(*arguments):
            return transformed(*arguments)

        redispatch = functools.partial(
            overload.redispatch, keyset & torch._C._after_autograd_keyset
        )
        below = functools.partial(_below_autograd, redispatch)
        if _is_recorded(arguments):
            return function.apply(below, *arguments)
        return below(*arguments)

    LIB.impl(op, kernel, "Autograd", with_keyset=True)


class _Backward(torch.autograd.Function):
    """A backward operator, which has no gradient itself."""

    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], *arguments: Any) -> Any:
        return below(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _refuse_second_order()


def _refuse_second_order(*arguments: Any) -> None:
    raise NotImplementedError(
        "ms_deform_attn: second-order gradients are not implemented; differentiate once, or use "
        "create_graph=False; for a tangent of a gradient, torch.func.jvp of torch.func.grad"
    )


def _register_backward(op: str, contract: Contract, kernel: Callable[..., Any]) -> None:
    _register_one(op, contract.schema[1], kernel, contract.fakes[1])
    _register_autograd(op, _Backward, _refuse_second_order)


def register(
    op: str, contract: Contract, kernels: tuple[Callable[..., Any], Callable[..., Any]]
) -> None:
    """Registers an operator and its backward, `<op>_backward`.

    Args:
        op: its name.
        contract: what it keeps to.
        kernels: what runs, forward and backward, unless csrc/ has registered kernels for a device.
    """
    fake = _put_on_inductors_list(op, contract.fakes[0])
    _register_one(op, contract.schema[0], kernels[0], fake)
    _register_backward(f"{op}_backward", contract, kernels[1])
    _register_autograd(op, contract.function(op), contract.definition)
    _eager[op] = _shortened(op, contract)
    _decompose(op, contract.composite, fake)


def _decompose(op: str, composite: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Lets exporters to ONNX take an operator apart.

    torch.onnx.export(dynamo=True) looks for decompositions of what it has no translation for;
    torch.compile and torch.export keep operators that they are not told to decompose. But for
    symbolic sizes fake tensors prefer a decomposition to a fake, unless it is a meta function too.
    """
    overload = getattr(torch.ops.vitadapter_ops, op).default
    register_decomposition(overload)(composite)
    register_decomposition(overload, type="meta")(fake)
    _composites[op] = composite


def _put_on_inductors_list(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which also puts the operator on the list of those that Inductor is to call.

    Where the environment has CI, as on most build servers, Inductor refuses to call an operator
    that has a decomposition and is not on that list, which is one for the process. To load Inductor
    only for that takes seconds; when it compiles, it calls the fakes first.
    """

    def listed(*arguments: Any) -> Any:
        allowed = getattr(sys.modules.get("torch._inductor.lowering"), "FALLBACK_ALLOW_LIST", None)
        if allowed is not None:
            allowed.add(f"vitadapter_ops::{op}")
        return fake(*arguments)

    return listed


def _define(contract: Contract, kernels: tuple[Callable[..., Any], Callable[..., Any]]) -> Contract:
    """Registers an operator and `<name>_reference`, both with the reference's two functions.

    And `<name>_deterministic_backward`, which csrc/ has for CUDA; the reference's index_add_ obeys
    torch.use_deterministic_algorithms as well.
    """
    forward, backward = map(_arguments.checked, contract.schema, kernels)
    for op in (contract.name, f"{contract.name}_reference"):
        register(op, contract, (forward, backward))
    _register_backward(f"{contract.name}_deterministic_backward", contract, backward)
    return contract


def _given(grad: Tensor, needed: bool) -> Tensor | None:
    return grad if needed else None


# ms_deform_attn


def _fake_located(
    value: Tensor,
    spatial_shapes: list[int],
    level_start_index: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    return _fake_out(value, sampling_locations.shape[1])


def _fake_located_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    level_start_index: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    need_value: bool,
    need_locations: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _like(value, need_value),
        _like(sampling_locations, need_locations),
        _like(attention_weights, need_weights),
    )


def _save_located(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, ctx.level_start_index, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _located_gradients(
    ctx: Any, needs: tuple[bool, ...], op: Any, grads: tuple[Tensor]
) -> tuple[Tensor | None, ...]:
    need_value, _, _, *need_points = needs
    value, *points = ctx.saved_tensors
    grad_value, *grad_points = op(
        *grads,
        value,
        ctx.spatial_shapes,
        ctx.level_start_index,
        *points,
        need_value,
        *need_points,
    )
    return (_given(grad_value, need_value), None, None, *map(_given, grad_points, need_points))


MS_DEFORM_ATTN = _define(
    Contract(
        "ms_deform_attn",
        (
            f"({_LOCATED}) -> Tensor",
            f"(Tensor grad_output, {_LOCATED}, bool need_value, bool need_locations, "
            "bool need_weights) -> (Tensor, Tensor, Tensor)",
        ),
        (_fake_located, _fake_located_backward),
        reference.ms_deform_attn,
        _save_located,
        _located_gradients,
        _grid_sample.ms_deform_attn,
    ),
    (reference.ms_deform_attn, reference.ms_deform_attn_backward),
)


# ms_deform_attn_from_offsets: the second result is the attention weights, empty unless asked for.


def _fake_from_offsets(
    value: Tensor,
    spatial_shapes: list[int],
    level_start_index: list[int],
    points_per_level: list[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    padding_mask: Tensor | None,
    offset_scale: Tensor | None,
    return_weights: bool,
) -> tuple[Tensor, Tensor]:
    out = _fake_out(value, sampling_offsets.shape[1])
    return out, _like(attention_logits, return_weights)


def _fake_from_offsets_backward(
    grad_output: Tensor,
    grad_weights: Tensor | None,
    value: Tensor,
    spatial_shapes: list[int],
    level_start_index: list[int],
    points_per_level: list[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    padding_mask: Tensor | None,
    offset_scale: Tensor | None,
    need_value: bool,
    need_reference: bool,
    need_offsets: bool,
    need_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _like(value, need_value),
        _like(reference_points, need_reference),
        _like(sampling_offsets, need_offsets),
        _like(attention_logits, need_logits),
    )


def _save_offsets(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    value, *ctx.levels, points, offsets, logits, mask, scale, ctx.returned_weights = inputs
    # No zeros for the gradient of weights that nobody used.
    ctx.set_materialize_grads(False)
    # Only what came in: weights and locations are computed again.
    ctx.save_for_backward(value, points, offsets, logits, mask, scale)


def _offsets_gradients(
    ctx: Any, needs: tuple[bool, ...], op: Any, grads: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor | None, ...]:
    value, *tensors = ctx.saved_tensors
    need_value, need_points = needs[0], needs[4:7]
    grad_output, grad_weights = grads
    if grad_output is None:  # only the weights were used
        grad_output = _fake_out(value, tensors[1].shape[1]).zero_()
    grad_value, *grad_points = op(
        grad_output,
        grad_weights if ctx.returned_weights else None,
        value,
        *ctx.levels,
        *tensors,
        need_value,
        *need_points,
    )
    return (
        _given(grad_value, need_value),
        *(None,) * len(ctx.levels),
        *map(_given, grad_points, need_points),
        *(None,) * 3,
    )


def _composite_from_offsets(*arguments: Any) -> tuple[Tensor, Tensor]:
    # While torch.onnx.export decomposes, the operator: it may have a translation.
    return _grid_sample.ms_deform_attn_from_offsets(caller("ms_deform_attn", False), *arguments)


MS_DEFORM_ATTN_FROM_OFFSETS = _define(
    Contract(
        "ms_deform_attn_from_offsets",
        (
            f"({_OFFSETS}, bool return_weights) -> (Tensor, Tensor)",
            f"(Tensor grad_output, Tensor? grad_weights, {_OFFSETS}, bool need_value, "
            "bool need_reference, bool need_offsets, bool need_logits) "
            "-> (Tensor, Tensor, Tensor, Tensor)",
        ),
        (_fake_from_offsets, _fake_from_offsets_backward),
        reference.ms_deform_attn_from_offsets,
        _save_offsets,
        _offsets_gradients,
        _composite_from_offsets,
    ),
    (reference.ms_deform_attn_from_offsets, reference.ms_deform_attn_from_offsets_backward),
)
