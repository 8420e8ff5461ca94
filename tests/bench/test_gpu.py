"""The benchmark of a GPU runs small on a CPU: every part measures, and what it says follows from what it measured."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.bench.v1
from swift.plan.flops import model_flops
from swift.utils.errors import UserError
from tests.bench.gpu import base, build, gates, measure, strategies
from tests.bench.gpu.__main__ import PARTS, main, part_of

CPU = torch.device("cpu")


def small(folder: Path, **changes: Any) -> base.Bench:
    return base.Bench(CPU, True, folder, card={"matrix_tflops": 0.5}, **changes)


def bench(out: Path, *arguments: str) -> dict[str, Any]:
    main(["--device", "cpu", "--out", str(out), *arguments])
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_part_that_does_not_exist_is_one_line_with_the_legal_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--part stepps: no such part; legal are gates, steps,") as error:
        main(["--part", "gates,stepps", "--out", str(tmp_path / "a.json")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a.json").exists()


def test_rows_are_added_once_and_listed_as_missing_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.json"
    main(["--device", "cpu", "--list", "--out", str(out)])
    listed = capsys.readouterr().out
    assert "optimizer" in listed
    assert "missing: tiny AdamW fused" in listed
    content = bench(out, "--part", "optimizer", "--only", "fused")
    first = content["parts"]["optimizer"]
    assert list(first) == ["tiny AdamW fused"]
    content = bench(out, "--part", "optimizer", "--only", "AdamW")
    rows = content["parts"]["optimizer"]
    assert set(rows) == {"tiny AdamW fused", "tiny AdamW foreach"}
    assert rows["tiny AdamW fused"] == first["tiny AdamW fused"]
    assert rows["tiny AdamW foreach"]["kernels"] > rows["tiny AdamW fused"]["kernels"]
    capsys.readouterr()
    main(["--device", "cpu", "--list", "--out", str(out)])
    listed = capsys.readouterr().out
    assert "missing: tiny AdamW fused" not in listed
    assert "2 of 4 measured" in listed


def test_errors_are_rows_and_the_rest_goes_on(tmp_path: Path) -> None:
    def fail() -> base.Row:
        raise ValueError("two\nlines")

    def full() -> base.Row:
        raise torch.OutOfMemoryError

    def slow() -> base.Row:
        time.sleep(60)
        return {}

    made = [base.Case("fails", fail), base.Case("full", full), base.Case("good", lambda: {"ms": 1.0})]
    part = base.Part("", lambda _: made)
    results = base.Results(tmp_path / "r.json")
    assert base.run_part("p", part, small(tmp_path), results, speaks=False)
    rows = {
        name: {key: value for key, value in row.items() if key != "took_s"} for name, row in results.rows("p").items()
    }
    assert rows == {
        "fails": {"error": "ValueError: two lines"},
        "full": {"error": "out of memory"},
        "good": {"ms": 1.0},
    }
    assert base.measured(base.Case("slow", slow), small(tmp_path), 0.2)["error"].startswith("stopped after")


def test_no_case_begins_when_the_time_of_a_part_is_over(tmp_path: Path) -> None:
    part = base.Part("", lambda _: [base.Case("late", lambda: {"ms": 1.0})])
    results = base.Results(None)
    base.run_part("p", part, small(tmp_path, seconds=0.0), results, speaks=False)
    assert results.rows("p") == {}


def test_a_step_says_what_it_computes(tmp_path: Path) -> None:
    bench = small(tmp_path)
    cfg = build.settings(bench, "tiny", "parallel=zero1")
    step = build.Step(cfg, 2, CPU, "bf16")
    row = build.step_row(step, bench.card, seconds=0.01)
    flops = 2 * model_flops(build.geometry_of(cfg)).total
    assert row["clips_s"] == pytest.approx(2000 / row["ms"])
    assert row["mfu_card"] == pytest.approx(flops / (row["ms"] / 1000) / 0.5e12)
    assert row["hfu"] == row["mfu"]
    assert all(parameter.dtype == torch.bfloat16 for parameter in step.module.model.parameters())
    assert all(master.dtype == torch.float32 for master in step.masters)


def test_bf16_weights_with_masters_learn_as_float32_does(tmp_path: Path) -> None:
    bench = small(tmp_path)
    losses = {}
    for weights, parallel in (("fp32", "single"), ("bf16", "zero1")):
        rate = ["optimizer.lr=1e-3", "optimizer.warmup_steps=0"]
        step = build.Step(build.settings(bench, "tiny", f"parallel={parallel}", *rate), 1, CPU, weights)
        losses[weights] = [float(step()) for _ in range(5)]
    assert losses["fp32"][-1] < losses["fp32"][0] - 1e-4
    drop = [losses["fp32"][0] - losses["fp32"][-1], losses["bf16"][0] - losses["bf16"][-1]]
    assert drop[1] == pytest.approx(drop[0], rel=0.2)


@pytest.mark.parametrize("kind", ["v1", "factorized"])
def test_gates_hold_for_the_model_and_fail_for_a_wrong_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = small(tmp_path)
    row = gates.against_reference(bench, kind, 8, "fp32")
    assert row["ok"]
    assert 0 < row["outputs"] < 1e-6
    original = torch.nn.functional.scaled_dot_product_attention

    def wrong(*args: Any, scale: float | None = None, **kwargs: Any) -> torch.Tensor:
        return original(*args, scale=0.3, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    assert not gates.against_reference(bench, kind, 8, "fp32")["ok"]


def test_distances_by_hand() -> None:
    a = [torch.tensor([3.0]), torch.tensor([0.0, 4.0])]
    b = [torch.tensor([3.0]), torch.tensor([0.0, 1.0])]
    assert gates.distance(a, b) == pytest.approx(3 / 10**0.5)


def test_leaf_operators_are_counted() -> None:
    x = torch.ones(4, 4)
    seen = measure.kernels(lambda: (x @ x) + 1, CPU)
    assert seen.by_name["mm"][0] == 1
    assert seen.by_name["add"][0] == 1
    assert (seen.count, seen.waits) == (2, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PARTS if name != "v1"])
def test_every_part_runs_small(name: str, tmp_path: Path) -> None:
    rows = bench(tmp_path / "a.json", "--part", name)["parts"][name]
    assert len(rows) == len(part_of(name).cases(small(tmp_path)))
    for case, row in rows.items():
        assert "error" not in row, f"{case}: {row}"
        assert row.get("ok", True), f"{case}: {row}"


def test_v1_without_its_files_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "patchembedding.py").touch()
    for options, message in (
        ([], "part v1 needs --v1 FOLDER"),
        (["--v1", str(tmp_path)], "swin4d_transformer_ver7.py is not there"),
    ):
        with pytest.raises(UserError, match=message):
            main(["--device", "cpu", "--part", "v1", *options])
    with pytest.raises(UserError, match="swin4d_transformer_ver7"):
        tests.bench.v1.main([str(tmp_path)])


def test_ranks_are_for_the_steps_alone() -> None:
    with pytest.raises(UserError, match="--ranks 2: must be at least 1, and more than 1 is for --part steps alone"):
        main(["--device", "cpu", "--ranks", "2", "--part", "gates"])


def test_losses_apart_by_hand() -> None:
    assert strategies.apart([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert strategies.apart([1.0], [1.0, 2.0]) == float("inf")


@pytest.mark.slow
def test_two_ranks_step_together(tmp_path: Path) -> None:
    rows = bench(tmp_path / "a.json", "--part", "steps", "--only", "tiny", "--ranks", "2")["parts"]["steps"]
    (row,) = rows.values()
    assert row["ranks"] == 2
    assert row["clips_s"] == pytest.approx(2 * 2000 / row["ms"])
