"""Traffic and time of groups of ranks (hsdp) against sums done by hand and against the strategies at its ends."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from swift.plan.__main__ import plan_of
from swift.plan.devices import load_site
from swift.plan.geometry import build_geometry
from swift.plan.memory import Sharding, memory
from swift.plan.planning import available_bytes, faster_group
from swift.plan.step_time import across_seconds, exposed_units, step_time, traffic
from swift.utils.errors import UserError
from tests.models.cases import config

GEOMETRY = build_geometry(config("factorized", "divisible"), (8, 8, 8, 4))
P = GEOMETRY.total_parameters
BLOCKS = sum(len(stage.blocks) for stage in GEOMETRY.stages)
FSDP = Sharding("fsdp", 64, True, "none", 1, 1e9, 1e9, True, 0, False, False, "l1")
HSDP = replace(FSDP, strategy="hsdp", group=8)
FRONTIER = load_site("frontier")


def test_bytes_inside_and_between_groups() -> None:
    sent = traffic(GEOMETRY, HSDP)
    # bf16 weights gathered for both passes, fp32 gradients reduced, over the 7 others of a group.
    assert sent.weights == pytest.approx(7 / 8 * 2 * 2 * P)
    assert sent.gradients == pytest.approx(7 / 8 * 4 * P)
    # A ring over the 8 groups, twice round, with an eighth of the gradients.
    assert sent.across == pytest.approx(2 * 7 / 8 * 4 * P / 8)
    assert sent.network == sent.weights + sent.gradients + sent.across
    assert traffic(GEOMETRY, replace(HSDP, accumulate=3)).across == pytest.approx(3 * sent.across)


def test_one_group_is_fsdp() -> None:
    one = replace(HSDP, group=64)
    assert traffic(GEOMETRY, one) == traffic(GEOMETRY, FSDP)
    assert step_time(GEOMETRY, one, FRONTIER, 2) == step_time(GEOMETRY, FSDP, FRONTIER, 2)


def test_a_second_copy_is_gathered_inside_its_group() -> None:
    """ZeRO 3 with groups (hpZ): one pass gathers from all ranks, every other one from a group, faster in a node."""
    zero3 = replace(FSDP, strategy="zero3", zero_stage=3)
    # 38 billion parameters: more than DeepSpeed keeps gathered.
    kept, total = 1_000_000_000, GEOMETRY.total_parameters * 1_000_000
    large = replace(GEOMETRY, parameters={"all": total})
    for accumulate in (1, 3):
        plain = traffic(large, replace(zero3, accumulate=accumulate))
        sent = traffic(large, replace(zero3, accumulate=accumulate, group=8))
        assert plain.weights == pytest.approx(accumulate * 63 / 64 * 2 * (2 * total - kept))
        assert sent.inside == pytest.approx(7 / 8 * 2 * (accumulate * (2 * total - kept) - total))
        assert sent.weights - sent.inside == pytest.approx(63 / 64 * 2 * total)
        assert (sent.gradients, sent.across) == (plain.gradients, 0)
    fast = replace(FRONTIER, link=4 * FRONTIER.node_link)
    before = step_time(large, zero3, fast, 1)
    after = step_time(large, replace(zero3, group=8), fast, 1)
    assert before is not None
    assert after is not None
    slow_bytes = 63 / 64 * 2 * (total - kept)
    fast_bytes = 7 / 8 * 2 * (total - kept)
    saved = slow_bytes / (fast.node_link * 0.6) - fast_bytes / (fast.link * 0.6)
    assert before.communication - after.communication == pytest.approx(saved)


@pytest.mark.parametrize(
    ("group", "rate"),
    # Eight rings of a node share 100 GB/s; two rings have a link each, of 50; those of a group over nodes share too.
    [(8, 100e9 / 8), (2, 50e9), (4, 100e9 / 4), (16, 100e9 / 8)],
)
def test_rings_of_a_node_share_its_network(group: int, rate: float) -> None:
    sharding = replace(HSDP, group=group)
    sent, groups = traffic(GEOMETRY, sharding), 64 // group
    expected = sent.across / (rate * 0.6) + BLOCKS * 25e-6 * math.log2(groups)
    assert across_seconds(sent, sharding, FRONTIER) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shared", "expected"),
    # Forward: 3 s of gathers behind 2 s. Backward: 3 + 4 inside, 5 between, 6 of arithmetic.
    [(False, 1 + (7 - 6)), (True, 1 + (12 - 6))],
)
def test_what_goes_between_groups_runs_beside_what_goes_inside(shared: bool, expected: float) -> None:
    assert exposed_units(2.0, 6.0, 6.0, 4.0, 5.0, shared) == pytest.approx(expected)
    assert exposed_units(20.0, 60.0, 6.0, 4.0, 5.0, shared) == 0


def test_a_smaller_group_that_fits_and_is_faster_is_named() -> None:
    """4b1 with one clip a device on 2,048 nodes: groups of two are proposed, and are as fast as said."""
    words = ["model=4b1", "parallel=hsdp", "nodes=2048", "site=frontier", "parallel.activation_checkpointing=block"]
    plan = plan_of(words)
    assert plan.chosen.fits
    assert plan.time is not None
    changed = replace(plan.sharding, group=2)
    again = step_time(plan.geometry, changed, plan.site, 1)
    assert again is not None
    assert again.seconds < 0.95 * plan.time.seconds
    assert plan.faster == f"parallel.group=2 ({again.seconds:.3f} s, {again.clips_per_second:,.1f} clips/s)"
    assert memory(plan.geometry, changed, 1).total < available_bytes(plan.site)
    # One rank a group would not fit; four are slower than two; with much to compute nothing is proposed.
    assert memory(plan.geometry, replace(changed, group=1), 1).total > available_bytes(plan.site)
    four = step_time(plan.geometry, replace(changed, group=4), plan.site, 1)
    assert four is not None
    assert again.seconds < four.seconds < plan.time.seconds
    assert faster_group(plan.geometry, plan.sharding, plan.site, 4) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.group=3"], "parallel.group=3: must divide the 16 ranks of the run"),
        (["parallel.group=32"], "parallel.group=32: the run has 16 ranks; a group can be no larger"),
        (["parallel.group=-1"], "parallel.group=-1: must not be negative (0: the ranks of a node)"),
        (["parallel=zero3", "parallel.group=3"], "parallel.group=3: must divide the 16 ranks of the run"),
        (["parallel=zero3", "parallel.group=32"], "parallel.group=32: the run has 16 ranks; a group can be no larger"),
        (["parallel=fsdp", "parallel.group=2"], "parallel.group=2: only parallel=hsdp and zero3 have groups"),
        (["parallel=zero1", "parallel.unit_mb=2"], "parallel.unit_mb=2.0: only parallel=fsdp and hsdp gather by unit"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(["model=tiny", "parallel=hsdp", "nodes=2", "site=frontier", *words])
    assert str(caught.value) == message


@pytest.mark.slow
@pytest.mark.parametrize(("site", "group"), [("frontier", 64), ("aurora", 96)])
def test_what_130b_needs_on_2048_nodes(site: str, group: int) -> None:
    """One node's group is too small; what the plan suggests fits, by groups of eight nodes, and by layers."""
    words = ["model=130b", "parallel=hsdp", "nodes=2048", f"site={site}"]
    plan = plan_of(words)
    assert not plan.chosen.fits
    assert abs(plan.geometry.parameters["stage 3"] / 130e9 - 1) < 0.15
    (suggestion,) = plan.suggestions
    changes = suggestion.partition(" (")[0]
    assert changes.startswith(f"parallel.group={group} parallel.activation_checkpointing=block parallel.unit_mb=")
    again = plan_of([*words, *changes.split()])
    assert again.chosen.fits
    assert again.chosen.memory.total < 64e9
    assert memory(again.geometry, replace(again.sharding, unit=math.inf), 1).total > available_bytes(again.site)
