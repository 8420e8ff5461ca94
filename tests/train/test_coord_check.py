"""The coordinate check: its figures against closed forms, its failures, and one small run of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from swift.models.attention import WindowAttention
from swift.train import coord_check
from swift.train.coord_check import (
    Plan,
    Result,
    find_failures,
    logits_size,
    measure,
    one_batch,
    report,
    settings,
    slope,
)
from tests.scripts import load

command = load("mu_transfer/coord_check.py")

SMALL = Plan(widths=(16, 128), steps=3, seeds=1, depths=(1, 1), clips=1, lr=0.02)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small() -> Result:
    return coord_check.run(SMALL, lambda line: None)


def test_slope_of_power_laws() -> None:
    widths = (16, 32, 128)
    sizes = np.array([[3 * width**0.5, 0.1 * width**-1, 7.0] for width in widths])
    assert slope(widths, sizes) == pytest.approx([0.5, -1.0, 0.0])


@pytest.mark.parametrize(("scale", "factor"), [(None, 4**-0.5), (0.3, 0.3)])
def test_scores_are_measured_as_softmax_sees_them(scale: float | None, factor: float) -> None:
    layer = WindowAttention(8, 2, (0, 0, 0, 0), False, None, 0.0, 0.0, scale).double()
    torch.nn.init.normal_(layer.qkv.weight)
    x = torch.randn(2, 2, 1, 1, 3, 8, dtype=torch.float64)
    rows = []
    for sample in layer.qkv(x).detach().reshape(2, 6, 3, 2, 4).unbind(0):
        for head in range(2):
            q, k = sample[:, 0, head].numpy(), sample[:, 1, head].numpy()
            scores = np.array([[q[i] @ k[j] * factor for j in range(6)] for i in range(6)])
            rows.append(scores - scores.mean(1, keepdims=True))
    with torch.no_grad():
        assert logits_size(layer, x) == pytest.approx(np.sqrt(np.mean(np.square(rows))))


def test_sizes_before_training_are_those_of_the_fresh_model() -> None:
    cfg = settings(SMALL, 16, "standard", seed=5)
    batch = one_batch(cfg, 2, seed=1)
    assert float(batch["bold"].var()) == pytest.approx(1.25, rel=0.1)
    sizes = measure(cfg, batch, steps=1)
    torch.manual_seed(5)
    module = coord_check.PretrainModule(cfg)
    prediction, mask = module.reconstruct(batch)
    assert sizes["prediction"][0] == pytest.approx(float(prediction.detach().square().mean().sqrt()))
    feature = module.model.encoder.encode(
        torch.where(mask.unsqueeze(-1), module.model.mask_token, module.model.encoder.embed(batch["bold"]))
    )[0]
    assert sizes["stage 0 block 0"][0] == pytest.approx(float(feature.detach().square().mean().sqrt()))
    assert all(len(values) == 2 for values in sizes.values())


def test_only_the_optimizer_differs_between_the_modes() -> None:
    plain, scaled = (settings(SMALL, 16, mode, seed=0) for mode in ("standard", "mup"))
    assert (scaled.optimizer.name, scaled.optimizer.base_width, scaled.model.attention_base_width) == (
        "adamw_mup",
        16,
        16,
    )
    scaled.optimizer, scaled.model.attention_base_width = plain.optimizer, None
    scaled.run_dir = plain.run_dir  # named after the second in which it was composed
    assert scaled == plain


def test_both_modes_agree_at_the_base_width(small: Result) -> None:
    for name, sizes in small.sizes["mup"].items():
        assert np.array_equal(sizes[0], small.sizes["standard"][name][0]), name


def test_blocks_grow_without_mup_only(small: Result) -> None:
    with_mup, without = small.slopes["mup"], small.slopes["standard"]
    for name in ("stage 0 block 0", "stage 1 block 0", "readout"):
        assert abs(with_mup[name][-1]) < 0.2 < 0.3 < without[name][-1], name
    assert without["stage 1 block 0"][-1] > 0.8


def made_up(mup: dict[str, float], standard: dict[str, float]) -> Result:
    def table(slopes: dict[str, float]) -> dict[str, np.ndarray]:
        return {name: np.array([9.0, value]) for name, value in slopes.items()}  # only the last step is judged

    return Result(SMALL, {}, {"mup": table(mup), "standard": table(standard)})


STEEP = {"stage 0 block 0": 0.9, "stage 0 block 0 space scores": 2.0, "readout": 1.0}


@pytest.mark.parametrize(
    ("change", "standard", "message"),
    [
        ({}, STEEP, None),
        ({"stage 0 block 0 space scores": -1.0}, STEEP, None),
        ({"stage 0 block 0": 0.16}, STEEP, "slope of stage 0 block 0 is +0.16"),
        ({"stage 0 block 0": -0.16}, STEEP, "slope of stage 0 block 0 is -0.16"),
        ({"readout": 0.19}, STEEP, None),
        ({"readout": -0.21}, STEEP, "slope of readout is -0.21"),
        ({"stage 0 block 0 space scores": 0.2}, STEEP, "mean slope of attention scores is +0.20"),
        ({}, {**STEEP, "stage 0 block 0": 0.5}, "without muP the steepest slope of a block is +0.50"),
    ],
)
def test_failures(change: dict[str, float], standard: dict[str, float], message: str | None) -> None:
    flat = {"stage 0 block 0": 0.1, "stage 0 block 0 space scores": 0.1, "readout": 0.1}
    failures = find_failures(made_up({**flat, **change}, standard))
    assert len(failures) == (message is not None)
    assert message is None or message in failures[0]


def test_figure_draws_the_sizes(small: Result, tmp_path: Path) -> None:
    plain = json.loads(json.dumps(report(small)))
    fig = command.draw(plain, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    panels = [ax for ax in fig.axes if ax.lines]
    assert len(panels) == 6
    readout_without = panels[3]
    assert len(readout_without.lines) == SMALL.steps + 1
    for step, line in enumerate(readout_without.lines):
        assert line.get_xdata() == pytest.approx([16, 128])
        assert line.get_ydata() == pytest.approx(small.sizes["standard"]["readout"][:, step])


def test_command_prints_json_and_fails_with_status_1(
    small: Result, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[Plan] = []

    def run(plan: Plan, say: object) -> Result:
        asked.append(plan)
        return Result(plan, small.sizes, small.slopes, ["too steep"])

    monkeypatch.setattr(coord_check, "run", run)
    arguments = ["--json", "--widths", "16", "128", "--steps", "3", "--lr", "0.02", "--out", str(tmp_path / "f.png")]
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 1
    printed = json.loads(capsys.readouterr().out)
    assert (printed["passed"], printed["failures"]) == (False, ["too steep"])
    assert printed["slopes"]["mup"]["readout"] == small.slopes["mup"]["readout"].tolist()
    assert (asked[0].widths, asked[0].steps, asked[0].lr) == ((16, 128), 3, 0.02)
    assert (tmp_path / "f.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "16"], "--widths 16: give at least two"),
        (["--widths", "16", "17"], "stage 1 has width 17"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--lr", "-1"], "--lr -1.0: must be above 0"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main([*arguments] if "--steps" in arguments else [*arguments, "--steps", "1", "--seeds", "1"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ")
    assert message in printed
