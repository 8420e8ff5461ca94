"""metrics.jsonl: values, NaN, resuming, torn lines, ranks."""

from __future__ import annotations

import json
import math
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from swift.train.callbacks.log import JsonlLogger, TrimMetrics
from swift.utils import jsonl
from swift.utils.errors import UserError


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_line_holds_step_time_epoch_and_scalars(tmp_path):
    logger = JsonlLogger(tmp_path / "run", clock=lambda: 1700000000.25)
    logger.log_metrics({"train/loss": torch.tensor(0.5), "epoch": 2.0, "train/lr": 1e-3}, step=7)
    raw = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert raw == '{"step": 7, "time": 1700000000.25, "epoch": 2, "train/loss": 0.5, "train/lr": 0.001}\n'
    assert logger.save_dir == str(tmp_path / "run")


def test_non_finite_values_are_strict_json_and_come_back(tmp_path):
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf}, step=1)

    def refuse(name):
        raise AssertionError(f"not JSON: {name}")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (record["a"], record["b"], record["c"]) == ("NaN", "Infinity", "-Infinity")
    back = jsonl.read(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(back["a"])
    assert back["b"] == math.inf
    assert back["c"] == -math.inf


def test_trim_drops_the_lost_future_only(tmp_path):
    logger = JsonlLogger(tmp_path)
    for step in (10, 20, 30, 40):
        logger.log_metrics({"train/loss": 1 / step}, step=step)
    assert logger.trim(20) == 2
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]
    assert logger.trim(20) == 0
    logger.log_metrics({"train/loss": 0.25}, step=30)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]
    assert lines(tmp_path)[-1]["train/loss"] == 0.25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_trim_keeps_non_finite_values_and_needs_no_file(tmp_path):
    assert JsonlLogger(tmp_path / "fresh").trim(0) == 0
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"x": math.nan}, step=1)
    logger.log_metrics({"x": 1.0}, step=2)
    logger.trim(1)
    assert [line["x"] for line in lines(tmp_path)] == ["NaN"]


def test_a_line_torn_by_a_kill_is_cut_off(tmp_path):
    JsonlLogger(tmp_path).log_metrics({"x": 1.0}, step=1)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as stream:
        stream.write('{"step": 2, "ti')
    assert [record["step"] for record in jsonl.read(path)] == [1]
    JsonlLogger(tmp_path).log_metrics({"x": 3.0}, step=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


@pytest.mark.parametrize("bad", ["nonsense", "[1, 2]"])
def test_a_damaged_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + bad + '\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        jsonl.read(path)


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"x": 1.0}, step=1)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir="):
        JsonlLogger(tmp_path / "file").log_metrics({"x": 1.0}, step=1)


def test_logger_pickles(tmp_path):
    copy = pickle.loads(pickle.dumps(JsonlLogger(tmp_path)))
    copy.log_metrics({"x": 1.0}, step=1)
    assert lines(tmp_path)[0]["x"] == 1.0


class Line(pl.LightningModule):
    """Fits y = w x; logs its loss with the number of steps done."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        loss = (self.layer(batch[0]) - 1).square().mean()
        self.logger.log_metrics({"train/loss": loss.detach()}, step=self.global_step + 1)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(run, steps, ckpt=None):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(64, 1)), batch_size=1)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=JsonlLogger(run),
        callbacks=[TrimMetrics()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run,
    )
    trainer.fit(Line(), data, ckpt_path=ckpt)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_training_leaves_one_trajectory(tmp_path):
    fit(tmp_path, 4).save_checkpoint(tmp_path / "four.ckpt")
    with (tmp_path / "metrics.jsonl").open("a") as stream:  # steps 5 and 6 were made after the checkpoint, then killed
        stream.write('{"step": 5, "train/loss": -1}\n{"step": 6, "train/loss": -1}\n')
    fit(tmp_path, 7, tmp_path / "four.ckpt")
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6, 7]
    assert all(line["train/loss"] >= 0 for line in written)
