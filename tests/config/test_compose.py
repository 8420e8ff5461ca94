"""Composition: what is legal composes, what is not gets one line that names the value and what is legal."""

from __future__ import annotations

import ast
import operator
import typing
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest

import swift
from swift.config.check import CHOICES, check, mask_unit
from swift.config.compose import conf_dir, differences, typed
from swift.config.schema import Config
from swift.utils.errors import UserError
from tests.small import composed

FOLDERS = sorted({path.parent.relative_to(conf_dir()).as_posix() for path in conf_dir().rglob("*/*.yaml")})
GROUPS = [folder for folder in FOLDERS if folder.split("/")[0] in Config.__dataclass_fields__ and folder != "launcher"]


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml") if path.stem[0] != "_")


def refused(*overrides: str) -> str:
    """The message for a wrong command line."""
    tree = composed(*overrides)
    with pytest.raises(UserError) as caught:
        typed(tree)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is legal ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group in GROUPS for choice in choices(group)], ids=lambda value: value
)
def test_every_choice_of_every_group_composes_and_checks(group: str, choice: str) -> None:
    extra = ["data.path=somewhere"] if choice == "store" else []
    cfg = typed(composed(f"{group}={choice}", *extra))
    label = cfg.model.variant if group == "model/variant" else getattr(getattr(cfg, group, None), "name", choice)
    assert label == choice
    # The file says what it is, and the directory of the default run is named after task and model.
    assert cfg.run_dir.startswith(f"runs/{cfg.task.name}-{cfg.model.name}-")


@pytest.mark.parametrize("launcher", choices("launcher"))
def test_launchers_are_added_with_a_plus(launcher: str) -> None:
    cfg = typed(composed("model=3b", "parallel=zero1", f"+launcher={launcher}"))
    assert cfg.launcher is not None
    assert cfg.launcher.name == launcher
    assert cfg.parallel.zero_stage == 1
    assert typed(composed()).launcher is None


def test_sizes_and_variants_combine() -> None:
    cfg = typed(composed("model=51m", "model/variant=joint"))
    assert (cfg.model.name, cfg.model.embed_dim, cfg.model.depths) == ("51m", 96, [2, 2, 18, 2])
    assert typed(composed("model=51m")).model.depths == [2, 2, 12, 2]
    assert typed(composed("model=v1")).model.position == "absolute"


def test_one_value_changes_one_value() -> None:
    before, after = typed(composed("run_dir=here")), typed(composed("run_dir=here", "task.mask_ratio=0.4"))
    assert differences(before, after) == ["task.mask_ratio"]
    assert replace(before, task=replace(before.task, mask_ratio=0.4)) == after


DROP = ["task.hidden=drop", "task.mask_kind=tube"]
FRAMES = ["task.hidden=drop", "task.mask_kind=frames"]


def test_the_mask_unit_follows_the_patch() -> None:
    cfg = typed(composed("model.patch_size=[6,6,6,2]"))
    assert mask_unit(cfg.task, cfg.model) == [6, 6, 6, 2]
    cfg = typed(composed("model.patch_size=[6,6,6,2]", "task.mask_unit=[12,6,6,4]"))
    assert mask_unit(cfg.task, cfg.model) == [12, 6, 6, 4]
    # What can be dropped: a token of stage 3, or of the last stage.
    cfg = typed(composed("model.patch_size=[6,6,3,2]", *DROP))
    assert mask_unit(cfg.task, cfg.model) == [24, 24, 12, 2]
    cfg = typed(composed("model.depths=[2,2]", "model.num_heads=[4,8]", *DROP))
    assert mask_unit(cfg.task, cfg.model) == [12, 12, 12, 1]
    cfg = typed(composed("model.patch_size=[6,6,6,2]", *FRAMES))
    assert mask_unit(cfg.task, cfg.model) == [6, 6, 6, 2]


