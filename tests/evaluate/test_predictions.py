"""Predictions files: what goes in comes out to the last bit, clips are averaged once, and damage is named."""

import numpy as np
import pytest

from swift.evaluate.predictions import Predictions
from swift.utils.errors import UserError

RNG = np.random.default_rng(0)


def subjects(n=5, kind="binary"):
    names = [f"sub-{i:02d}" for i in range(n)]
    rng = np.random.default_rng(n)
    if kind == "regression":
        return Predictions(kind, [], names, [""] * n, [-1] * n, rng.normal(100, 15, n), rng.normal(100, 15, n))
    classes = ["ill", "well"] if kind == "binary" else ["a", "b", "c"]
    p = rng.dirichlet(np.ones(len(classes)), n)
    return Predictions(kind, classes, names, [""] * n, [-1] * n, np.arange(n) % len(classes), p)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_a_file_holds_every_bit(tmp_path, kind):
    made = subjects(7, kind)
    read = Predictions.load(made.save(tmp_path / "a" / "test.csv"))
    assert (read.kind, read.classes, read.per) == (kind, made.classes, "subject")
    for key in ("subject", "scan", "frame", "target", "scores"):
        np.testing.assert_array_equal(getattr(read, key), getattr(made, key))


def test_the_columns_are_those_of_the_format(tmp_path):
    one = Predictions("binary", ["no", "yes"], ["s1"], ["s1_run"], [12], [1], [[0.25, 0.75]])
    assert (
        one.save(tmp_path / "x.csv").read_text() == "subject,scan,frame,target,p_no,p_yes\ns1,s1_run,12,yes,0.25,0.75\n"
    )
    number = Predictions("regression", [], ["s1"], [""], [-1], [101.5], [99.25])
    assert number.save(tmp_path / "y.csv").read_text() == "subject,scan,frame,target,prediction\ns1,,,101.5,99.25\n"


def clips(ranks, per_frame):
    """Rows of 11 subjects with 1 to 5 clips each, dealt to ranks as a sampler that pads by repeating would."""
    rng = np.random.default_rng(1)
    rows = []
    for subject in range(11):
        for clip in range(1 + subject % 5):
            frames = range(clip * 3, clip * 3 + 4) if per_frame else [-1]  # clips overlap by one frame
            for frame in frames:
                target = float(frame % 2 if per_frame else subject % 2)
                rows.append(
                    (f"s{subject:02d}", f"s{subject:02d}_r{clip // 3}", clip, target, rng.dirichlet([1, 1]), frame)
                )
    rows += rows[: -len(rows) % ranks]
    return [row for rank in range(ranks) for row in rows[rank::ranks]], rows


@pytest.mark.parametrize("per_frame", [False, True])
def test_any_number_of_ranks_gives_the_same_bits_and_every_unit_once(per_frame):
    made = []
    for ranks in (1, 2, 4):
        subject, scan, start, target, scores, frame = zip(*clips(ranks, per_frame)[0], strict=True)
        made.append(
            Predictions.from_clips(
                "binary", ["n", "y"], subject, scan, start, target, scores, frame if per_frame else None
            )
        )
    for other in made[1:]:
        for key in ("subject", "scan", "frame", "target", "scores"):
            np.testing.assert_array_equal(getattr(made[0], key), getattr(other, key))
    _, rows = clips(1, per_frame)
    groups = {}
    for subject, scan, _, _, p, frame in rows:
        groups.setdefault((subject, scan, frame) if per_frame else (subject, "", -1), []).append(p)
    assert len(made[0]) == len(groups)
    for row, unit in enumerate(zip(made[0].subject, made[0].scan, made[0].frame, strict=True)):
        np.testing.assert_allclose(made[0].scores[row], np.mean(groups[unit], axis=0), rtol=0, atol=1e-15)


def test_values_are_averaged_as_they_are():
    made = Predictions.from_clips("regression", [], ["a", "a", "b"], ["x"] * 3, [0, 8, 0], [1, 1, 2], [3.0, 5.0, 7.0])
    np.testing.assert_array_equal(made.scores, [[4.0], [7.0]])


GOOD = {
    "kind": "binary",
    "classes": ["n", "y"],
    "subject": ["a", "b"],
    "scan": ["", ""],
    "frame": [-1, -1],
    "target": [0, 1],
    "scores": [[0.5, 0.5], [0.2, 0.8]],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": ["a", "a"]}, "subject a: twice"),
        ({"scores": [[0.5, 0.5], [0.2, 0.9]]}, "subject b: .*no probabilities"),
        ({"scores": [[0.5, 0.5], [np.nan, 0.9]]}, "subject b: not finite"),
        ({"target": [0, 2]}, "subject b: target 2 is no class"),
        ({"target": [0]}, "1 targets"),
        ({"classes": ["n", "y", "z"]}, "belong to binary"),
        ({"kind": "rank"}, "legal are binary, multiclass, regression"),
        ({"kind": "multiclass"}, "2 classes"),
        ({k: [] for k in ("subject", "scan", "frame", "target", "scores")}, "no rows"),
    ],
)
def test_what_is_no_prediction_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        Predictions(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "the columns must be subject, scan, frame, target"),
        ("subject,scan,frame,target,p_n,p_y\ns,,,maybe,0.5,0.5\n", "line 2: 'maybe'"),
        ("subject,scan,frame,target,p_n,p_y\ns,,,n,0.5\n", "line 2: 5 fields"),
        ("subject,scan,frame,target,prediction\ns,,,1,x\n", "line 2: could not convert"),
        ("subject,scan,frame,target,prediction\n", "no rows"),
        ("", "not predictions"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Predictions.load(tmp_path / "p.csv")
    assert "p.csv" in str(error.value)


def test_a_missing_file_and_rows_that_disagree(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: cannot be read"):
        Predictions.load(tmp_path / "none.csv")
    with pytest.raises(UserError, match="subject a: rows of one unit have different targets"):
        Predictions.from_clips("regression", [], ["a", "a"], ["x", "x"], [0, 8], [1, 2], [3.0, 5.0])
