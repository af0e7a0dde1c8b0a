"""What a program's kernels move and compute, held to a program that was counted by hand."""

from __future__ import annotations

import pytest

from ptjax.planning.estimate import kernel_seconds
from ptjax.planning.kernels import Kernel, kernels, totals
from ptjax.planning.slices import parse_slice

# A loop of three turns over a stack [3, 8, 16] of bfloat16; a prefetch into VMEM, S(1); a Pallas
# call; an update in place; and a product that the TPU's compiler writes as a convolution.
PROGRAM = """HloModule jit_step

%all_reduce (p.7: bf16[3,8,16]) -> bf16[3,8,16] {
  %p.7 = bf16[3,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %sum = bf16[3,8,16]{2,1,0:T(8,128)(2,1)} all-reduce(%p.7), replica_groups={{0,1}}, to_apply=%add
}

%slice_of_copy (p.0: bf16[3,8,16]) -> bf16[3,8,16] {
  %p.0 = bf16[3,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.9 = bf16[3,8,16]{2,1,0} copy(%p.0)
}

%layer_product (p.1: bf16[4,8], p.2: bf16[3,8,16], p.3: s32[]) -> bf16[4,16] {
  %p.1 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[3,8,16]{2,1,0:T(8,128)(2,1)} parameter(1)
  %fusion.8 = bf16[3,8,16]{2,1,0} fusion(%p.2), kind=kLoop, calls=%slice_of_copy
  %p.3 = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  %one = bf16[1,8,16]{2,1,0} dynamic-slice(%fusion.8, %p.3, %zero.1, %zero.1)
  %kernel = bf16[8,16]{1,0} bitcast(%one)
  ROOT %product = bf16[4,16]{1,0} convolution(%p.1, %kernel), window={size=1}, dim_labels=0bf_io0->0bf
}

%write_back (p.4: f32[3,4], p.5: f32[1,4], p.6: s32[]) -> f32[3,4] {
  %p.4 = f32[3,4]{1,0} parameter(0)
  %p.5 = f32[1,4]{1,0} parameter(1)
  %p.6 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  ROOT %update = f32[3,4]{1,0} dynamic-update-slice(%p.4, %p.5, %p.6, %zero.2)
}

%condition (arg.1: (s32[], bf16[4,8], bf16[3,8,16], f32[3,4])) -> pred[] {
  %arg.1 = (s32[], bf16[4,8]{1,0}, bf16[3,8,16]{2,1,0}, f32[3,4]{1,0}) parameter(0)
  %limit = s32[] constant(3)
  %turn.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%turn.1, %limit), direction=LT
}

%body (arg.2: (s32[], bf16[4,8], bf16[3,8,16], f32[3,4])) -> (s32[], bf16[4,8], bf16[3,8,16], f32[3,4]) {
  %arg.2 = (s32[], bf16[4,8]{1,0}, bf16[3,8,16]{2,1,0}, f32[3,4]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%arg.2), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%arg.2), index=1
  %stack = bf16[3,8,16]{2,1,0} get-tuple-element(%arg.2), index=2
  %rows = f32[3,4]{1,0} get-tuple-element(%arg.2), index=3
  %layer = bf16[4,16]{1,0} fusion(%x, %stack, %turn), kind=kOutput, calls=%layer_product
  %pallas = f32[1,4]{1,0} custom-call(%layer), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUz","cost_estimate":{"flops":"1000","transcendentals":"0"}}}
  %written = f32[3,4]{1,0} fusion(%rows, %pallas, %turn), kind=kLoop, calls=%write_back
  ROOT %next = (s32[], bf16[4,8]{1,0}, bf16[3,8,16]{2,1,0}, f32[3,4]{1,0}) tuple(%turn, %x, %stack, %written)
}

ENTRY %main (x.0: bf16[4,8], stack.0: bf16[3,8,16], rows.0: f32[3,4], heads.0: bf16[2,4,8], more.0: bf16[2,4,8]) -> f32[3,4] {
  %x.0 = bf16[4,8]{1,0} parameter(0)
  %stack.0 = bf16[3,8,16]{2,1,0} parameter(1)
  %rows.0 = f32[3,4]{1,0} parameter(2)
  %heads.0 = bf16[2,4,8]{2,1,0} parameter(3)
  %more.0 = bf16[2,4,8]{2,1,0} parameter(4)
  %prefetch = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, bf16[4,8]{1,0}, u32[]{:S(2)}) copy-start(%x.0)
  %near = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} copy-done(%prefetch)
  %first = ((bf16[3,8,16]{2,1,0}), bf16[1,8,16]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) slice-start(%stack.0), slice={[0:1], [0:8], [0:16]}
  %second = ((bf16[3,8,16]{2,1,0}), bf16[1,8,16]{2,1,0}, s32[]) slice-start(%stack.0), slice={[1:2], [0:8], [0:16]}
  %summed = ((bf16[3,8,16]{2,1,0:T(8,128)(2,1)}, token[]), bf16[3,8,16]{2,1,0:T(8,128)(2,1)}) call-start(%stack.0, %prepared), async_execution_thread="sparsecore", to_apply=%all_reduce
  %negated = bf16[4,8]{1,0} negate(%near)
  %logits = f32[2,4,4]{2,1,0} convolution(%heads.0, %more.0), window={size=2 stride=1 lhs_dilate=2}, dim_labels=0bf_0oi->0bf
  %start = s32[] constant(0)
  %all = (s32[], bf16[4,8]{1,0}, bf16[3,8,16]{2,1,0}, f32[3,4]{1,0}) tuple(%start, %negated, %stack.0, %rows.0)
  %loop = (s32[], bf16[4,8]{1,0}, bf16[3,8,16]{2,1,0}, f32[3,4]{1,0}) while(%all), condition=%condition, body=%body
  ROOT %result = f32[3,4]{1,0} get-tuple-element(%loop), index=3
}
"""  # noqa: E501


