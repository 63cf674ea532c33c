"""What is counted of several devices, and the page that tells it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import compiled, scale

pytestmark = pytest.mark.once

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (param_0: f32[8,64,32], param_1: f32[8,16,64]) -> f32[8,32,16] {
  %param_0 = f32[8,64,32]{2,1,0} parameter(0)
  %param_1 = f32[8,16,64]{2,1,0} parameter(1)
  ROOT %dot.1 = f32[8,32,16]{2,1,0} dot(%param_0, %param_1), lhs_batch_dims={0}, \
lhs_contracting_dims={1}, rhs_batch_dims={0}, rhs_contracting_dims={2}
}

%body (state: (s32[], f32[8,64,32])) -> (s32[], f32[8,64,32]) {
  %a = f32[8,64,32]{2,1,0} get-tuple-element(%state), index=1
  %b = f32[8,16,64]{2,1,0} all-gather(%c), dimensions={1}
  %d = f32[8,32,16]{2,1,0} fusion(%a, %b), kind=kLoop, calls=%fused
}

ENTRY %main (x: f32[8,64,32]) -> f32[8,32,16] {
  %x = f32[8,64,32]{2,1,0} parameter(0)
  %w = (s32[], f32[8,64,32]) while(%x), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %s = bf16[10]{0} all-reduce(%y), to_apply=%add
}

%add (p: f32[], q: f32[]) -> f32[] {
  %p = f32[] parameter(0)
}
"""


def test_products_and_what_is_sent_count_as_often_as_loops_turn():
    program = SimpleNamespace(
        as_text=lambda: PROGRAM.replace("\\\n", ""),
        memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=7),
    )
    found = compiled.work(program)
    assert found.operations == 5 * 2 * 8 * 64 * 32 * 16
    assert found.sent == {"all-gather": 5 * 4 * 8 * 64 * 16, "all-reduce": 20}
    assert found.times == {"all-gather": 5, "all-reduce": 1}
    assert found.memory == 7


def test_every_point_was_counted():
    kept = [
        scale.Point(*(x[name] for name in scale.Point._fields)) for x in scale.load()
    ]
    assert kept == scale.points()


def test_the_page_tells_what_was_counted():
    text = PAGE.read_text("utf-8")
    begin, end = scale.MARKS
    assert text.split(begin)[1].split(end)[0].strip() == scale.table(scale.load())


def test_laws_are_those_of_points_that_follow_them():
    kept = [
        {
            **point._asdict(),
            "operations": 3 * point.length**2 / point.devices,
            "sent": 5 * point.length * (point.devices - 1) / point.devices,
            "memory": 100 + 7 * point.length / point.devices,
        }
        for point in scale.points()
    ]
    for devices, found in scale.plan(kept).items():
        assert found["operations"] == pytest.approx(3 * scale.LONG**2 / devices)
        share = scale.LONG * (devices - 1) / devices
        assert found["sent"] == pytest.approx(5 * share, rel=1e-5)
        assert found["memory"] == pytest.approx(100 + 7 * scale.LONG / devices)
        assert found["memory error"] == pytest.approx(0, abs=1e-6)
