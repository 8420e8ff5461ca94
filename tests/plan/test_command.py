"""`python -m swift.plan`: every model under every parallel= plans; what fits, what would; mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swift.plan.__main__ import main, plan_of
from swift.plan.devices import GIB, load_site
from swift.plan.memory import memory
from swift.plan.planning import available_bytes
from swift.plan.sizes import count_parameters
from swift.plan.text import as_json

CONF = Path(__file__).resolve().parents[2] / "conf"
QUICK = ("tiny", "v1", "806m", "14b5")
STRATEGIES = sorted(path.stem for path in (CONF / "parallel").glob("[!_]*.yaml"))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in sorted((CONF / "model").glob("*.yaml"))
    ],
)
def test_every_model_under_every_strategy(model: str) -> None:
    """Composes, builds on the meta device and plans; sharding more never needs more of its states."""
    totals = {}
    for strategy in STRATEGIES:
        # The states of the largest model alone are more than 4 nodes hold.
        nodes = [] if strategy == "single" else ["nodes=64" if model == "130b" else "nodes=4"]
        plan = plan_of([f"model={model}", f"parallel={strategy}", "site=frontier", *nodes])
        found = as_json(plan)
        json.dumps(found)
        assert found["parameters"]["total"] == sum(v for k, v in found["parameters"].items() if k != "total")
        assert found["fits"] == (found["memory"]["none"]["total"] <= found["available"])
        assert found["step"]["mfu"] > 0
        states = plan.chosen.memory
        totals[strategy] = states.weights + states.optimizer
        assert found["fits"] or found["suggestions"] or strategy in ("single", "ddp")
    assert totals["ddp"] > totals["zero1"] == totals["zero2"] > totals["zero3"] > totals["zero3_offload"]


def test_parameters_agree_with_the_table() -> None:
    """The table comes from models, the plan's parts must add up to the same."""
    row = count_parameters("14b5", "factorized")
    parts = plan_of(["model=14b5", "parallel=zero1", "site=frontier"]).geometry.parameters
    encoder = sum(number for name, number in parts.items() if name not in ("decoder", "mask token, positions"))
    assert encoder == row["encoder"] == 14_460_934_656
    assert parts["decoder"] == row["decoder_local"]


def test_14b5_on_64_frontier_nodes() -> None:
    """Fits under ZeRO 1 in bf16 with checkpointing, up to micro-batch 3; without, one clip a device just fits."""
    command = ["model=14b5", "parallel=zero1", "nodes=64", "site=frontier"]
    options = plan_of(command).options
    assert {kind: (judged.fits, judged.largest) for kind, judged in options.items()} == {
        "none": (True, 1),
        "selective": (True, 2),
        "block": (True, 3),
    }
    plan = plan_of([*command, "parallel.activation_checkpointing=block"])
    assert plan.sharding.ranks == 512
    assert plan.sharding.bf16
    assert plan.chosen.fits
    assert plan.chosen.largest == 3
    assert 35 * GIB < plan.chosen.memory.total < 45 * GIB
    assert plan.chosen.memory.weights == 2 * plan.geometry.total_parameters
    assert plan.suggestions == []
    more = memory(plan.geometry, plan.sharding, plan.chosen.largest + 1).total
    assert plan.chosen.memory.total < available_bytes(plan.site) < more
    assert not plan_of([*command[:2], "site=frontier", "nodes=1"]).chosen.fits


def test_what_would_make_it_fit_does() -> None:
    plan = plan_of(["model=14b5", "parallel=zero1", "nodes=64", "site=frontier", "parallel.reduce_bucket_mb=100"])
    assert not plan.chosen.fits
    assert len(plan.suggestions) >= 3
    for suggestion in plan.suggestions:
        changes, _, most = suggestion.partition(" (micro-batch up to ")
        again = plan_of(["model=14b5", "parallel=zero1", "nodes=64", "site=frontier", *changes.split()])
        assert again.chosen.fits
        assert again.chosen.largest == int(most.rstrip(")"))


def test_time_and_hours_of_a_run() -> None:
    plan = plan_of(["model=806m", "parallel=ddp", "site=h100", "nodes=2", "micro_batch=4", "clips=3.6e6"])
    time = plan.time
    assert time is not None
    assert plan.global_batch == 64 == time.clips
    assert time.node_hours(plan.clips, plan.nodes) == pytest.approx(3.6e6 / time.clips_per_second * 2 / 3600)
    assert time.seconds == time.compute + time.exposed + time.optimizer
    assert 0 <= time.exposed <= time.communication
    flops = as_json(plan)["flops_per_step"]
    assert time.mfu == pytest.approx(flops / time.seconds / 16 / 989.4e12)
    assert 0.1 < time.mfu <= load_site("h100").matmul_fraction


def test_a_launcher_brings_its_nodes_and_its_site() -> None:
    plan = plan_of(["model=3b", "parallel=zero1", "+launcher=frontier"])
    assert (plan.site.name, plan.nodes, plan.sharding.ranks) == ("frontier", 16, 128)


def test_data_can_be_named() -> None:
    assert plan_of(["model=tiny"]).geometry.volume == (96, 96, 96, 20)
    assert plan_of(["model=tiny", "data=sample"]).geometry.volume == (48, 48, 48, 20)
    assert plan_of(["model=tiny", "data.frames=40"]).geometry.volume == (96, 96, 96, 40)


def test_text_says_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    main(["model=14b5", "parallel=zero1", "nodes=64", "site=frontier", "parallel.reduce_bucket_mb=100"])
    text = capsys.readouterr().out
    for expected in (
        "14,463,960,024",
        "512 ranks",
        "DOES NOT FIT: micro-batch 1 needs",
        "would fit: parallel=zero2",
        "Assumed, not measured:",
        "MFU",
        "node-hours for 1,000,000 clips",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) < 150


def test_no_mfu_on_an_unknown_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift.utils.device.count", lambda: 0)
    main(["model=tiny", "site=local"])
    text = capsys.readouterr().out
    assert "no step time and no MFU: the peak of CPU is not known" in text
    assert "clips/s" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=tiny", "nodes=0"], "nodes=0: must be a whole number, at least 1"),
        (["model=tiny", "nodes=many"], "nodes=many: must be a whole number, at least 1"),
        (["model=tiny", "clips=nan"], "clips=nan: must be a number, at least 1"),
        (["model=tiny", "micro_batch=1.5"], "micro_batch=1.5: must be a whole number"),
        (["model=tiny", "site=moon"], "site=moon: no such machine; known are aurora, frontier"),
        (["model=tiny", "parallel=single", "nodes=2", "site=frontier"], "nodes=2: parallel=single has one device"),
        (["model=tiny", "parallel=zero1", "nodes=9000000", "site=frontier"], "ranks are more than the"),
        (["tiny"], "tiny: settings are KEY=VALUE"),
        (["model=huge"], "model=huge: no such choice"),
        (["model=tiny", "model.wings=2"], "wings"),
        (["model=tiny", "model.embed_dim=25"], "model.num_heads"),
        (["model=tiny", "data.grid=[6,6,6]"], "down to one token"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
