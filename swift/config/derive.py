"""Settings that follow from what is there: grid and spacing from the store, model or input from weights of init=."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from swift.config.names import options_first
from swift.config.schema import TrainerConfig
from swift.utils.errors import UserError

log = logging.getLogger("swift.config")

MAP_MM = 4.0
"""Edge of the cells that maps are predicted in, mm; half of it costs eight times as much."""
GRID, SPACING = [96, 96, 96], 2.0
"""Voxels and mm where neither settings nor a store say."""
PATHS = ("data.path", "data.split", "data.stage_dir", "init", "resume", "run_dir", "task.target.events",
         "task.target.maps", "task.target.retest")  # fmt: skip
"""Settings that name a file or a folder."""
V1_INPUT = {"layout": "swift_v1", "normalization": "zscore_global"}
"""Settings of the data that give clips as SwiFT v1's weights know them."""
_V1_NAME = re.compile(rb"\b(?:patch_embed\.fc|pos_embeds\.\d+\.\w+_embed|layers\.\d+\.(?:blocks|downsample)\.)")
"""Names of tensors that only SwiFT v1 has; as `swift.models.v1` knows them, which needs torch."""
TEXTS = ("task.target.classes", "task.target.column", "task.target.contrasts", "data.exclude")
"""Settings that hold names of the user's own."""


def log_every(trainer: TrainerConfig, on_cpu: bool) -> int:
    """Optimizer steps between logged points: what is asked for, else what a device can stand.

    On a GPU the host works ahead, and reading a number makes it wait for all the work it has queued.
    """
    if trainer.log_every is not None:
        return trainer.log_every
    return 2 if on_cpu else max(1, min(50, trainer.max_steps // 20))


def fill_grid(data: dict[str, Any]) -> None:
    """Give null grid and spacing the values of the store that `data` names, or 96^3 at 2 mm where there is none.

    What is wrong with a store is said when it is opened.
    """
    if data.get("grid") is not None and data.get("spacing") is not None:
        return
    paths = [data.get("path"), *(cohort.get("path") for cohort in data.get("mixture") or [])]
    found: dict[str, Any] = {}
    path = next((path for path in paths if path), None)
    if data.get("name") == "store" and path:
        try:
            told = json.loads((Path(str(path)) / "store.json").read_text(encoding="utf-8"))
            found = {"grid": [int(n) for n in told["grid"]], "spacing": float(told["spacing"])}
        except (OSError, ValueError, KeyError, TypeError):
            found = {}
    for name, value in (("grid", GRID), ("spacing", SPACING)):
        if data.get(name) is None:
            data[name] = found.get(name, value)


def fill_maps(plain: dict[str, Any]) -> None:
    """Give null model.maps_of a value: shared where subjects are split, as those held out have no maps of their own."""
    model, data = plain.get("model"), plain.get("data")
    if isinstance(model, dict) and isinstance(data, dict) and model.get("maps_of", "") is None:
        model["maps_of"] = "scan" if data.get("split") is None else "shared"


def fill_step(plain: dict[str, Any]) -> None:
    """Give null task.map_step a value: the whole number of voxels next to `MAP_MM`."""
    task, data = plain.get("task"), plain.get("data")
    if isinstance(task, dict) and isinstance(data, dict) and task.get("map_step", 1) is None:
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):  # a wrong spacing is refused by the checks
            task["map_step"] = max(1, round(MAP_MM / float(data["spacing"])))


def refuse_truth_values(plain: dict[str, Any]) -> None:
    """Raise UserError where YAML has made true or false of a name, such as an unquoted yes or no."""
    for name in TEXTS:
        value: Any = plain
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if any(isinstance(one, bool) for one in (value if isinstance(value, list) else [value])):
            raise UserError(
                f"{name}={value}: YAML reads an unquoted yes, no, on, off, true or false as a truth value: quote it, "
                'as in ["no", "yes"]'
            )


def take_model(tree: DictConfig, overrides: Iterable[str]) -> None:
    """Give a composed tree the model that the weights of init= were trained with, unless another one is typed.

    Single values that are typed (model.drop_path=0.1) stay as they are.

    Args:
        tree: Composed; changed in place.
        overrides: As typed.
    """
    names = [override.lstrip("+~").partition("=")[0] for override in overrides]
    if not tree.get("init") or any(name == "model" or name.startswith("model/") for name in names):
        return
    model = _model_of(Path(str(tree.init)))
    if model is None:
        return
    kept = {name.partition(".")[2] for name in names if name.startswith("model.")}
    # Of the stores there; with data.brain=cohort those of this run are looked at.
    model.pop("cohort", None)
    with open_dict(tree):
        own = {name: tree.model[name] for name in kept if name in tree.model}
        tree.model = OmegaConf.create({**model, **own})
    log.info("init=%s: model %s, as there", tree.init, model.get("name"))


def take_v1_input(tree: DictConfig, overrides: Iterable[str]) -> None:
    """Give a composed tree the clips that SwiFT v1's weights know, where init= is a file of them.

    What is typed stays; with another data.normalization, for which v1's layout is not legal, the layout stays too.
    `swift.train.wiring.tell` then names all that differs.

    Args:
        tree: Composed; changed in place.
        overrides: As typed.
    """
    if not tree.get("init") or tree.get("data") is None or not _is_v1_file(Path(str(tree.init))):
        return
    names = {override.lstrip("+~").partition("=")[0].removeprefix("data.") for override in overrides}
    wanted = {name: value for name, value in V1_INPUT.items() if name not in names}
    if wanted.get("normalization", tree.data.get("normalization")) != V1_INPUT["normalization"]:
        wanted.pop("layout", None)
    if not wanted:
        return
    with open_dict(tree):
        tree.data.update(wanted)
    said = " ".join(f"data.{name}={value}" for name, value in wanted.items())
    log.info("init=%s: weights of SwiFT v1: %s, as it was trained on", tree.init, said)


def _is_v1_file(path: Path) -> bool:
    """Whether a file of torch's holds tensors with SwiFT v1's own names. Nothing is unpickled."""
    if not path.is_file() or path.suffix == ".safetensors":
        return False
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as stream:  # the format before torch 1.6: names stand before the numbers
                return stream.read(1) == b"\x80" and bool(_V1_NAME.search(stream.read(1 << 22)))
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(_V1_NAME.search(archive.read(name)) for name in names)
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError):
        return False  # what is wrong there is said when the weights are read


