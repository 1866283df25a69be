"""The interpreter of PTX that the tests of the kernels use calculates as a GPU, and refuses what a GPU must not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import ptx_machine
from support.ptx_machine import Buffer, Kernel, PtxError


def kernel(body: str) -> Kernel:
    """A kernel with an output, a number, and 16 words of shared memory."""
    return Kernel(
        """
        .version 9.0
        .target sm_90
        .address_size 64
        .visible .shared .align 16 .b8 tile[512];
        .visible .entry test( .param .u64 output, .param .u64 number ) .maxntid 64, 1, 1
        {
        .reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<9>; .reg .f64 %fd<9>;
        ld.param.u64 %rd0, [output];
        mov.u32 %r0, %tid.x;
        mul.wide.u32 %rd1, %r0, 8;
        add.s64 %rd2, %rd0, %rd1; // this thread's place in the output
        mov.u64 %rd3, tile;
        add.s64 %rd4, %rd3, %rd1; // and in the tile
        """
        + body
        + "ret; }"
    )


def run(body: str, number: int = 0, threads: int = 64) -> Any:
    """The output, eight bytes for each thread, after the body has run."""
    output = torch.zeros(threads, dtype=torch.int64)
    buffer = Buffer(ptx_machine.address(0, output), ptx_machine.flat(output))
    parameters = buffer.base.to_bytes(8, "little") + number.to_bytes(8, "little")
    kernel(body).run([0], 1, threads, parameters, [buffer])
    return output


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ("mov.u32 %r1, 2147483647; add.s32 %r1, %r1, 1; cvt.s64.s32 %rd5, %r1;", -(2**31)),
        ("mov.u32 %r1, -3; mul.wide.s32 %rd5, %r1, 5;", -15),
        ("mov.u32 %r1, -3; mul.wide.u32 %rd5, %r1, 5;", 5 * (2**32 - 3)),
        ("mov.u64 %rd6, 4611686018427387909; mul.lo.s64 %rd5, %rd6, 7;", (4611686018427387909 * 7) - 2**64 * 2 + 2**64),
        ("mov.u64 %rd6, -4; mul.hi.u64 %rd5, %rd6, 3;", 2),
        ("mov.u64 %rd6, -4; mul.hi.s64 %rd5, %rd6, 3;", -1),
        ("mov.u64 %rd6, -4; mad.lo.s64 %rd5, %rd6, 3, 20;", 8),
        ("mov.u64 %rd6, -7; div.s64 %rd5, %rd6, 2;", -3),
        ("mov.u64 %rd6, -7; rem.s64 %rd5, %rd6, 2;", -1),
        ("mov.u64 %rd6, -7; div.u64 %rd5, %rd6, 2;", (2**64 - 7) // 2),
        ("mov.u64 %rd6, -8; shr.s64 %rd5, %rd6, 70;", -1),
        ("mov.u64 %rd6, -8; shr.u64 %rd5, %rd6, 1;", 2**63 - 4),
        ("mov.u64 %rd6, 1; shl.b64 %rd5, %rd6, 64;", 0),
        ("mov.u64 %rd6, -8; max.s64 %rd5, %rd6, 3;", 3),
        ("mov.u64 %rd6, -8; neg.s64 %rd5, %rd6;", 8),
        ("mov.u64 %rd6, 1099511627781; cvt.u32.u64 %r1, %rd6; cvt.u64.u32 %rd5, %r1;", 5),
        ("mov.u64 %rd6, -1; setp.lt.s64 %p1, %rd6, 1; selp.b64 %rd5, 2, 3, %p1;", 2),
        ("mov.u64 %rd6, -1; setp.lt.u64 %p1, %rd6, 1; selp.b64 %rd5, 2, 3, %p1;", 3),
        ("mov.f32 %f1, 0f7FC00000; setp.ne.f32 %p1, %f1, %f1; selp.b64 %rd5, 2, 3, %p1;", 3),
        ("mov.f32 %f1, 0f7FC00000; setp.neu.f32 %p1, %f1, %f1; selp.b64 %rd5, 2, 3, %p1;", 2),
        ("mov.u64 %rd5, 1; setp.eq.s64 %p1, %rd5, 1; @!%p1 mov.u64 %rd5, 2;", 1),
        (
            "mov.f32 %f1, 0f3F800800; fma.rn.f32 %f2, %f1, %f1, 0fBF801000; mov.b32 %r1, %f2; cvt.u64.u32 %rd5, %r1;",
            0x33800000,
        ),
        ("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, 0x20001; mov.b32 %r1, {hi, lo}; } cvt.u64.u32 %rd5, %r1;", 0x10002),
        (
            "mov.f32 %f1, 0f3F818000; cvt.rn.bf16.f32 %rs1, %f1; mov.b32 %r1, {%rs1, %rs1}; cvt.u64.u32 %rd5, %r1;",
            0x3F823F82,
        ),
        (
            "mov.f32 %f1, 0f477FF000; cvt.rn.f16.f32 %rs1, %f1; mov.b32 %r1, {%rs1, %rs1}; cvt.u64.u32 %rd5, %r1;",
            0x7C007C00,
        ),
        ("ld.param.u32 %rd5, [number+4];", 7),
    ],
)
def test_machine_calculates_as_a_gpu(instructions: str, expected: int) -> None:
    made = run(instructions + "st.global.u64 [%rd2], %rd5;", number=7 << 32)
    wrapped = (expected + 2**63) % 2**64 - 2**63
    assert made.tolist() == [wrapped] * 64


def test_machine_runs_threads_that_part_and_meet_again() -> None:
    body = """
        mov.u64 %rd5, 0;
        and.b32 %r1, %r0, 3;
        setp.eq.s32 %p1, %r1, 0;
        @%p1 bra $store;
        $again: add.s64 %rd5, %rd5, 10; add.s32 %r1, %r1, -1; setp.gt.s32 %p1, %r1, 0; @%p1 bra $again;
        $store: st.shared.u64 [%rd4], %rd5;
        bar.sync 0;
        xor.b32 %r2, %r0, 63; mul.wide.u32 %rd6, %r2, 8; add.s64 %rd6, %rd3, %rd6; // the last thread's for the first
        ld.shared.u64 %rd7, [%rd6];
        st.global.u64 [%rd2], %rd7;
    """
    assert run(body).tolist() == [10 * (thread % 4) for thread in reversed(range(64))]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("st.global.u64 [%rd2+8], %rd1;", "element 64 of a tensor of 64"),
        ("st.global.u64 [%rd0+-8], %rd1;", "element -1 of a tensor|in no tensor"),
        ("st.global.u64 [%rd2+4], %rd1;", "misaligned"),
        ("ld.global.nc.v2.u64 {%rd5, %rd6}, [%rd2];", "misaligned"),
        ("ld.global.nc.u32 %r1, [%rd2];", "part of an element"),
        ("st.global.u64 [%rd0], %rd1;", "write element 0 twice"),
        ("ld.global.nc.u64 %rd5, [%rd2]; st.global.u64 [%rd2], %rd5;", "the same kernel reads"),
        ("st.shared.u64 [%rd4+8], %rd1;", "byte 512 of a shared array of 512"),
        ("st.shared.v2.u64 [%rd4], {%rd1, %rd1};", "misaligned"),
        ("st.shared.u64 [%rd3], %rd1;", "two threads write one place"),
        ("st.shared.u64 [%rd4], %rd1; ld.shared.u64 %rd5, [%rd3];", "thread 1 reads what thread 0 writes"),
        ("st.shared.u64 [%rd4], %rd1; bar.warp.sync 0xffffffff; ld.shared.u64 %rd5, [%rd3];", "thread 32 reads"),
        ("ld.shared.u64 %rd5, [%rd3]; st.shared.u64 [%rd4], %rd1;", "thread 0 writes what thread 1 touches"),
        ("setp.eq.s32 %p1, %r0, 0; @%p1 bra $end; bar.sync 0; $end:", "not all threads come"),
        ("setp.eq.s32 %p1, %r0, 0; @%p1 mov.u32 %r1, 1; mov.u32 %r2, %r1;", "before it is written"),
        ("mov.u64 %rd5, 0; div.s64 %rd6, %rd1, %rd5;", "divides by zero"),
        ("add.rz.f32 %f1, %f1, %f1;", "does not know the instruction"),
        ("atom.global.add.f32 %f1, [%rd2], %f1;", "does not know the instruction"),
        ("mov.u64 %rd5, somewhere;", "cannot take somewhere"),
        ("add.s32 %r1, %f1, 1;", "a register of type f32 taken as s32"),
        ("add.s32 %rd5, %r0, 1;", "a result of type s32 for a register of type b64"),
    ],
)
def test_machine_refuses(body: str, error: str) -> None:
    with pytest.raises(PtxError, match=error):
        run(body)


def test_barriers_make_sharing_right() -> None:
    within = "st.shared.u64 [%rd4], %rd1; bar.warp.sync 0xffffffff; and.b32 %r1, %r0, 32; mul.wide.u32 %rd5, %r1, 8;"
    read = "add.s64 %rd5, %rd3, %rd5; ld.shared.u64 %rd6, [%rd5]; st.global.u64 [%rd2], %rd6;"
    assert run(within + read).tolist() == [0] * 32 + [256] * 32
    across = "st.shared.u64 [%rd4], %rd1; bar.sync 0; mov.u64 %rd5, 8;"
    assert run(across + read + "bar.sync 0; st.shared.u64 [%rd4], %rd1;").tolist() == [8] * 64
