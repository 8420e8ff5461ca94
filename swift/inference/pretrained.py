"""Models by name: `swift.load_model`, and folders that a hub or a colleague can be given (`save_pretrained`).

A folder holds model.safetensors (the file of `python -m swift.export`), config.json (input contract and settings, for
people and for the hub) and README.md (the model card). It names neither a subject nor a path. The hub is Hugging
Face's, by its own mixin; a folder needs no network.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import ModelCard, ModelHubMixin
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from swift.config.schema import Config
from swift.data.store.stats import MINIMUM
from swift.evaluate.scores import interval_text
from swift.inference.contract import Contract
from swift.inference.export import export, shareable
from swift.inference.model import Trained, load_trained
from swift.parallel.checkpoint.read import FORMAT
from swift.parallel.checkpoint.write import Entry, write_sealed
from swift.utils.errors import UserError

log = logging.getLogger("swift")

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FILES = (WEIGHTS, CONFIG, CARD)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the hub's client raises without a network: of another package in other versions, not always an OSError."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Pretrained(ModelHubMixin):
    """A model with what it must be given; made by `load_model`.

    Attributes:
        trained: Weights, settings and contract, as the commands use them.
        model: The torch module, float32, on the CPU, in eval mode.
        config: Settings of its run.
        contract: Its input: grid, spacing, orientation, TR, normalization, ...
    """

    def __init__(self, trained: Trained, which: str = "latest") -> None:
        self.trained, self.which = trained, which
        self.model: Any = trained.model
        self.config: Config = trained.config
        self.contract: Contract = trained.contract

    def save_pretrained(self, save_directory: str | Path, *, license: str | None = None, **kwargs: Any) -> str | None:
        """Write the folder: weights bit for bit, configuration, card.

        Args:
            save_directory: A new or empty folder.
            license: Of the weights, as the hub names it (cc-by-4.0, apache-2.0, other, ...); asked for, unless the
                model came from a folder whose card has one.
            kwargs: Of huggingface_hub's mixin.

        Raises:
            UserError: no licence, or the folder holds something already.
        """
        folder = Path(save_directory)
        told = kwargs.pop("model_card_kwargs", None) or {}
        told["license"] = self._licence(license or told.get("license"))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is there already and not empty; name a new folder")
        try:
            found: str | None = super().save_pretrained(folder, model_card_kwargs=told, **kwargs)
        except OSError as error:
            raise _said(error, str(folder)) from error
        return found

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **kwargs: Any) -> str:
        """Publish on the hub, in a repository that is made where it is not there yet.

        Raises:
            UserError: no licence, no network, or no right to write there.
        """
        told = kwargs.pop("model_card_kwargs", None) or {}
        told["license"] = self._licence(license or told.get("license"))  # before anything is made there
        try:
            return str(super().push_to_hub(repo_id, model_card_kwargs=told, **kwargs))
        except (OSError, HFValidationError, CLIENT_ERROR) as error:
            raise _said(error, repo_id) from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Pretrained:
        """A model of a folder, or of the hub.

        Raises:
            UserError: no network, no such model, or a folder that swift has not made.
        """
        try:
            found: Pretrained = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, HFValidationError, CLIENT_ERROR) as error:
            raise _said(error, str(pretrained_model_name_or_path)) from error
        return found

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> Pretrained:
        folder = Path(model_id)
        if not folder.is_dir():
            names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            wanted: dict[str, Any] = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            folder = Path(huggingface_hub.snapshot_download(model_id, allow_patterns=list(FILES), **wanted))
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{model_id}: has no {WEIGHTS}: swift's save_pretrained made no such folder")
        if licence_of(folder) is None:
            log.warning("%s: its card names no licence: ask its authors before you use or share it", model_id)
        return cls(load_trained(folder / WEIGHTS))

    def _save_pretrained(self, save_directory: Path) -> None:
        """The mixin's hook: weights and configuration."""
        source, target = Path(self.trained.source), save_directory / WEIGHTS
        if source.suffix == ".safetensors" and source.is_file():
            shutil.copyfile(source, target)
        elif source.is_file():
            _write_v1(self.trained, target)
        else:
            # Elsewhere first: the list of subjects that `export` leaves beside the file is not for sharing.
            with tempfile.TemporaryDirectory(dir=save_directory.parent) as folder:
                export(source, Path(folder) / WEIGHTS, which=self.which)
                (Path(folder) / WEIGHTS).replace(target)
        (save_directory / CONFIG).write_text(json.dumps(self.described(), indent=2, sort_keys=True) + "\n")
        card = source.parent / CARD
        if source.name == WEIGHTS and licence_of(source.parent) is not None:
            shutil.copyfile(card, save_directory / CARD)

    def generate_model_card(self, *args: Any, license: str = "", **kwargs: Any) -> ModelCard:
        """The card, filled from the run: data by count, scores with intervals and baselines."""
        return ModelCard(card_text(self, license))

    def described(self) -> dict[str, Any]:
        """config.json: input contract and settings, without a path or a name."""
        return {
            "library_name": "swift-fmri",
            "model_type": "swift_v2" if self.trained.step is not None else "swift_v1",
            "contract": _contract(self.contract),
            "step": self.trained.step,
            "target": self.trained.target,
            "settings": shareable(dataclasses.asdict(self.config)),
        }

    def _licence(self, given: str | None) -> str:
        found = given or licence_of(Path(self.trained.source).parent)
        if not found:
            raise UserError("a model card needs a licence: say license='cc-by-4.0', 'apache-2.0', 'other', ...")
        if not _LICENCE.fullmatch(found):
            raise UserError(f"license={found}: write it as the hub does, such as cc-by-4.0, apache-2.0, mit or other")
        return found


