"""muP of what a task adds to an encoder (head, attention pooling, low-rank changes): factors, values, steps by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from swift.models.adapt import is_lora
from swift.models.init import Init, fill
from swift.models.pooling import brain_tokens
from swift.train.finetune import FinetuneModule
from swift.train.optim import build_optimizer
from tests.models.test_heads import clip, task, trained

BASE, WIDTH = 6, 24
M = WIDTH / BASE
LR, DECAY = 0.01, 0.1
OPTIMIZERS = {
    "adamw": ["optimizer=adamw"],
    "mup": ["optimizer=adamw_mup", f"optimizer.base_width={BASE}"],
}

# What each parameter is, written down by hand; the first pattern that matches counts.
KINDS = (
    (r"head\.linear\.weight", "output"),
    (r"head\.linear\.bias", "finite"),
    (r"head\.pool\.(q|kv|proj|mlp\.fc1|mlp\.fc2)\.weight", "hidden"),
    (r"head\.pool\.latent", "vector"),
    (r"encoder\..*\.(qkv|proj)\.lora_A\.default\.weight", "output"),
    (r"encoder\..*\.(qkv|proj)\.lora_B\.default\.weight", "input"),
    (r"encoder\.patch_embed\.proj\.weight", "input"),
    (r"encoder\..*\.((qkv|proj)(\.base_layer)?|fc1|fc2|reduction)\.weight", "hidden"),
    (r".*(bias|norm\.weight|norms\.\d\.weight|gamma)", "vector"),
)
# kind -> factor on initial values, on the rate, on the weight decay, on eps.
FACTORS = {
    "input": (1.0, 1.0, 1.0, 1 / M),
    "vector": (1.0, 1.0, 1.0, 1 / M),
    "finite": (1.0, 1.0, 1.0, 1.0),
    "hidden": (M**-0.5, 1 / M, M, 1 / M),
    "output": (1 / M, 1 / M, M, 1.0),
}
DECAYED = ("input", "hidden", "output")


def kind_by_hand(name: str) -> str:
    return next(kind for pattern, kind in KINDS if re.fullmatch(pattern, name))


def module_of(adapt: str, optimizer: str, *overrides: str) -> FinetuneModule:
    torch.set_num_threads(1)
    own = [f"model.embed_dim={WIDTH}", f"optimizer.lr={LR}", f"optimizer.weight_decay={DECAY}", *overrides]
    module = FinetuneModule(task(adapt, *own, *OPTIMIZERS[optimizer]))
    module.target_info = {"classes": ["0", "1"], "class_weights": [1.0, 1.0]}
    return module


def factors(name: str, optimizer: str) -> tuple[float, float, float, float]:
    return FACTORS[kind_by_hand(name)] if optimizer == "mup" else (1.0, 1.0, 1.0, 1.0)


def build(module: FinetuneModule) -> torch.optim.Optimizer:
    return build_optimizer(module.model, module.cfg.optimizer, module.widths, rates=module.rates())


@pytest.mark.parametrize("adapt", ["attentive", "lora"])
def test_every_parameter_has_its_kind_and_its_factors(adapt: str) -> None:
    module = module_of(adapt, "mup")
    assert module.widths is not None
    assert list(module.widths) == [name for name, _ in module.model.named_parameters()]
    for name, scale in module.widths.items():
        assert scale.kind == kind_by_hand(name), name
        assert (scale.init, scale.lr, scale.decay, scale.eps) == pytest.approx(FACTORS[scale.kind]), name


def std_by_hand(name: str, fan_in: int) -> Init:
    """Of the base model's width, times the factor."""
    if is_lora(name):
        if ".lora_B." in name:
            return Init(False, 0.0)
        return Init(True, 1 / math.sqrt(3 * fan_in / M) / M)
    if name.endswith("bias"):
        return Init(False, 0.0)
    if name.endswith("norm.weight"):
        return Init(False, 1.0)
    return Init(True, 0.02 * FACTORS[kind_by_hand(name)][0])


@pytest.mark.parametrize("adapt", ["attentive", "lora"])
def test_initial_values_are_those_of_the_base_model_times_the_factor(adapt: str) -> None:
    module = module_of(adapt, "mup")
    for name in trained(module.model):
        parameter = module.model.get_parameter(name).detach()
        wanted = torch.empty(parameter.numel())
        fill(wanted, std_by_hand(name, parameter.shape[-1]), module.cfg.seed, f"model.{name}")
        torch.testing.assert_close(parameter, wanted.view_as(parameter), rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_initial_values_need_no_shapes_of_weights(optimizer: str) -> None:
    """Under ZeRO 3 every parameter is an empty vector when its values are drawn."""
    module = module_of("lora", optimizer)
    wanted = module.initial_values()
    for parameter in module.parameters():
        parameter.data = torch.empty(0)
    assert module.initial_values() == wanted


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("adapt", ["linear", "attentive", "last_block", "lora"])
def test_a_step_moves_what_trains_at_its_own_rate_and_nothing_else(adapt: str, optimizer: str) -> None:
    """Adam's first step is -rate * sign(gradient), after the decay; the second reaches A, whose gradient B=0 hid."""
    module = module_of(adapt, optimizer)
    stepper = build(module)
    named = dict(module.model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    x, brain = clip()
    for step in range(2):
        stepper.zero_grad()
        module.loss(module.model(x, brain), torch.tensor([0.0, 1.0])).backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        stepper.step()
        if step == 0:
            after = {name: parameter.detach().clone() for name, parameter in named.items()}
    moving = trained(module.model)
    assert gradients.keys() == moving
    for name, old in before.items():
        if name not in moving:
            assert torch.equal(named[name], old), name
            continue
        assert not torch.equal(named[name], after[name]), name
        _, rate, decay, eps = factors(name, optimizer)
        decay = DECAY * decay if kind_by_hand(name) in DECAYED else 0.0
        gradient = gradients[name]
        wanted = old * (1 - LR * rate * decay) - LR * rate * gradient / (gradient.abs() + 1e-8 * eps)
        torch.testing.assert_close(after[name], wanted, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_attention_pooling_divides_scores_as_the_parametrization_says(optimizer: str) -> None:
    model: Any = module_of("attentive", optimizer).model.double().eval()
    pool = model.head.pool
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    _, brain = clip()
    features = torch.randn(2, 2, 2, 2, 4, 2 * WIDTH, generator=generator, dtype=torch.float64)
    seen = brain_tokens(brain, model.head.patch, 1)
    head_dim, base_dim = WIDTH, BASE  # two heads share the 2 * WIDTH channels of the last stage
    scale = math.sqrt(base_dim) / head_dim if optimizer == "mup" else head_dim**-0.5
    found = model.head._pooled(features, seen)
    for row in range(2):
        tokens = features[row][seen[row]].reshape(-1, 2 * WIDTH)
        query = pool.q(pool.latent[0, 0])
        keys, values = pool.kv(tokens).chunk(2, -1)
        heads = []
        for h in range(2):
            part = slice(h * head_dim, (h + 1) * head_dim)
            weight = (keys[:, part] @ query[part] * scale).softmax(0)
            heads.append(weight @ values[:, part])
        mixed = pool.proj(torch.cat(heads))
        hidden = F.gelu(pool.mlp.fc1(pool.norm(mixed)))
        torch.testing.assert_close(found[row], mixed + pool.mlp.fc2(hidden), rtol=1e-9, atol=1e-9)
