"""The plan of a dense head: FLOPs against torch's counter, what it keeps against autograd's own, its parameters."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from swift.config.schema import Config
from swift.models.heads import TargetModel
from swift.plan.activations import Widths, head_bytes, kept_bytes
from swift.plan.flops import flops_by_part, model_flops, tuning_flops
from swift.plan.geometry import geometry_of
from swift.train.contrastive import squared
from tests.small import settings

COURSES = ("model.maps=3", "task.courses=true", "model.maps_of=shared", "data.split=somewhere")
FRAMES = 8


def config(*overrides: str) -> Config:
    own = ["task=task_map", "task.map_step=2", "data.grid=[12,10,8]", "task.target.contrasts=[a,b]"]
    return settings(*own, f"data.frames={FRAMES}", *overrides)


def model_and_clip(cfg: Config) -> tuple[TargetModel, torch.Tensor, torch.Tensor]:
    grid = tuple(cfg.data.grid)
    return TargetModel(cfg.model, cfg.task, grid, FRAMES), torch.randn(1, 1, *grid, FRAMES), torch.ones(1, *grid) > 0


@pytest.mark.parametrize(
    ("head", "adapt", "courses"),
    [
        *(("map_unet", adapt, ()) for adapt in ("scratch", "linear", "attentive", "last_block", "lora", "full")),
        *(("map_local", adapt, COURSES) for adapt in ("scratch", "linear", "attentive")),
        ("map_unet", "last_block", COURSES),
    ],
)
def test_flops_are_those_that_torch_counts(head: str, adapt: str, courses: tuple[str, ...]) -> None:
    """All but the solution of the maps' equations, which torch does not count."""
    init = [] if adapt in ("scratch", "linear", "attentive") else ["init=RUN"]
    pooling = "mean" if adapt == "attentive" else "mean_std"
    cfg = config(f"task.head={head}", f"task.adapt={adapt}", f"task.pooling={pooling}", *init, *courses)
    model, x, brain = model_and_clip(cfg)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            out = model(x, brain)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        backward = counter.get_total_flops()
    geometry = geometry_of(cfg)
    found = tuning_flops(geometry, cfg.task)
    assert found.forward == pytest.approx(forward, rel=1e-9)
    assert found.backward == pytest.approx(backward, rel=1e-9)
    assert geometry.total_parameters == sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    assert sum(geometry.sizes) == geometry.total_parameters
    assert geometry.parameters["head"] == sum(p.numel() for p in model.head.parameters())
    if adapt == "scratch":
        assert model_flops(geometry).total == pytest.approx(found.total)
        assert "decoder" not in flops_by_part(geometry)


@pytest.mark.parametrize(
    ("overrides", "within"),
    [
        (["task.head=map_local"], 0.03),
        (["task.head=map_unet"], 0.03),
        (["task.head=map_unet", "task.pooling=mean"], 0.03),
        (["task.head=map_unet", "task.pooling=attention"], 0.03),
    ],
)
def test_a_head_keeps_what_the_plan_says(overrides: list[str], within: float) -> None:
    """Of encoder, head and loss, every storage once; and the head's own part of it alone."""
    cfg = config(*overrides, "model.embed_dim=16", "model.decoder_dim=16")
    model, x, brain = model_and_clip(cfg)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(storage)  # or another one may take its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), sdpa_kernel(SDPBackend.MATH):
        features = model.encoder(x, brain)
        of_encoder = sum(kept.values())
        out = model.head(features, x, brain)
        squared(out.flatten(2), torch.zeros(1, 2, out[0, 0].numel())).mean().backward()
    of_head = sum(kept.values()) - of_encoder
    geometry = geometry_of(cfg)
    final = geometry.stages[-1]
    own = head_bytes(geometry, Widths("fp32"))
    norm = final.tokens * (final.width + 2) * 4 if geometry.final_norm else 0
    assert own - norm == pytest.approx(of_head, rel=within)
    assert kept_bytes(geometry, Widths("fp32"), "none", "l2") > own
