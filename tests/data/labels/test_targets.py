"""Labels: against slow references, and one line for whatever is wrong with a table."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from swift.config.schema import TargetConfig
from swift.data.clips.mixture import Stores
from swift.data.ingest.bids import find_sources
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe
from swift.data.labels.name_leak import id_leak
from swift.data.labels.targets import encode, read_labels
from swift.data.store.format import ScanInfo
from swift.data.store.reader import StoreWriter
from swift.data.synthetic import CohortSpec, load_truth, write_bids, write_store
from swift.utils.errors import UserError
from tests.data.stores import GRID, scan

BINARY = TargetConfig("binary", column="group", classes=["HC|0|control", "MDD|1"])
NUMBER = TargetConfig("regression", column="score")
ON = TargetConfig("binary", "frame", "events", classes=["rest", "task"])


def build(
    path: Path, phenotypes: list[dict[str, str]], subjects: list[str] | None = None, events: str | list[str] = ""
) -> Stores:
    """A store of scans with these phenotypes; TR 0.72 s, 24 frames. events: one text for all, or one a scan."""
    with StoreWriter(path, GRID, 2.0) as writer:
        for number, columns in enumerate(phenotypes):
            header, mask, bold = scan(number)
            own = subjects[number] if subjects else header.subject
            text = events if isinstance(events, str) else events[number]
            writer.add(dataclasses.replace(header, phenotypes=columns, subject=own, events=text), mask, bold)
    return Stores([path])


def events_store(path: Path, *lines: str, head: str = "onset\tduration\ttrial_type\tvalue") -> Stores:
    return build(path, [{}], events="\n".join([head, *lines]) + "\n")


# --- of subjects --------------------------------------------------------------------------------------------------
def test_texts_and_numbers_become_places_of_classes() -> None:
    found = encode(["HC", "control", "1", "1.0", "", "n/a", " MDD ", "0"], list("abcdefgh"), BINARY)
    np.testing.assert_array_equal(found, [0, 0, 1, 1, np.nan, np.nan, 1, 0])
    loose = dataclasses.replace(BINARY, others="leave_out")
    np.testing.assert_array_equal(encode(["HC", "ADHD"], ["a", "b"], loose), [0, np.nan])
    np.testing.assert_array_equal(encode(["1e2", "-3.5", "NaN"], ["a", "b", "c"], NUMBER), [100, -3.5, np.nan])


def test_a_scan_without_label_has_that_of_its_subject(tmp_path: Path) -> None:
    store = build(tmp_path / "s", [{"group": "HC"}, {"group": ""}, {"group": "MDD"}], ["a", "a", "b"])
    labels = read_labels(store, BINARY)
    assert [float(value) for value in labels.values] == [0, 0, 1]
    assert labels.classes == ["HC", "MDD"]


@pytest.mark.parametrize(
    ("target", "columns", "says"),
    [
        (NUMBER, [{"age": "3"}] * 2, "column=score: the manifest has no such column; it has age, site"),
        (
            NUMBER,
            [{"score": "3"}, {"score": "high"}],
            r"not a number in 1 rows \(sub-01_task-rest \(line 3\): 'high'\)",
        ),
        (NUMBER, [{"score": "inf"}, {"score": "1"}], r"not a number in 1 rows \(sub-00_task-rest \(line 2\)"),
        (BINARY, [{"group": "HC"}, {"group": "BD"}], "none of the classes HC|0|control.*'BD'.*others=leave_out"),
    ],
)
def test_a_bad_column_is_named(tmp_path: Path, target: TargetConfig, columns: list[dict[str, str]], says: str) -> None:
    store = build(tmp_path / "s", columns)
    with pytest.raises(UserError, match=says) as caught:
        read_labels(store, target)
    assert "\n" not in str(caught.value)


def test_a_subject_with_two_values(tmp_path: Path) -> None:
    store = build(tmp_path / "s", [{"group": "HC"}, {"group": "MDD"}], ["a", "a"])
    with pytest.raises(UserError, match="subject a has two values"):
        read_labels(store, BINARY)


# --- of frames ----------------------------------------------------------------------------------------------------
def test_frames_are_on_while_an_event_goes_on_with_delay_and_bridges(tmp_path: Path) -> None:
    spans = [(1.0, 2.0), (4.5, 2.5), (12.0, 1.0)]
    store = events_store(tmp_path / "s", *(f"{on}\t{last}\tx\t1" for on, last in reversed(spans)))
    for delay, bridge in ((0.0, 0.0), (2.0, 0.0), (2.0, 1.5), (0.0, 10.0)):
        target = dataclasses.replace(ON, delay_seconds=delay, bridge_seconds=bridge)
        (found,) = read_labels(store, target).values
        for frame, value in enumerate(found):
            time = frame * 0.72 - delay
            on = any(begin <= time < begin + last for begin, last in spans)
            for (begin, last), (after, _) in pairwise(spans):
                on |= after - begin - last <= bridge and begin + last <= time < after
            assert (math.isnan(value) and time < 0) or (time >= 0 and value == on), (delay, bridge, frame)


def test_classes_of_events_and_rest(tmp_path: Path) -> None:
    store = events_store(tmp_path / "s", "1\t2\tface\t1", "2\t4\thouse\t1", "8\t1\tn/a\t1")
    target = dataclasses.replace(ON, kind="multiclass", column="trial_type", classes=["face", "house", "rest"])
    (found,) = read_labels(store, target).values
    times = np.arange(24) * 0.72
    # Of two at once the last begun; the unnamed event is none.
    wanted = np.where((times >= 2) & (times < 6), 1, np.where((times >= 1) & (times < 3), 0, 2))
    np.testing.assert_array_equal(found, wanted)
    alone = dataclasses.replace(target, kind="binary", classes=["face", "house"])
    (found,) = read_labels(store, alone).values
    np.testing.assert_array_equal(found, np.where(wanted == 2, np.nan, wanted))


def test_values_convolved_with_the_response(tmp_path: Path) -> None:
    from nilearn.glm.first_level import glover_hrf
    from scipy.stats import pearsonr

    store = events_store(tmp_path / "s", "1\t3\tx\t0.5", "7\t2\tx\t-1")
    target = TargetConfig("regression", "frame", "events", column="value", response="hrf")
    (found,) = read_labels(store, target).values
    step = 0.01
    times = np.arange(0, 24 * 0.72, step)
    neural = 0.5 * ((times >= 1) & (times < 4)) - ((times >= 7) & (times < 9))
    slow = np.convolve(neural, glover_hrf(step, 1))[np.rint(np.arange(24) * 0.72 / step).astype(int)]
    assert pearsonr(found, slow).statistic > 0.999


def test_events_from_a_folder_by_their_names(tmp_path: Path) -> None:
    store = build(tmp_path / "s", [{}])
    folder = tmp_path / "bids" / "sub-00" / "func"
    folder.mkdir(parents=True)
    (folder / "sub-00_task-rest_events.tsv").write_text("onset\tduration\n0\t100\n")
    (folder / "sub-01_task-rest_events.tsv").write_text("onset\tduration\n0\t1\n")
    (found,) = read_labels(store, dataclasses.replace(ON, events=str(tmp_path / "bids"))).values
    np.testing.assert_array_equal(found, np.ones(24))
    (folder / "sub-00_task-rest_events.tsv").unlink()
    with pytest.raises(UserError, match="whose name fits sub-00_task-rest"):
        read_labels(store, dataclasses.replace(ON, events=str(tmp_path / "bids")))


def test_events_of_a_bids_dataset_are_kept_in_the_store(tmp_path: Path) -> None:
    spec = CohortSpec(n_subjects=1, frames=40, grid=(12, 12, 12), spacing=4.0, sites=1)
    write_bids(spec, tmp_path / "bids")
    ingest(find_sources([tmp_path / "bids"]), tmp_path / "a", Recipe((12, 12, 12), 4.0, any_size=True))
    write_store(spec, tmp_path / "b")
    truth = load_truth(tmp_path / "b")["scans"]["sub-0001_task-rest"]["valence_bold"]
    target = TargetConfig("regression", "frame", "events", column="valence", response="hrf")
    for path in ("a", "b"):
        (found,) = read_labels(Stores([tmp_path / path]), target).values
        assert np.corrcoef(found, truth)[0, 1] > 0.99


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["18000\t1\tx\t1"], r"all 1 lie outside the scan, which ends at 17\.28 s .*line 2 at 18000 s; onsets are sec"),
        (["-5\t2\tx\t1"], r"outside the scan.*line 2 at -5 s"),
        (["soon\t2\tx\t1"], "onset or duration is no number of seconds in line 2"),
        (["1\t-2\tx\t1"], "onset or duration is no number of seconds in line 2"),
    ],
)
def test_bad_events_are_named(tmp_path: Path, lines: list[str], says: str) -> None:
    store = events_store(tmp_path / "s", *lines)
    with pytest.raises(UserError, match=says) as caught:
        read_labels(store, ON)
    assert "\n" not in str(caught.value)


def test_no_events_and_no_such_column(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"kept no events of it; ingest it anew, or name .* task\.target\.events"):
        read_labels(build(tmp_path / "a", [{}]), ON)
    with pytest.raises(UserError, match="no column trial; there are onset, duration, trial_type, value"):
        read_labels(events_store(tmp_path / "b", "1\t2\tx\t1"), dataclasses.replace(ON, column="trial"))
    frame = TargetConfig("regression", "frame", "confounds", column="valence")
    with pytest.raises(UserError, match="no such per-frame column; it has none"):
        read_labels(build(tmp_path / "c", [{}]), frame)


# --- labels that names tell ---------------------------------------------------------------------------------------
def test_labels_that_follow_from_names_are_found() -> None:
    group = ["HC"] * 10 + ["MDD"] * 10
    number = [f"{place:03d}" for place in range(20)]
    assert id_leak([f"sub-{label}{n}" for label, n in zip(group, number)], group) is not None
    assert id_leak([f"sub-{1 if label == 'HC' else 5}0{n}" for label, n in zip(group, number)], group) is not None
    assert id_leak([f"{n}{label[0]}" for label, n in zip(group, number)], group) is not None
    in_order = id_leak([f"sub-{place + 5:03d}" for place in range(20)], group)
    assert in_order is not None
    assert "class by class" in in_order


def test_names_without_a_rule_are_left_alone() -> None:
    flagged = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        names = [f"sub-{n:03d}" for n in rng.permutation(1000)[:30]]
        flagged += id_leak(names, list(rng.permutation(["a"] * 15 + ["b"] * 15))) is not None
    assert flagged == 0
    assert id_leak(["x1", "y2"], ["a", "b"]) is None
    assert id_leak(["x1", "x2"], ["a", "a"]) is None


def test_the_header_keeps_its_bytes_without_events(tmp_path: Path) -> None:
    info: ScanInfo = build(tmp_path / "s", [{}]).scans[0]
    assert info.frames == 24
    store = Stores([tmp_path / "s"])
    assert "events" not in store.attributes(0)
    assert store.events(0) == ""