def load_model(
    source: str | Path, which: str = "latest", config: str | Path | None = None, **kwargs: Any
) -> Pretrained:
    """A trained model by name or place.

    Args:
        source: ORGANISATION/NAME on the hub, a folder of `save_pretrained`, a run directory, a checkpoint, an exported
            file, or a SwiFT v1 file.
        which: Of a run: latest | best | the name of a checkpoint.
        config: SwiFT v1 files only: settings (a run directory or its config.yaml).
        kwargs: Of the hub: revision, cache_dir, token, local_files_only, force_download.

    Raises:
        UserError: nothing there, no network, or nothing that swift has made.
    """
    path = Path(source).expanduser()
    if path.is_dir() and (path / WEIGHTS).is_file():
        return Pretrained.from_pretrained(path)
    if path.exists():
        return Pretrained(load_trained(path, which, config), which)
    if not _HUB_ID.fullmatch(str(source)):
        raise UserError(f"{source}: no such folder or file, and no name of the hub (ORGANISATION/NAME)")
    return Pretrained.from_pretrained(str(source), **kwargs)


def licence_of(folder: Path) -> str | None:
    """The licence that a folder's card names."""
    card = folder / CARD
    if not card.is_file():
        return None
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except ValueError:
        return None
    return str(found) if found else None


def _said(error: Exception, name: str) -> UserError:
    """One line for what the hub, the network or the disk says."""
    first = " ".join(str(error).split())[:160]
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"{name}: no such model on the hub, or it is private (then: hf auth login)")
    if isinstance(error, HfHubHTTPError):
        return UserError(f"{name}: the hub refuses ({first})")
    if isinstance(error, HFValidationError):
        return UserError(f"{name}: no name of the hub (ORGANISATION/NAME)")
    if isinstance(error, LocalEntryNotFoundError) or not getattr(error, "filename", None):
        return UserError(
            f"{name}: the hub cannot be reached and there is no copy here: no network? A folder works offline"
        )
    return UserError(f"{name}: {getattr(error, 'strerror', None) or first}")


def _contract(contract: Contract) -> dict[str, Any]:
    values = dataclasses.asdict(contract)
    values["background"] = MINIMUM if contract.background is None else contract.background
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _write_v1(trained: Trained, target: Path) -> None:
    """Imported SwiFT v1 weights in the form of an exported file."""
    entries = [
        Entry(name, value.dtype, tuple(value.shape), lambda value=value: value.detach())  # type: ignore[misc]
        for name, value in trained.model.named_parameters()
    ]
    said: dict[str, Any] = {
        "config": shareable(dataclasses.asdict(trained.config)),
        "contract": _contract(trained.contract),
    }
    said |= {"origin": "SwiFT v1"}
    write_sealed(target, entries, {"format": FORMAT} | {name: json.dumps(value) for name, value in said.items()})


