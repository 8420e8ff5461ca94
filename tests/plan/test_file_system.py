"""What a run asks of the file system: by hand, on four running ranks, and what failures leave by simulation."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift.config.compose import typed
from swift.config.schema import Config
from swift.data.store.reader import Store
from swift.parallel.checkpoint import files as checkpoint
from swift.plan.__main__ import plan_of
from swift.plan.devices import Site, load_site
from swift.plan.file_system import (
    HEARTBEAT_SECONDS,
    RESUME_OPENS,
    Scans,
    clip_bytes,
    demand,
    goodput,
    kept_share,
    log_writes,
    scans_of,
    table_bytes,
    times_a_second,
)
from swift.plan.geometry import usual_brain
from swift.plan.planning import Plan
from swift.plan.text import as_json, plan_text
from tests.distributed.ranks import run
from tests.plan.file_counts import SECONDS, count
from tests.small import command, composed, settings, small_store


@pytest.fixture(scope="module")
def large() -> Plan:
    return plan_of(
        ["model=14b5", "parallel=zero1", "parallel.activation_checkpointing=block", "nodes=64", "site=frontier"]
    )


def elsewhere(plan: Plan, site: Site, cfg: Config | None = None) -> Plan:
    """The plan for another file system, other failures or other data."""
    cfg, total = cfg or plan.cfg, plan.geometry.total_parameters
    files = demand(cfg, site, plan.nodes, plan.sharding, total, plan.micro_batch, plan.time)
    left = goodput(cfg, site, plan.sharding, total, plan.time, files.checkpoint_seconds)
    return replace(plan, cfg=cfg, site=site, files=files, goodput=left)


def test_bytes_and_files_by_hand(large: Plan) -> None:
    files, voxels = large.files, int(usual_brain((96, 96, 96)).sum())
    # int16 codes and checksums of 20 frames; a mask of the box, and scale, offset, mean and deviation of every voxel.
    clip = 2 * voxels * 20 + 8 * 20 + 96**3 + 16 * voxels
    assert large.time is not None
    assert (files.clip, files.input) == (clip, clip * large.time.clips_per_second)
    assert files.nodes == int(64 * 4600e9 / files.input)
    assert files.checkpoint_files == 513
    assert files.checkpoint_bytes == 12 * 14_463_960_024
    assert files.checkpoint_seconds == pytest.approx(12 * 14.46 / 4600, rel=1e-3)
    # Two workers with two clips asked ahead, the step's own and one more; store.json and manifest.csv.
    assert files.opens == 2 + 2 * 6
    assert as_json(large)["files"]["input"] == files.input
    assert as_json(large)["files"]["scans"] is None


def test_a_run_that_reads_too_fast_is_told(large: Plan) -> None:
    assert large.files.input is not None
    told = plan_text(elsewhere(large, replace(large.site, filesystem=large.files.input / 4)))
    assert "MORE than the file system's" in told
    assert "which serve 16 such nodes" in told
    assert "MORE" not in plan_text(large)
    staged = replace(large.cfg, data=replace(large.cfg.data, stage_dir="/mnt/bb"))
    assert elsewhere(large, large.site, staged).files.input == 0


def test_what_a_site_does_not_say_is_not_made_up(large: Plan) -> None:
    assert load_site("h100").filesystem is None
    plan = elsewhere(large, replace(large.site, filesystem=None, failure_hours=None))
    assert (plan.files.nodes, plan.files.checkpoint_seconds, plan.goodput) == (None, None, None)
    assert "no limit known: the site names no filesystem_gb_s" in plan_text(plan)
    assert "goodput: not known (the site names no failure_hours)" in plan_text(plan)


def test_scans_of_a_store(tmp_path: Path) -> None:
    store = small_store(tmp_path / "store")
    cfg = typed(composed(*command(store, tmp_path / "run")))
    scans = scans_of(cfg)
    voxels = [scan.voxels for scan in Store(store).scans]
    assert scans == Scans(sum(voxels) / 2, 48, 1, 2)
    # Two scans' tables are kept; of 100 scans with tables of 64 MiB four are.
    assert clip_bytes(cfg, scans) == 2 * 8 * scans.voxels + 8 * 48
    wide = Scans((64 << 20) / 12, 48, 100, 100)
    codes = 2 * 8 * wide.voxels + 8 * 48
    assert clip_bytes(cfg, wide) == pytest.approx(codes + 0.96 * (12**3 + 16 * wide.voxels))


def test_signs_of_life_by_a_clock() -> None:
    for seconds, expected in ((0.01, 1 / 2), (0.7, 1 / 2.1), (2.0, 1 / 2), (36.5, 1 / 36.5)):
        assert times_a_second(HEARTBEAT_SECONDS, seconds) == pytest.approx(expected)


def simulated(every: float, stall: float, between: float, restart: float) -> float:
    """Part of the time that is training, by failing at random 100,000 times."""
    draw = np.random.default_rng(0).exponential
    spent, done = 0.0, 0
    need = every + stall
    while done < 20_000:
        lasts = draw(between)
        saves = int(lasts // need)
        done += saves
        spent += lasts
        while (lasts := draw(between)) < restart:
            spent += lasts
        # What comes after the restart is a fresh stretch: failures have no memory.
        spent += restart
    return done * every / spent


@pytest.mark.parametrize("case", [(600.0, 5.0, 11_000.0, 120.0), (3_600.0, 60.0, 5_000.0, 600.0)])
def test_goodput_by_simulation(case: tuple[float, float, float, float]) -> None:
    assert kept_share(*case) == pytest.approx(simulated(*case), rel=0.02)


def test_no_other_interval_is_much_better_than_youngs(large: Plan) -> None:
    found, time = large.goodput, large.time
    assert found is not None
    assert time is not None
    # Llama 3's rate: every 99 h on 512 devices.
    assert found.between == pytest.approx(99.2 * 3600, rel=1e-3)
    assert found.stall == pytest.approx(12 * 14_463_960_024 / 512 / 36e9)
    assert found.every == 50
    shares = [kept_share(n * time.seconds, found.stall, found.between, 120) for n in range(1, 400)]
    assert max(shares) - 1e-4 < found.best_share <= max(shares)
    assert found.share == shares[49]
    assert math.isclose(kept_share(1.0, 0.0, 1e12, 0.0), 1.0, rel_tol=1e-9)
    waiting = replace(large.cfg, trainer=replace(large.cfg.trainer, checkpoint_background=False))
    slower = elsewhere(large, large.site, waiting).goodput
    assert slower is not None
    assert slower.stall == pytest.approx(found.stall + 12 * 14_463_960_024 / 4600e9)


@pytest.mark.slow
def test_four_ranks_open_read_and_write_what_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift.utils.device.count", lambda: 0)
    store, run_dir = small_store(tmp_path / "store"), tmp_path / "run"
    overrides = ["parallel=zero1", "data.batch_size=1", "trainer.val_every=4"]
    cfg = settings(*overrides)
    plan = plan_of([*command(store, run_dir, *overrides), "site=local", "nodes=4"])
    planned, beats = plan.files, times_a_second(HEARTBEAT_SECONDS, SECONDS)

    def times(opened: dict[tuple[str, str], int], *parts: str) -> int:
        return sum(number for (name, mode), number in opened.items() if all(p in f"{name} {mode}" for p in parts))

    seen = run(count, 4, tmp_path, store, run_dir, overrides, 4)
    for rank, one in enumerate(seen):
        assert times(one["first"], "store/") == planned.opens == 4
        # The tables of two scans are made once for training and once for validation.
        assert one["tables"] <= 4
        expected = one["clips"] * planned.clip + one["tables"] * table_bytes(plan.cfg, planned.scans)
        assert one["read"] == pytest.approx(expected, rel=0.03)
        assert times(one["opened"], "heartbeats/", ".partial") == (
            0 if rank else beats * 4 * SECONDS + 2  # one at the start and one at the end
        )
        # The line that opens TensorBoard's session is no value.
        logged = one["opened"].get(("run/metrics.jsonl", "a"), 0) + times(one["opened"], "events.out", " a")
        assert logged == (0 if rank else pytest.approx(4 * SECONDS * log_writes(cfg, True, SECONDS) + 1))
    saved = run_dir / "checkpoints" / "step-0000004"
    assert len(list(saved.iterdir())) == planned.checkpoint_files == 5
    ranges = checkpoint.Manifest.read(saved).ranges.values()
    assert sum(4 * (stop - start) for parts in ranges for start, stop in parts.values()) == planned.checkpoint_bytes

    resumed: list[dict[str, Any]] = run(count, 4, tmp_path, store, run_dir, overrides, 6)
    for one in resumed[1:]:
        assert times(one["first"], "store/") == planned.opens
        assert times(one["first"], "checkpoints/step-") == RESUME_OPENS
    assert times(resumed[0]["opened"], "heartbeats/", ".partial") == beats * 2 * SECONDS + 2
