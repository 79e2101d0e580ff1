# SPDX-License-Identifier: Apache-2.0
"""The operators as torch sees them: schema, fake, autograd, compile, export, autocast."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint

import children
from optional import sweep
from vitadapter_ops import MSDeformAttn, _ops, ms_deform_attn
from vitadapter_ops.testing import cases, gate

OPS = torch.ops.vitadapter_ops
NAMES = ["ms_deform_attn", "ms_deform_attn_reference"]
NEEDS = [(v, loc, w) for v in (True, False) for loc in (True, False) for w in (True, False)]
OPCHECK_CASES = [case for case in cases.SMALL if case.pixels is None and case.starts is None]


def op_arguments(case, dtype=torch.float32):
    inputs = case.inputs().to(dtype)
    return [
        inputs.value,
        inputs.flat_shapes,
        inputs.starts,
        inputs.sampling_locations,
        inputs.attention_weights,
    ]


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("case", sweep(OPCHECK_CASES, "row-map", "three-levels", "odd-channels"))
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_forward(name, case, permuted):
    arguments = op_arguments(case)
    for i in (0, 3, 4):
        if permuted:
            arguments[i] = gate.dense_permuted(arguments[i])
        arguments[i] = arguments[i].requires_grad_()
    torch.library.opcheck(getattr(OPS, name).default, tuple(arguments))


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_backward(name, needs, permuted):
    case = cases.SMALL[3]
    arguments = op_arguments(case)
    grad = torch.randn(case.batch, case.queries, case.heads * case.channels)
    if permuted:
        grad = gate.dense_permuted(grad)
        arguments = [gate.dense_permuted(a) if torch.is_tensor(a) else a for a in arguments]
    torch.library.opcheck(getattr(OPS, f"{name}_backward").default, (grad, *arguments, *needs))


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_gradients_that_are_not_needed_are_not_computed(backend, needs):
    device, name = backend
    inputs = replace(cases.SMALL[3], batch=1, heads=1).inputs().to(torch.float32, device)
    gate.check_needs(
        lambda value, *points: ms_deform_attn(value, inputs.spatial_shapes, *points, backend=name),
        inputs.tensors,
        needs,
    )


@pytest.mark.parametrize("case", [c for c in cases.SMALL if c.channels <= 16], ids=str)
def test_gradcheck(backend, case):
    device, name = backend
    inputs = case.inputs(seed=1).to(torch.float64, device)

    def function(value, locations, weights):
        return ms_deform_attn(
            value,
            inputs.spatial_shapes,
            locations,
            weights,
            level_start_index=inputs.level_start_index,
            backend=name,
        )

    tensors = tuple(t.requires_grad_() for t in inputs.tensors)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=case.channels > 3)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_changes_no_gradient(reentrant):
    torch.manual_seed(0)
    module = MSDeformAttn(d_model=24, n_levels=2, n_heads=3, n_points=2)
    inputs = cases.SMALL[3].inputs().to(torch.float32)
    query, reference = torch.randn(2, 5, 24, requires_grad=True), torch.rand(2, 5, 1, 2)
    feature = torch.randn(2, 30, 24, requires_grad=True)

    def step(query, feature):
        value, locations, weights = inputs.tensors
        out = ms_deform_attn(value * query.sum(), inputs.spatial_shapes, locations, weights)
        return out.sum() + module(query, reference, feature, [(4, 6), (2, 3)]).square().sum()

    expected = torch.autograd.grad(step(query, feature), (query, feature))
    out = torch.utils.checkpoint.checkpoint(step, query, feature, use_reentrant=reentrant)
    if reentrant:
        out.backward()  # the only way that it supports
        got = query.grad, feature.grad
    else:
        got = torch.autograd.grad(out, (query, feature))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_second_order_gradients_are_refused(backend):
    device, name = backend
    inputs = cases.SMALL[3].inputs().to(torch.float64, device)
    tensors = [t.requires_grad_() for t in inputs.tensors]
    out = ms_deform_attn(tensors[0], inputs.spatial_shapes, *tensors[1:], backend=name)
    grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order"):
        sum(grad.sum() for grad in grads).backward()


def two_level_model(feature, head_width):
    """Levels and queries from one feature map, as a model makes them; sizes stay symbolic."""
    batch, _, height, width = feature.shape
    fine = feature.flatten(2).transpose(1, 2)
    coarse = feature[:, :, ::2, ::2]
    shapes = [(height, width), tuple(coarse.shape[2:])]
    value = torch.cat((fine, coarse.flatten(2).transpose(1, 2)), 1)
    value = value.unflatten(2, (-1, head_width))
    queries, heads = fine.shape[1], value.shape[2]
    locations = torch.sigmoid(fine[..., :1]).view(batch, queries, 1, 1, 1, 1)
    locations = locations.expand(batch, queries, heads, 2, 4, 2) * 0.9
    weights = torch.full_like(locations[..., 0], 0.125)
    return ms_deform_attn(value, shapes, locations, weights)


def test_compile_fullgraph_serves_two_image_sizes_with_one_graph():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(two_level_model, fullgraph=True, dynamic=True, backend=counter)
    for height, width in ((8, 12), (14, 10), (16, 6)):
        feature = torch.randn(2, 24, height, width, requires_grad=True)
        expected = two_level_model(feature, 8)
        got = compiled(feature, 8)
        torch.testing.assert_close(got, expected)
        (grad,) = torch.autograd.grad(got.sum(), feature)
        (expected_grad,) = torch.autograd.grad(expected.sum(), feature)
        torch.testing.assert_close(grad, expected_grad)
    assert counter.frame_count == 1


def test_compile_fullgraph_of_the_module_with_inductor():
    torch._dynamo.reset()
    module = MSDeformAttn(d_model=24, n_levels=2, n_heads=3, n_points=2)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for height, width in ((4, 6), (8, 5)):
        shapes = [(height, width), (height // 2, width // 2)]
        pixels = sum(h * w for h, w in shapes)
        query, reference = torch.randn(2, 5, 24), torch.rand(2, 5, 1, 2)
        feature = torch.randn(2, pixels, 24, requires_grad=True)
        got = compiled(query, reference, feature, shapes)
        expected = module(query, reference, feature, shapes)
        torch.testing.assert_close(got, expected)
        (grad,) = torch.autograd.grad(got.sum(), feature)
        (expected_grad,) = torch.autograd.grad(expected.sum(), feature)
        torch.testing.assert_close(grad, expected_grad)


COMPILED_ON_A_BUILD_SERVER = """
import torch
import vitadapter_ops
from torch._inductor.utils import run_and_get_code