# --- wrong values -------------------------------------------------------------------------------------------------
MULTIPLE = "must be a multiple of model.patch_size=[6, 6, 6, 1] on every axis"
WRONG: list[tuple[list[str], str, str]] = [
    *[([f"{name}=nonsense"], f"{name}=nonsense", ", ".join(legal)) for name, legal in CHOICES.items()],
    (["model.embed_dim=0"], "model.embed_dim=0", "at least 1"),
    (["model.depths=[]"], "model.depths=[]", "at least one stage"),
    (["model.depths=[2,2,0,2]"], "model.depths=[2, 2, 0, 2]", "4 positive integers"),
    (["model.num_heads=[4,8,8]"], "model.num_heads=[4, 8, 8]", "4 positive integers"),
    (["model.num_heads=[4,8,8,-16]"], "model.num_heads=[4, 8, 8, -16]", "4 positive integers"),
    (["model.num_heads=[5,8,8,16]"], "model.num_heads=[5, 8, 8, 16]", "stage 1 has width 24, which 5 heads do not"),
    (["model.num_heads=[8,8,8,16]"], "model.num_heads=[8, 8, 8, 16]", "a head has 3 channels; rotary positions over 3"),
    (["model.num_heads=[6,8,8,16]"], "model.num_heads=[6, 8, 8, 16]", "at least 6"),
    (["model/variant=joint", "model.position=rope"], "model.num_heads=[4, 8, 8, 16]", "over 4 axes need an even"),
    (["model.patch_size=[6,6,6]"], "model.patch_size=[6, 6, 6]", "4 positive integers"),
    (["model.patch_size=[6,6,0,1]"], "model.patch_size=[6, 6, 0, 1]", "4 positive integers"),
    (
        ["model.patch_size=[6,6,96,1]"],
        "model.patch_size=[6, 6, 96, 1]",
        "not be larger than a clip of [48, 48, 48, 20]",
    ),
    (["model.window=[4,4,4]"], "model.window=[4, 4, 4]", "4 positive integers"),
    (["model.window=[4,4,4,0]"], "model.window=[4, 4, 4, 0]", "4 positive integers"),
    (["model.decoder_dim=0"], "model.decoder_dim=0", "at least 1"),
    (["model.maps=-1"], "model.maps=-1", "a number of maps, or 0 for none"),
    (["model.tokens=brain", "model=v1"], "model.tokens=brain", "model=v1 is as it was published"),
    (["model.tokens=brain", "task.loss_background=true"], "task.loss_background=True", "no tokens outside the brain"),
    (["model.tokens=brain", "parallel.compile=true"], "parallel.compile=True", "a graph of its own"),
    (["model.tokens=brain", "task.hidden=drop", "task.mask_kind=tube"], "model.tokens=brain", "take model.tokens=box"),
    (["data.brain=cohort"], "data.brain=cohort", "about the tokens of model.tokens=brain"),
    (["model.tokens=brain", "data.brain=cohort", "model.cohort=oops"], "model.cohort", "data.brain=cohort fills it in"),
    (["model.cohort='2x2x2:/w=='"], "data.brain=scan", "the model has the tokens of its cohort"),
    (["data.brain=own"], "data.brain=own", "must be one of scan, cohort"),
    (["task.courses=true"], "task.courses=True", "is for tasks with task.target"),
    (["task=age", "task.head=map_unet"], "task.head=map_unet", "is for task.target.kind=map"),
    (["task=age", "task.average=features"], "task.average=features", "is for task.target.kind=map"),
    (["task.loss=contrastive"], "task.loss=contrastive", "pre-training takes l1, smooth_l1 or l2"),
    (["task=task_map", "task.head=pooled"], "task.head=pooled", "maps take map_local or map_unet"),
    (["task=task_map", "task.loss=l1"], "task.loss=l1", "maps take l2 or contrastive"),
    (["task=task_map", "task.select=auroc"], "task.select=auroc", "maps take loss or residual_r"),
    (["task=task_map", "task.map_step=0"], "task.map_step=0", "at least 1, or null"),
    (["task=task_map", "task.margin_own=[1]"], "task.margin_own=[1.0]", "two finite numbers"),
    (["task=task_map", "task.margin_other=[0,-1]"], "task.margin_other=[0.0, -1.0]", "two finite numbers"),
    (["task=task_map", "task.target.contrasts=[a,a]"], "task.target.contrasts=['a', 'a']", "names a contrast twice"),
    (["task=task_map", "data.augment.flip=0.5"], "data.augment.flip=0.5", "would move the scan away from its map"),
    (["model.mlp_ratio=-1"], "model.mlp_ratio=-1.0", "at least one channel"),
    (["model.mlp_ratio=0.01"], "model.mlp_ratio=0.01", "model.embed_dim=24"),
    (["model.mlp_ratio=inf"], "model.mlp_ratio=inf", "at least one channel"),
    (["model.rope_base=0"], "model.rope_base=0.0", "above 0"),
    (["model.rope_base=nan"], "model.rope_base=nan", "above 0"),
    (["model.layer_scale=nan"], "model.layer_scale=nan", "finite number or null"),
    (["model.attention_base_width=0"], "model.attention_base_width=0", "at least 1"),
    (["model.dropout=1.0"], "model.dropout=1.0", "[0, 1)"),
    (["model.attention_dropout=-0.1"], "model.attention_dropout=-0.1", "[0, 1)"),
    (["model.drop_path=1.5"], "model.drop_path=1.5", "[0, 1)"),
    (["data.grid=[48,48]"], "data.grid=[48, 48]", "3 positive integers"),
    (["data.grid=[48,48,-1]"], "data.grid=[48, 48, -1]", "3 positive integers"),
    (["data.frames=0"], "data.frames=0", "at least 1"),
    (["data.frame_stride=0"], "data.frame_stride=0", "at least 1"),
    (["data.clip_stride=0"], "data.clip_stride=0", "at least 1"),
    (["data.batch_size=0"], "data.batch_size=0", "at least 1"),
    (["data.workers=-1"], "data.workers=-1", "not be negative"),
    (["data.val_gap=-1"], "data.val_gap=-1", "not be negative"),
    (["data.revision=3"], "data.revision=3", "1 to 2"),
    (["data.spacing=0"], "data.spacing=0.0", "mm above 0"),
    (["data.spacing=inf"], "data.spacing=inf", "mm above 0"),
    (["data.val_fraction=0"], "data.val_fraction=0.0", "(0, 1), or be 0 beside data.split=FILE"),
    (["data.val_fraction=-0.1", "data.split=s.json"], "data.val_fraction=-0.1", "(0, 1)"),
    (["data.val_fraction=1"], "data.val_fraction=1.0", "(0, 1)"),
    (["data.background=nan"], "data.background=nan", "finite"),
    (["data=store"], "data.path=None", "needs the folder of a store"),
    (["data=store", "data.path="], "data.path=", "needs the folder of a store"),
    (["data.mixture=[{path: a, weight: 1.0}]"], "data.mixture=['a']", "needs data=store"),
    (["data=store", "data.path=x", "data.mixture=[{path: a, weight: null}]"], "data.path=x", "must be null beside"),
    (
        ["data=store", "data.path=null", "data.mixture=[{path: a, weight: 1},{path: a, weight: 1}]"],
        "data.mixture=['a', 'a']",
        "names a store twice",
    ),
    (
        ["data=store", "data.path=null", "data.mixture=[{path: a, weight: 1},{path: b, weight: null}]"],
        "data.mixture weights=[1.0, None]",
        "above 0 for all cohorts, or null for all",
    ),
    (["data.max_subjects=0"], "data.max_subjects=0", "at least 1, or null"),
    (["data.max_frames=0"], "data.max_frames=0", "at least 1, or null"),
    *[
        ([f"data.augment.{name}=1.5"], f"data.augment.{name}=1.5", "[0, 1]")
        for name in ("flip", "affine", "intensity", "noise")
    ],
    *[
        ([f"data.augment.{name}=-1"], f"data.augment.{name}=-1.0", "0 or more")
        for name in ("shift", "intensity_scale", "intensity_shift", "noise_std")
    ],
    (["data.augment.rotate=181"], "data.augment.rotate=181.0", "[0, 180] degrees"),
    (["data.augment.zoom=1"], "data.augment.zoom=1.0", "[0, 1)"),
    (["trainer.checkpoint_every=-1"], "trainer.checkpoint_every=-1", "not be negative"),
    (["task.mask_ratio=1.2"], "task.mask_ratio=1.2", "(0, 1)"),
    (["task.mask_ratio=1"], "task.mask_ratio=1.0", "(0, 1)"),
    (["task.mask_ratio=0"], "task.mask_ratio=0.0", "(0, 1)"),
    (["task.mask_ratio=nan"], "task.mask_ratio=nan", "(0, 1)"),
    (["task.mask_unit=[6,6,6]"], "task.mask_unit=[6, 6, 6]", "4 positive integers"),
    (["task.mask_unit=[]"], "task.mask_unit=[]", "4 positive integers"),
    (["task.mask_unit=[9,6,6,1]"], "task.mask_unit=[9, 6, 6, 1]", MULTIPLE),
    (["task.mask_unit=[6,6,6,0]"], "task.mask_unit=[6, 6, 6, 0]", "4 positive integers"),
    (["task.mask_unit=[54,6,6,1]"], "task.mask_unit=[54, 6, 6, 1]", "not be larger than a clip"),
    (["task.mask_unit=[48,48,48,20]"], "task.mask_unit=[48, 48, 48, 20]", "at least 2 units"),
    (["task.mask_kind=tube", "task.mask_unit=[48,48,48,1]"], "task.mask_unit=[48, 48, 48, 1]", "task.mask_kind=tube"),
    (
        ["task.mask_kind=temporal", "task.mask_unit=[6,6,6,20]"],
        "task.mask_unit=[6, 6, 6, 20]",
        "task.mask_kind=temporal",
    ),
    (["task.hidden=gone"], "task.hidden=gone", "token, drop"),
    (["task.hidden=drop"], "task.mask_kind=random", "take tube (the same places in all frames), or frames"),
    (["task.hidden=drop", "task.mask_kind=temporal"], "task.mask_kind=temporal", "or frames (all places)"),
    ([*DROP, "model=v1"], "model.variant=v1", "factorized or joint"),
    ([*DROP, "task.mask_unit=[12,24,24,1]"], "task.mask_unit=[12, 24, 24, 1]", "[24, 24, 24] voxels in x, y, z"),
    ([*DROP, "task.mask_unit=[9,24,24,1]"], "task.mask_unit=[9, 24, 24, 1]", MULTIPLE),
    ([*DROP, "data.grid=[48,60,48]"], "data.grid=[48, 60, 48]", "multiple of task.mask_unit=[24, 24, 24]"),
    ([*DROP, "model.decoder=linear"], "model.decoder=linear", "leave it at local"),
    ([*DROP, "model.maps=3"], "model.maps=3", "take model.maps=0"),
    ([*FRAMES, "model.maps=3"], "model.maps=3", "take model.maps=0"),
    ([*FRAMES, "model.decoder=linear"], "model.decoder=linear", "leave it at local"),
    ([*FRAMES, "model.tokens=brain"], "model.tokens=brain", "take model.tokens=box"),
    ([*FRAMES, "task.mask_unit=[6,6,6,8]"], "data.frames=20", "fill whole units of 8 frames (task.mask_unit)"),
    ([*FRAMES, "task.mask_unit=[6,6,6,20]"], "task.mask_unit=[6, 6, 6, 20]", "at least 2 units to choose from"),
    ([*DROP, "parallel.compile=true"], "parallel.compile=True", "not built with task.hidden=drop"),
    (["task=sex", "task.hidden=drop"], "task.hidden=drop", "a task sees all patches"),
    (["optimizer.lr=0"], "optimizer.lr=0.0", "above 0"),
    (["optimizer.lr=nan"], "optimizer.lr=nan", "above 0"),
    (["optimizer.lr=inf"], "optimizer.lr=inf", "finite"),
    (["optimizer.weight_decay=-0.1"], "optimizer.weight_decay=-0.1", "not negative"),
    (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]", "two numbers in [0, 1)"),
    (["optimizer.betas=[0.9,1.0]"], "optimizer.betas=[0.9, 1.0]", "two numbers in [0, 1)"),
    (["optimizer.eps=0"], "optimizer.eps=0.0", "above 0"),
    (["optimizer.warmup_steps=-1"], "optimizer.warmup_steps=-1", "not be negative"),
    (["optimizer.min_lr_ratio=1.5"], "optimizer.min_lr_ratio=1.5", "[0, 1]"),
    (["optimizer.base_width=24"], "optimizer.base_width=24", "must be null"),
    (["optimizer.eps_scaled=true"], "optimizer.eps_scaled=True", "must be false"),
    (["optimizer=adamw_mup", "optimizer.base_width=null"], "optimizer.base_width=None", "embed_dim of its base model"),
    (["optimizer=adamw_mup", "optimizer.base_width=25"], "optimizer.base_width=25", "no model of that width"),
    (
        ["optimizer=adamw_mup", "optimizer.base_width=24", "model.attention_base_width=48"],
        "model.attention_base_width=48",
        "must equal optimizer.base_width=24",
    ),
    *[
        ([f"trainer.{name}=0"], f"trainer.{name}=0", "at least 1")
        for name in ("max_steps", "val_every", "log_every", "accumulate", "keep_checkpoints")
    ],
    (["trainer.val_batches=-1"], "trainer.val_batches=-1", "not be negative"),
    (["trainer.threads=-1"], "trainer.threads=-1", "not be negative"),
    (["trainer.clip_norm=-1"], "trainer.clip_norm=-1.0", "not be negative"),
    (["trainer.phases_every=-1"], "trainer.phases_every=-1", "not be negative"),
    (["guard.action=ignore"], "guard.action=ignore", "must be one of"),
    (["guard.window=3"], "guard.window=3", "at least 4"),
    (["guard.limit=0"], "guard.limit=0", "at least 1"),
    *[([f"guard.{name}=-1"], f"guard.{name}=-1", "at least 0") for name in ("patience", "records", "batches")],
    *[([f"guard.{name}=-1"], f"guard.{name}=-1.0", "not negative") for name in ("spike", "weights_mb")],
    (["parallel=zero1", "parallel.zero_stage=2"], "parallel.zero_stage=2", "parallel=zero1 means 1"),
    (["parallel=ddp", "parallel.devices=-1"], "parallel.devices=-1", "not be negative"),
    (["parallel=ddp", "parallel.nodes=0"], "parallel.nodes=0", "at least 1"),
    (["parallel=hsdp", "parallel.group=-1"], "parallel.group=-1", "not be negative"),
    (["parallel=fsdp", "parallel.group=4"], "parallel.group=4", "only parallel=hsdp and zero3 have groups"),
    (["parallel=zero3", "parallel.group=1"], "parallel.group=1", "each rank would hold all weights"),
    (["parallel=hsdp", "parallel.unit_mb=0"], "parallel.unit_mb=0.0", "above 0"),
    (["parallel=zero3", "parallel.unit_mb=100"], "parallel.unit_mb=100.0", "only parallel=fsdp and hsdp"),
    (["parallel.devices=2"], "parallel.devices=2", "choose parallel=ddp"),
    (["parallel.nodes=2"], "parallel.nodes=2", "choose parallel=ddp"),
    (["parallel=zero2", "parallel.offload_optimizer=true"], "parallel.offload_optimizer=True", "zero3_offload"),
    (["parallel=ddp", "parallel.offload_parameters=true"], "parallel.offload_parameters=True", "zero3_offload"),
    (["parallel=zero3", "parallel.offload_parameters=true"], "parallel.offload_parameters=True", "together with"),
    (["parallel.reduce_bucket_mb=0"], "parallel.reduce_bucket_mb=0.0", "above 0"),
    (
        ["parallel.compile=true", "parallel.activation_checkpointing=selective"],
        "parallel.activation_checkpointing=selective",
        "use block or none, or parallel.compile=false",
    ),
    (["parallel=zero3", "parallel.compile=true"], "parallel.compile=True", "take false, or parallel=zero2"),
    (
        ["parallel=fsdp", "parallel.unit_mb=9", "parallel.compile=true"],
        "parallel.compile=True",
        "parallel.unit_mb=null",
    ),
    (["parallel.compile=maybe"], "parallel.compile=maybe", "must be true or false, or null"),
    (
        ["parallel=zero1", "parallel.fp32_gradients=true"],
        "parallel.fp32_gradients=True",
        "only parallel=zero2 and zero3",
    ),
    (["parallel.gather_bucket_mb=-1"], "parallel.gather_bucket_mb=-1.0", "above 0"),
    (["parallel.timeout_minutes=0"], "parallel.timeout_minutes=0.0", "above 0"),
    (["seed=-1"], "seed=-1", "[0, 4294967295]"),
    (["seed=4294967296"], "seed=4294967296", "[0, 4294967295]"),
    (["run_dir="], "run_dir=''", "must name a folder"),
    # Tasks with a target.
    (["task.name=mine"], "task.name=mine", "a task without task.target is pretrain"),
    (["task=sex", "task.name=pretrain"], "task.name=pretrain", "a name of its own"),
    (["task.target={kind: binary}"], "task.name=pretrain", "a name of its own"),
    (["task=sex", "task.target.kind=nonsense"], "task.target.kind=nonsense", "binary, multiclass, regression"),
    (["task=sex", "task.target.per=voxel"], "task.target.per=voxel", "subject, frame"),
    (["task=sex", "task.target.source=nonsense"], "task.target.source=nonsense", "manifest, events, confounds"),
    (
        ["task=sex", "task.target.source=events"],
        "task.target.source=events",
        "per=subject is read from source=manifest",
    ),
    (["task=sex", "task.target.others=drop"], "task.target.others=drop", "refuse, leave_out"),
    (["task=sex", "task.target.column=null"], "task.target.column=None", "must name a column"),
    (["task=sex", "task.target.classes=[F]"], "task.target.classes=['F']", "two names for kind=binary"),
    (["task=sex", "task.target.classes=[F,F|M]"], "task.target.classes=['F', 'F|M']", "must differ"),
    (["task=diagnosis", "task.target.classes=[a,b]"], "task.target.classes=['a', 'b']", "three or more"),
    (["task=age", "task.target.classes=[a,b]"], "task.target.classes=['a', 'b']", "a regression has none"),
    (["task=sex", "+task.target.foo=1"], "task.target.foo=1", "those of task.target are kind, per"),
    (["task=sex", "task.target.delay_seconds=-1"], "task.target.delay_seconds=-1", "0 or more"),
    (["task=task_rest", "task.target.bridge_seconds=-1"], "task.target.bridge_seconds=-1", "0 or more"),
    (["task=task_rest", "task.target.response=fir"], "task.target.response=fir", "shift, hrf"),
    (["task=task_rest", "task.target.response=hrf"], "task.target.response=hrf", "kind=regression"),
    (["task=sex", "task.loss=l1"], "task.loss=l1", "classes are trained with cross_entropy"),
    (["task=age", "task.loss=cross_entropy"], "task.loss=cross_entropy", "l1, smooth_l1 or l2"),
    (["task.loss=cross_entropy"], "task.loss=cross_entropy", "pre-training takes l1"),
    (["task.adapt=linear"], "task.adapt=linear", "is for tasks with task.target"),
    (["task=sex", "init=somewhere"], "init=somewhere", "task.adapt=scratch begins with random weights"),
    *[
        (["task=sex", f"task.adapt={adapt}"], f"task.adapt={adapt}", "needs init=RUN_OR_FILE")
        for adapt in ("last_block", "lora", "full")
    ],
    (
        ["task=sex", "init=x", "task.adapt=attentive", "task.pooling=mean_std"],
        "task.pooling=mean_std",
        "leave it at mean",
    ),
    (["task.layer_decay=0"], "task.layer_decay=0.0", "(0, 1]"),
    (["task.lora_rank=0"], "task.lora_rank=0", "at least 1"),
    (["task.lora_alpha=0"], "task.lora_alpha=0.0", "above 0"),
    (["task.patience=-1"], "task.patience=-1", "not be negative"),
    (["task.eval_stride=0"], "task.eval_stride=0", "at least 1, or null"),
    (["task.test_fraction=1"], "task.test_fraction=1.0", "(0, 1)"),
    (["task.class_weights=[1,-1]"], "task.class_weights=[1.0, -1.0]", "numbers above 0"),
    (["task=sex", "task.class_weights=[1,1,1]"], "task.class_weights=[1.0, 1.0, 1.0]", "each of the 2 classes"),
    (["task=age", "task.class_weights=[1]"], "task.class_weights=[1.0]", "a regression has no classes"),
    (["task=age", "task.balance=true"], "task.balance=True", "a regression has no classes"),
    (["task=age", "task.select=auroc"], "task.select=auroc", "kind=regression takes loss, mae, r"),
    (["task=sex", "task.select=mae"], "task.select=mae", "kind=binary takes loss, auroc"),
    # Types.
    (["model.embed_dim=wide"], "model.embed_dim=wide", "must be an integer"),
    (["trainer.max_steps=1.5"], "trainer.max_steps=1.5", "must be an integer"),
    (["optimizer.lr=fast"], "optimizer.lr=fast", "must be a number"),
    (["trainer.figures=maybe"], "trainer.figures=maybe", "must be true or false"),
    (["model.layer_scale=small"], "model.layer_scale=small", "must be a number, or null"),
    (["model.depths=3"], "model.depths=3", "must be a list of integers"),
    (["data.grid=[48,x,48]"], "data.grid=[48, 'x', 48]", "must be a list of integers"),
    (["task.mask_unit=6"], "task.mask_unit=6", "must be a list of integers such as [6,6,6,1], or null"),
    (["optimizer.betas=0.9"], "optimizer.betas=0.9", "must be a list of numbers"),
    (["model.depths=null"], "model.depths=None", "must be a list of integers"),
    (["run_dir=null"], "run_dir=None", "must be a text"),
    # Keys.
    (["+model.foo=1"], "model.foo=1", "those of model are name, embed_dim, depths"),
    (["+trainer.foo={a: 1}"], "trainer.foo={'a': 1}", "those of trainer are max_steps"),
    (["+foo=1"], "foo=1", "those are model, data, task"),
    (["~task.loss"], "task.loss is missing", "task.loss=..."),
    (["data=_common"], "data.name is missing", "data.name=..."),
    (["data.path=${nowhere}"], "data.path", "'nowhere' not found"),
]