def test_a_program_counted_by_hand() -> None:
    found = {kernel.name: kernel for kernel in kernels(PROGRAM)}
    x, layer, one_of_stack, row = 4 * 8 * 2, 4 * 16 * 2, 8 * 16 * 2, 4 * 4
    counter = 4
    assert found["%layer"] == (
        "%layer", 3, x + one_of_stack + counter + layer, {"bf16": 2 * 4 * 16 * 8}
    )  # fmt: skip
    assert found["%pallas"] == ("%pallas", 3, layer + row, {"bf16": 1000})
    assert found["%written"] == ("%written", 3, row + counter + row, {})
    assert found["%prefetch"] == ("%prefetch", 1, x, {})
    assert found["%first"] == ("%first", 1, one_of_stack, {})
    assert found["%second"] == ("%second", 1, 2 * one_of_stack, {})
    stack = 3 * one_of_stack
    assert found["%summed"] == ("%summed", 1, 2 * stack, {}) and "%sum" not in found
    assert found["%negated"] == ("%negated", 1, x, {})
    # Two products [4, 8] x [8, 4], one per head: the window's other positions hold no weights.
    heads, logits = 2 * 4 * 8 * 2, 2 * 4 * 4 * 4
    assert found["%logits"] == ("%logits", 1, 2 * heads + logits, {"bf16": 2 * 2 * 4 * 4 * 8})
    assert "%near" not in found and "%loop" not in found
    per_turn = sum(found[name].bytes for name in ("%layer", "%pallas", "%written"))
    in_condition = 4 + 4 + 1  # two counters and a bool; counted once
    assert totals(list(found.values())) == (
        3 * per_turn + in_condition + x + x + 3 * one_of_stack + 2 * stack + 2 * heads + logits,
        {"bf16": 3 * (2 * 4 * 16 * 8 + 1000) + 2 * 2 * 4 * 4 * 8},
    )


CUDNN = """ENTRY %main (x: bf16[2,6,3,8]) -> bf16[2,3,6,8] {
  %x = bf16[2,6,3,8]{3,2,1,0} parameter(0)
  %forward = (bf16[2,3,6,8]{3,1,2,0}, f32[2,3,6]{2,1,0}, u8[0]{0}) custom-call(%x, %x, %x), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "6", "6"]}}}
  %out = bf16[2,3,6,8]{3,1,2,0} get-tuple-element(%forward), index=0
  %backward = (bf16[2,3,6,8]{3,1,2,0}, bf16[2,3,6,8]{3,1,2,0}, bf16[2,3,6,8]{3,1,2,0}, u8[0]{0}) custom-call(%x, %x, %x, %out), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "6", "6"]}}}
  ROOT %result = bf16[2,3,6,8]{3,1,2,0} get-tuple-element(%backward), index=0
}
"""  # noqa: E501


def test_cudnns_attention_is_two_products_and_five_in_the_backward_pass() -> None:
    product, array, statistics = 2 * 2 * 3 * 6 * 6 * 8, 2 * 6 * 3 * 8 * 2, 2 * 3 * 6 * 4
    forward, backward = kernels(CUDNN)
    assert forward == ("%forward", 1, 4 * array + statistics, {"bf16": 2 * product})
    assert backward == ("%backward", 1, 7 * array, {"bf16": 5 * product})


def test_a_kernel_takes_the_longer_of_products_and_memory() -> None:
    slice_ = parse_slice("v5e-1")
    rate, memory = slice_.generation.flops, slice_.generation.memory_rate
    computes = Kernel("%a", 2, int(memory), {"bf16": int(3 * rate)})
    moves = Kernel("%b", 1, int(5 * memory), {"bf16": int(rate)})
    assert kernel_seconds([computes, moves], slice_) == pytest.approx(2 * 3 + 5)
    int8 = Kernel("%c", 1, 0, {"s8": int(2 * rate)})
    assert kernel_seconds([int8], slice_) == pytest.approx(1)
    assert kernel_seconds([int8], parse_slice("v4-8")) == pytest.approx(2 * rate / 275e12)
