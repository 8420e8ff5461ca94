"""Dense heads against loops over voxels: pooling, doubling, cells of patches, summaries; and every adaptation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swift.config.schema import Config
from swift.models.course_moments import count_of, course_moments
from swift.models.heads import TargetModel
from swift.models.init import initial_values, initialize
from swift.models.map_heads import ConvBlock, LocalMapHead, TimePool, UnetMapHead, summaries
from tests.small import settings

GRID = (12, 10, 8)


def config(*overrides: str) -> Config:
    own = ["task=task_map", "task.map_step=2", "data.grid=[12,10,8]", "task.target.contrasts=[a,b]"]
    return settings(*own, *overrides)


def model_of(*overrides: str, init: bool = True) -> tuple[TargetModel, Tensor, Tensor]:
    cfg = config(*overrides)
    torch.manual_seed(0)
    model = TargetModel(cfg.model, cfg.task, GRID, 8).double()
    values = initial_values(model)
    initialize(model, values, 3)
    if init:
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 1, *GRID, 8, dtype=torch.float64)
    brain = torch.rand(2, *GRID) > 0.3
    return model.eval(), x * brain[:, None, ..., None], brain


@pytest.mark.parametrize("kind", ["mean", "mean_std", "attention"])
def test_pooling_over_time_against_numpy(kind: str) -> None:
    pool = TimePool(6, kind).double()
    x = torch.randn(2, 3, 2, 1, 5, 6, dtype=torch.float64)
    found, values = pool(x).detach().numpy(), x.numpy()
    for place in np.ndindex(2, 3, 2, 1):
        course = values[place]
        if kind == "attention":
            assert pool.query is not None
            query = pool.query.weight.detach().numpy()[0]
            normed = (course - course.mean(1, keepdims=True)) / np.sqrt(course.var(1, keepdims=True) + 1e-5)
            weight = np.exp(normed @ query)
            wanted = weight @ course / weight.sum()
        else:
            wanted = course.mean(0)
            wanted = wanted if kind == "mean" else np.concatenate([wanted, np.sqrt(course.var(0) + 1e-6)])
        np.testing.assert_allclose(found[place], wanted, rtol=1e-9)


def slow_hidden(head: Any, pooled: list[Tensor], blocks: bool) -> Tensor:
    """`_down` token by token."""
    hidden = None
    for stage in reversed(range(len(pooled))):
        here = head.laterals[stage](head.norms[stage](pooled[stage])).clone()
        if hidden is not None:
            for x, y, z in np.ndindex(*here.shape[1:4]):
                here[:, x, y, z] += hidden[:, x // 2, y // 2, z // 2]
        if stage == 0:
            here = here + head.place.space
        hidden = head.blocks[stage](here) if blocks else here
    assert hidden is not None
    return hidden


@torch.no_grad()
def test_the_local_head_is_a_linear_map_of_each_patch() -> None:
    model, x, brain = model_of("task.head=map_local")
    head = model.head
    assert isinstance(head, LocalMapHead)
    out = model(x, brain)
    assert out.shape == (2, 2, 6, 5, 4)
    pooled = [TimePool(1, "mean_std")(feature) for feature in model.encoder(x)]
    hidden = slow_hidden(head, pooled, False)
    for k, cx, cy, cz in np.ndindex(2, 6, 5, 4):
        token = F.gelu(head.norm(hidden[:, cx // 2, cy // 2, cz // 2]))
        row = ((k * 2 + cx % 2) * 2 + cy % 2) * 2 + cz % 2
        wanted = token @ head.out.weight[row] + head.out.bias[row]
        torch.testing.assert_close(out[:, k, cx, cy, cz], wanted.float())


@torch.no_grad()
def test_the_unet_head_joins_stages_and_summaries() -> None:
    model, x, brain = model_of("task.head=map_unet")
    head = model.head
    assert isinstance(head, UnetMapHead)
    pooled = [TimePool(1, "mean_std")(feature) for feature in model.encoder(x)]
    hidden = head.narrow(slow_hidden(head, pooled, True))  # 3 x 3 x 2 patches of 2 x 2 x 2 cells
    big = torch.zeros(2, 6, 6, 4, hidden.shape[-1], dtype=hidden.dtype)
    for cell in np.ndindex(6, 6, 4):
        for corner in np.ndindex(2, 2, 2):
            weight, at = 1.0, []
            for c, side, size in zip(cell, corner, hidden.shape[1:4], strict=True):
                place = min(max((c + 0.5) / 2 - 0.5, 0), size - 1)
                low = int(place)
                at.append(min(low + side, size - 1))
                weight *= (place - low) if side else 1 - (place - low)
            big[:, *cell] += weight * hidden[:, *at]
    fine = head.fine(big[:, :, :5] + head.skip(summaries(x, brain, 2).double()))
    wanted = head.out(F.gelu(head.norm(fine))).movedim(-1, 1)
    torch.testing.assert_close(model(x, brain), wanted.float())


@torch.no_grad()
def test_a_block_against_a_loop() -> None:
    block = ConvBlock(3).double()
    x = torch.randn(1, 3, 4, 2, 3, dtype=torch.float64)
    inner = F.gelu(F.layer_norm(x, (3,)))
    wanted = x + block.conv.bias
    for at in np.ndindex(3, 4, 2):
        for offset in np.ndindex(3, 3, 3):
            place = [a + o - 1 for a, o in zip(at, offset, strict=True)]
            if all(0 <= p < n for p, n in zip(place, (3, 4, 2), strict=True)):
                wanted[0, *at] += block.conv.weight[:, :, *offset] @ inner[0, *place]
    torch.testing.assert_close(block(x), wanted)


def test_summaries_against_numpy() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (1, 1, 4, 4, 5, 7))
    brain = rng.random((1, 4, 4, 5)) > 0.4
    brain[0, 2:, 2:, 4] = False
    found = summaries(torch.from_numpy(x), torch.from_numpy(brain), 2)[0].numpy()
    courses, weights = {}, {}
    for cell in np.ndindex(2, 2, 3):
        box = tuple(slice(2 * c, 2 * c + 2) for c in cell)
        inside = brain[0][box]
        size = inside.size
        if inside.any():
            courses[cell] = x[0, 0][box][inside].mean(0)
            weights[cell] = inside.sum() / size
    whole = sum(weights[cell] * (course - course.mean()) for cell, course in courses.items())
    assert (1, 1, 2) not in courses
    assert not found[1, 1, 2].any()
    for cell, course in courses.items():
        rest = course - course.mean()
        lag = (rest[1:] * rest[:-1]).mean() / rest.var()
        wanted = [course.mean(), np.log(course.std()), lag, np.corrcoef(course, whole)[0, 1]]
        np.testing.assert_allclose(found[cell], wanted, atol=2e-5)


@pytest.mark.parametrize("head", ["map_local", "map_unet"])
@pytest.mark.parametrize("courses", [False, True])
def test_a_new_head_says_the_training_mean(head: str, courses: bool) -> None:
    own = ["model.maps=5", "task.courses=true", "data.split=somewhere"] if courses else []
    model, x, brain = model_of(f"task.head={head}", *own, init=False)
    assert not model(x, brain).any()


@pytest.mark.parametrize("adapt", ["scratch", "linear", "attentive", "last_block", "lora", "full"])
@pytest.mark.parametrize("head", ["map_local", "map_unet"])
def test_every_adaptation_trains_what_it_says(head: str, adapt: str) -> None:
    init = [] if adapt in ("scratch", "linear", "attentive") else ["init=RUN"]
    pooling = "mean" if adapt == "attentive" else "mean_std"
    model, x, brain = model_of(f"task.head={head}", f"task.adapt={adapt}", f"task.pooling={pooling}", *init)
    model(x, brain).square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved >= {"head.out.weight", "head.place.space", "head.laterals.0.weight", "head.laterals.1.weight"}
    encoder = {name for name in moved if name.startswith("encoder.")}
    if adapt in ("linear", "attentive"):
        assert not encoder
    elif adapt == "lora":
        assert all(".lora_" in name for name in encoder)
        assert encoder
    elif adapt == "last_block":
        assert any(name.startswith("encoder.stages.1.") for name in encoder)
        assert not any(name.startswith("encoder.stages.0.") for name in encoder)
    else:
        assert "encoder.patch_embed.proj.weight" in encoder or any("patch_embed" in name for name in encoder)
    assert ("head.pools.0.query.weight" in moved) == (adapt == "attentive")


@torch.no_grad()
@pytest.mark.parametrize("head", ["map_local", "map_unet"])
def test_courses_add_patterns_times_numbers_read_from_their_moments(head: str) -> None:
    """Against numpy, from the courses on; and what is averaged over clips holds the moments."""
    own = ["model.maps=5", "model.maps_of=shared", "task.courses=true", "data.split=somewhere"]
    model, x, brain = model_of(f"task.head={head}", *own)
    assert model.linear is not None
    model.linear.maps.normal_(std=0.05)  # courses of about unit variance
    part: Any = model.head.of_courses
    out = model(x, brain)
    courses = model.linear.courses_of_all(x, brain).numpy()
    pooled = model.pooled(x, brain)
    assert [tuple(one.shape[1:]) for one in pooled] == model.head.shapes()
    plain = model.head.dense(pooled[:-1])
    weight, bias = part.numbers.weight.numpy(), part.numbers.bias.numpy()
    for row in range(2):
        pairs = np.arctanh(np.corrcoef(courses[row].T)[np.triu_indices(5, 1)])
        moments = np.concatenate([pairs, np.log(courses[row].std(0))])
        np.testing.assert_allclose(pooled[-1][row], moments, rtol=1e-4)
        numbers = (weight @ moments + bias).reshape(2, -1)
        wanted = np.einsum("kr,rxyz->kxyz", numbers, part.patterns.numpy())
        np.testing.assert_allclose((out - plain)[row], wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.head.decode(pooled), out)


@torch.no_grad()
def test_moments_of_a_clip_without_brain_are_finite() -> None:
    found = course_moments(torch.zeros(1, 6, 3))
    assert found.shape == (1, count_of(3))
    assert torch.isfinite(found).all()
    same = course_moments(torch.randn(1, 6, 1).expand(-1, -1, 2))
    assert same[0, 0].item() == pytest.approx(np.arctanh(0.99), rel=1e-5)


@torch.no_grad()
def test_the_mean_of_pooled_features_is_that_of_one_clip_seen_twice() -> None:
    model, x, brain = model_of()
    head = model.head
    assert isinstance(head, UnetMapHead)
    pooled = head.pooled(
        model.encoder(x[:1].repeat(2, 1, 1, 1, 1, 1)), x[:1].repeat(2, 1, 1, 1, 1, 1), brain[:1].repeat(2, 1, 1, 1)
    )
    assert [tuple(one.shape[1:]) for one in pooled] == head.shapes()
    torch.testing.assert_close(head.decode([one.mean(0, keepdim=True) for one in pooled]), model(x[:1], brain[:1]))


def test_cells_that_no_patch_holds_whole_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task.map_step=3: does not divide model.patch_size=\[4, 4, 4, 2\]"):
        model_of("task.map_step=3")