@pytest.mark.parametrize(
    ("overrides", "given", "legal"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_wrong_value_is_named_with_what_is_legal(overrides: list[str], given: str, legal: str) -> None:
    message = refused(*overrides)
    assert message.startswith(given), message
    assert legal in message, message


EDGES = [
    {"task.mask_ratio": 0.01, "optimizer.min_lr_ratio": 1.0, "optimizer.weight_decay": 0.0, "seed": 2**32 - 1},
    {"task.mask_unit": [48, 48, 48, 10], "model.dropout": 0.99, "trainer.clip_norm": 0.0, "optimizer.warmup_steps": 0},
    {"model.layer_scale": None, "data.val_gap": 0, "trainer.val_batches": 0, "model.num_heads": [1, 1, 1, 1]},
    {"model.patch_size": [48, 48, 48, 1], "model.depths": [1], "model.num_heads": [2]},
    {"data.val_fraction": 0.0, "data.split": "s.json"},
]


@pytest.mark.parametrize("edges", EDGES, ids=lambda edges: " ".join(edges))
def test_the_edges_of_the_legal_are_legal(edges: dict[str, object]) -> None:
    written = {name: "null" if value is None else str(value).replace(" ", "") for name, value in edges.items()}
    cfg = typed(composed(*(f"{name}={text}" for name, text in written.items())))
    assert {name: operator.attrgetter(name)(cfg) for name in edges} == edges
    # Each differs from what the files say, so that one that is not taken over shows.
    plain = typed(composed())
    assert [name for name in edges if operator.attrgetter(name)(plain) == edges[name]] == []


CHECKED_TOGETHER = {
    "wandb", "figures", "patch_norm", "final_norm", "verify", "split", "path", "init", "resume", "launcher",
    "loss_background", "cpu_adam", "compile", "overlap", "budget_seed", "stage_dir", "checkpoint_background",
    "allow_seen", "allow_id_leak", "repeat_batch", "exclude",
}  # fmt: skip
"""Settings of which every value of the type is legal here; files and folders are looked at when they are opened."""


def settings_of(kind: type, prefix: str = "") -> list[str]:
    """Names of all settings, as SECTION.NAME."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        found += settings_of(hint, f"{prefix}{name}.") if is_dataclass(hint) else [prefix + name]
    return found


def test_the_list_of_wrong_values_is_complete() -> None:
    """Every setting that has an illegal value stands in WRONG, so a new one cannot go without a check and a test."""
    tried = {override.lstrip("+~").partition("=")[0] for overrides, _, _ in WRONG for override in overrides}
    free = {name for name in settings_of(Config) if name.split(".")[-1] in CHECKED_TOGETHER}
    labels = {"model.name", "model.variant", "data.path"}
    assert set(settings_of(Config)) - tried - free - labels == set()


def test_checks_look_at_typed_settings_too() -> None:
    cfg = typed(composed())
    check(cfg)
    with pytest.raises(UserError, match=r"^task\.mask_ratio=2: "):
        check(replace(cfg, task=replace(cfg.task, mask_ratio=2)))


# --- no dead setting ----------------------------------------------------------------------------------------------
def accesses() -> set[tuple[str, str]]:
    """(last name of the object, attribute) for every attribute read in swift/, apart from the checks themselves."""
    found = set()
    for path in Path(swift.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name == "check.py":
            tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and "check" not in node.name]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                found.add((owner, node.attr))
    return found


def test_every_setting_is_read_somewhere() -> None:
    read = accesses()
    dead = []
    for setting in settings_of(Config):
        section, _, name = setting.rpartition(".")
        owners = {"cfg", "config", section.rpartition(".")[2] or "cfg"}
        # What the optimizer is, its base width says; the name is checked against it.
        if setting != "optimizer.name" and not any((owner, name) in read for owner in owners):
            dead.append(setting)
    assert dead == []