shapes, starts = [3, 4, 2, 2], [0, 12]
points, weights = torch.rand(2, 5, 2, 2, 3, 2), torch.rand(2, 5, 2, 2, 3)
offsets = [3, 3], torch.rand(2, 5, 1, 2), points.flatten(3, 4), weights.flatten(3), None, None, True
# Each once: what Inductor has looked up once it keeps.
for name, others, dynamic in (
    ("ms_deform_attn", (points, weights), False),
    ("ms_deform_attn_reference", (points, weights), True),
    ("ms_deform_attn_from_offsets", offsets, True),
    ("ms_deform_attn_from_offsets_reference", offsets, False),
):
    operator = getattr(torch.ops.vitadapter_ops, name)

    def doubled(value, *arguments):
        return operator(2 * value, shapes, starts, *arguments)

    torch._dynamo.reset()
    value = torch.randn(2, 16, 2, 4, requires_grad=True)
    compiled = torch.compile(doubled, fullgraph=True, dynamic=dynamic)
    got, code = run_and_get_code(compiled, value, *others)
    torch.testing.assert_close(got, doubled(value, *others))
    assert f"torch.ops.vitadapter_ops.{name}.default" in code[0], code[0]
"""


@pytest.mark.exhaustive
def test_inductor_keeps_the_operators_where_the_environment_says_ci():
    environment = {"CI": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = children.python(["-c", COMPILED_ON_A_BUILD_SERVER], **environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("with_starts", [False, True], ids=["in order", "with starts"])
def test_compile_fullgraph_reads_a_tensor_of_shapes(with_starts):
    torch._dynamo.reset()
    value, locations = torch.randn(1, 24, 2, 4, requires_grad=True), torch.rand(1, 5, 2, 2, 3, 2)
    weights = torch.rand(1, 5, 2, 2, 3)

    def sample(shapes, starts):
        return ms_deform_attn(value, shapes, locations, weights, level_start_index=starts)

    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    starts = torch.tensor([0, 12]) if with_starts else None
    for table in ([(3, 4), (6, 2)], [(2, 6), (4, 3)]):
        with torch.compiler.set_stance("fail_on_recompile" if table[0] == (2, 6) else "default"):
            got = compiled(torch.tensor(table), starts)
        expected = sample(table, None)
        torch.testing.assert_close(got, expected)
        (grad,) = torch.autograd.grad(got.sin().sum(), value)
        (expected_grad,) = torch.autograd.grad(expected.sin().sum(), value)
        torch.testing.assert_close(grad, expected_grad)
    # What eager calls check before they run, the graph asserts before it reads beyond the value.
    for table in ([(3, 4), (6, 3)], [(3, 4), (-6, -2)], [(300, 4), (6, 2)]):
        with pytest.raises(RuntimeError, match=r"Runtime assertion failed"):
            compiled(torch.tensor(table), starts)
    if with_starts:
        for wrong in ([0, 13], [-1, 12]):
            with pytest.raises(RuntimeError, match=r"Runtime assertion failed"):
                compiled(torch.tensor([(3, 4), (6, 2)]), torch.tensor(wrong))


def test_export_reads_a_tensor_of_shapes():
    module = MSDeformAttn(d_model=24, n_levels=2, n_heads=3, n_points=2).eval()
    given = (torch.randn(1, 5, 24), torch.rand(1, 5, 1, 2), torch.randn(1, 24, 24))
    program = torch.export.export(module, (*given, torch.tensor([(3, 4), (6, 2)])))
    for table in ([(3, 4), (6, 2)], [(2, 6), (4, 3)]):
        got = program.module()(*given, torch.tensor(table))
        torch.testing.assert_close(got, module(*given, table))


def test_export_keeps_the_operator():
    module = MSDeformAttn(d_model=24, n_levels=1, n_heads=3, n_points=2).eval()
    arguments = (torch.randn(1, 5, 24), torch.rand(1, 5, 1, 2), torch.randn(1, 12, 24), [(3, 4)])
    program = torch.export.export(module, arguments)
    assert any(
        node.target is OPS.ms_deform_attn_from_offsets.default for node in program.graph.nodes
    ), program.graph
    torch.testing.assert_close(program.module()(*arguments), module(*arguments))


def test_what_export_makes_compiles():
    value, locations = torch.randn(1, 12, 3, 8), torch.rand(1, 5, 3, 1, 2, 2)
    weights = torch.rand(1, 5, 3, 1, 2)

    class Sampling(torch.nn.Module):
        def forward(self, *tensors):
            return ms_deform_attn(tensors[0], [(3, 4)], *tensors[1:])

    program = torch.export.export(Sampling(), (value, locations, weights))
    torch._dynamo.reset()
    compiled = torch.compile(program.module(), fullgraph=True, backend="aot_eager")
    expected = ms_deform_attn(value, [(3, 4)], locations, weights)
    torch.testing.assert_close(compiled(value, locations, weights), expected)


def test_cpu_autocast_to_bf16():
    module = MSDeformAttn(d_model=32, n_levels=1, n_heads=4)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    # 167 pixels wide: bf16 locations would be off by 0.1 pixels on average here.
    query, feature = torch.randn(1, 9, 32), torch.randn(1, 2 * 167, 32)
    reference = torch.rand(1, 9, 1, 2)
    expected = module(query, reference, feature, [(2, 167)])
    with torch.autocast("cpu", torch.bfloat16):
        got = module(query, reference, feature, [(2, 167)])
    assert got.dtype == torch.bfloat16
    # Four roundings to bf16 on the way: value, offsets, the operator's output, the projection.
    error = (got.float() - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(torch.bfloat16).eps
    got.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_gil_is_released_and_threads_agree(backend):
    from concurrent.futures import ThreadPoolExecutor

    device, name = backend
    inputs = cases.SMALL[3].inputs().to(torch.float32, device)

    def call(_):
        value, locations, weights = inputs.tensors
        return ms_deform_attn(value, inputs.spatial_shapes, locations, weights, backend=name)

    expected = call(0)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(call, range(64)):
            assert torch.equal(got, expected)


def backward_on_a_gpu(op="ms_deform_attn_triton", dtype=torch.float32):
    """The operator that the backward of `op` on a GPU calls; meta stands for one."""
    chosen = []

    def backward(ctx, needs, op, grads):
        chosen.append(op)
        return ()

    function = _ops.MS_DEFORM_ATTN._replace(backward=backward).function(op)
    with torch.enable_grad():  # no short way: the operator itself
        ctx = SimpleNamespace(needs_input_grad=(False,) * 6)
        function.backward(ctx, torch.empty(1, dtype=dtype, device="meta"))
    return str(chosen[0])


@pytest.mark.parametrize(
    ("op", "dtype", "kind"),
    [
        ("ms_deform_attn", torch.float32, "deterministic"),
        ("ms_deform_attn", torch.bfloat16, "deterministic"),
        ("ms_deform_attn", torch.float64, "reference"),
        ("ms_deform_attn_triton", torch.float32, "reference"),
    ],
)
def test_deterministic_mode_takes_a_backward_without_float_atomics_on_a_gpu(op, dtype, kind):
    assert f"{op}_backward" in backward_on_a_gpu(op, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        assert f"ms_deform_attn_{kind}_backward" in backward_on_a_gpu(op, dtype)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
def test_poisoned_memory_leaves_the_backward_to_the_kernels():
    assert torch.empty(3).isnan().all()
    assert "ms_deform_attn_triton_backward" in backward_on_a_gpu()


def test_a_call_of_a_known_kind_is_checked_as_the_first_one():
    inputs = cases.SMALL[3].inputs().to(torch.float32)
    value, locations, weights = inputs.tensors
    shapes = [(8, 12), (4, 6), (2, 3)]
    expected = ms_deform_attn(value, shapes, locations, weights)
    assert torch.equal(
        ms_deform_attn(value, [list(s) for s in shapes], locations, weights), expected
    )
    for bad in ([(8.0, 12), *shapes[1:]], [(8, 12, 4), (6,), (2, 3)], [{8, 12}, *shapes[1:]]):
        with pytest.raises(ValueError, match=r"spatial_shapes\[[01]\]: expected"):
            ms_deform_attn(value, bad, locations, weights)
    with pytest.raises(ValueError, match="integers, got True"):
        ms_deform_attn(value, shapes, locations, weights, level_start_index=[True, 96, 120])