def _model_of(path: Path) -> dict[str, Any] | None:
    """Settings of the model of a run, of one of its checkpoints, or of an exported file; None: they are not told."""
    try:
        if path.suffix == ".safetensors":
            # 8 bytes, little-endian: the length of the JSON header that follows; `__metadata__` is text to text.
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > 1 << 26:
                    return None
                model = json.loads(json.loads(stream.read(length))["__metadata__"]["config"])["model"]
            return model if isinstance(model, dict) else None
        run = path.parent if path.name == "checkpoints" else path
        run = path.parent.parent if path.parent.name == "checkpoints" else run
        model = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))["model"]  # type: ignore[call-overload,index]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, OmegaConfBaseException):
        return None  # what is wrong there is said when the weights are read
    return model if isinstance(model, dict) else None


def quoted(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command with the values of paths quoted for Hydra, whose grammar has = , ( ) and blanks.

    A ~ at its beginning becomes the home folder: the shell leaves it where it stands after NAME=. With -m a comma is
    between two values of a sweep, so that a value with one is not quoted there.
    """
    sweep = bool({"-m", "--multirun"} & set(arguments))
    return [_quoted(argument, sweep) for argument in arguments]


def _quoted(argument: str, sweep: bool) -> str:
    name, mark, value = argument.partition("=")
    if mark and name in PATHS and re.match(r"~(/|$)", value):
        value = str(Path(value).expanduser())
        argument = f"{name}={value}"
    if not mark or name not in PATHS or (sweep and "," in value) or not re.search(r"[^\w/.+\-:%${}]", value, re.ASCII):
        return argument
    # Quoted, a list or escaped already: typed by one who knows the grammar.
    if value[:1] in "'\"[" or "\\" in value:
        return argument
    return f"{name}='" + value.replace("'", "\\'") + "'"


def quote_command_line() -> None:
    """Quote the paths of this process's own command line, and put its settings behind its options."""
    sys.argv[1:] = options_first(quoted(sys.argv[1:]))