# ------------------------------------------------------------------------------------------------------------- the card
def card_text(given: Pretrained, licence: str) -> str:
    """The model card."""
    cfg, trained = given.config, given.trained
    parameters = sum(parameter.numel() for parameter in given.model.parameters())
    kind = (
        f"fine-tuned on {cfg.task.name}" if cfg.task.target is not None else "pre-trained by filling in hidden patches"
    )
    lines = ["---", f"license: {licence}", "library_name: swift-fmri", "tags:", "- fmri", "- neuroimaging", "- swift"]
    origin = "SwiFT V2 (4D Swin transformer)" if trained.step is not None else "SwiFT v1, imported"
    lines += ["---", "", f"# {origin}, {cfg.model.name}", ""]
    steps = f"{trained.step:,} optimizer steps" if trained.step is not None else "steps not recorded"
    lines += [f"A model of functional MRI, {kind}: {parameters:,} parameters, {steps}. {_data(trained)}", ""]
    contract = given.contract
    tr = f"{contract.tr[0]:g} to {contract.tr[1]:g} s" if contract.tr else "not recorded"
    outside = "the scan's smallest value" if contract.background is None else f"{contract.background:g}"
    rows = {
        "grid": f"{' x '.join(map(str, contract.grid))} voxels of {contract.spacing:g} mm",
        "place of the grid": contract.placement or "not recorded",
        "orientation": contract.orientation,
        "frames": f"{contract.frames}, every {contract.frame_stride}",
        "TR": tr,
        "normalisation": contract.normalization,
        "background": outside,
    }
    lines += ["## What it must be given", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]
    lines += [
        "",
        "`swift-fmri embed` and `swift.Embedder` bring scans to that.",
        "",
        "## Scores",
        "",
        *_scores(trained),
    ]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import swift",
        "",
        'model = swift.load_model("THIS_REPOSITORY")',
        "```",
        "",
    ]
    lines += ["## Limits", "", "Not a medical device. Scores hold for people and scanners like those it was tested on."]
    return "\n".join(lines) + "\n"


def _run(trained: Trained) -> Path | None:
    """The run directory that a model came from, if it is one."""
    source = Path(trained.source)
    return next((place for place in (source, *source.parents[:2]) if (place / "config.yaml").is_file()), None)


def _summary(trained: Trained) -> dict[str, Any]:
    run = _run(trained)
    file = run / "summary.json" if run is not None else None
    found = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _data(trained: Trained) -> str:
    """How much it was trained on, by count."""
    count = _summary(trained).get("n", {}).get("train")
    if count is None:
        source = Path(trained.source)
        if source.suffix == ".safetensors":  # also one that lies in its run's folder
            from swift.parallel.checkpoint.read import FileWeights

            count = FileWeights(source).metadata.get("subject_count")
        elif _run(trained) is not None:
            from swift.parallel.checkpoint.read import find_checkpoint, metadata_of

            subjects = metadata_of(find_checkpoint(source, "latest")[1]).get("subjects")
            count = None if subjects is None else len(subjects)
    return (
        f"Trained on {count} subjects." if count is not None else "How many subjects it was trained on is not recorded."
    )


def _scores(trained: Trained) -> list[str]:
    """Scores with intervals, or the held-out error beside its baselines, of these very weights."""
    summary = _summary(trained)
    judged = summary.get("best_step", summary.get("steps"))
    if judged is not None and judged != trained.step:
        return [f"Not recorded with these weights: the run was judged with those of step {judged}."]
    if "scores" in summary:
        tested = summary["subjects"]["test"]
        head = [f"Test of {tested} subjects.", "", "| score | test | 95 % interval |", "|---|---|---|"]
        values = summary["scores"]["test"].items()
        return head + [
            f"| {name} | {'-' if value is None else f'{value:.3f}'} | {interval_text(summary, name) or '-'} |"
            for name, value in values
        ]
    if "val_l1" in summary and summary.get("baselines"):
        error = [*summary["baselines"].items(), ("**this model**", summary["val_l1"])]
        rows = sorted(((name, float(value)) for name, value in error), key=lambda row: row[1])
        head = ["Mean absolute error at hidden voxels of held-out clips; lower is better.", "", "| | L1 |", "|---|---|"]
        return head + [f"| {name} | {value:.4f} |" for name, value in rows]
    return ["Not recorded with these weights."]
