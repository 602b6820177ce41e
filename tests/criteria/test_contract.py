"""One contract over every criterion and every variant of it."""

import inspect
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import attention, chunks, near, plain, residual, same, score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dop_fast import criteria, masks
from dop_fast.errors import ConfigError, DataError, ModelError
from dop_fast.models import prunable

# SBP-SR takes no network without residual blocks, and same-densities needs a mask to be like:
# they are tested in files of their own
NAMES = tuple(name for name in criteria.names() if name not in ("sbp-sr", "same-densities"))
DATA_AWARE = [name for name in NAMES if criteria.load(name).NEEDS_DATA]


def has(name: str, knob: str) -> bool:
    return knob in inspect.signature(criteria.load(name).score).parameters


WAYS = [(name, {}) for name in NAMES] + [
    (name, {"variant": "published"})
    for name in NAMES
    if "published" in getattr(criteria.load(name), "VARIANTS", ())
]
EVERY_WAY = pytest.mark.parametrize(
    ("name", "knobs"), WAYS, ids=["-".join([name, *knobs.values()]) for name, knobs in WAYS]
)


def test_names_are_the_files_and_cost_no_torch() -> None:
    code = (
        "import sys; from dop_fast import criteria; names = criteria.names();"
        "assert not {'torch', 'numpy'} & set(sys.modules); print(*names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(done.stdout.split()) == criteria.names()
    assert {"force", "grasp", "iter-snip", "magnitude", "random", "snip", "synflow"} <= set(NAMES)
    assert not any(name.startswith("_") or "_" in name for name in NAMES)


@pytest.mark.parametrize(("name", "hint"), [("snap", "snip"), ("grads", "grasp"), ("zzz", "snip")])
def test_an_unknown_criterion_is_refused_with_a_known_one(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=name) as refused:
        criteria.load(name)
    assert hint in refused.value.hint


@pytest.mark.parametrize("name", NAMES)
def test_own_knobs_are_keyword_only_and_have_defaults(name: str) -> None:
    module = criteria.load(name)
    parameters = list(inspect.signature(module.score).parameters.values())
    common, knobs = parameters[:4], parameters[4:]
    assert [parameter.name for parameter in common] == ["model", "batches", "loss", "seed"]
    assert all(knob.kind is knob.KEYWORD_ONLY and knob.default is not knob.empty for knob in knobs)
    assert isinstance(module.NEEDS_DATA, bool)
    assert has(name, "precision") or not module.NEEDS_DATA
    variants = getattr(module, "VARIANTS", ("clean",))
    assert variants[0] == "clean" and set(variants) <= {"clean", "published"}
    assert has(name, "variant") == (len(variants) > 1)
    assert has(name, "mask") or (
        getattr(module, "ROUNDS", 1) == 1 and not hasattr(module, "REVIVES")
    )


@pytest.mark.parametrize(("variant", "hint"), [("publishd", "published"), ("raw", "clean")])
def test_an_unknown_variant_is_refused_with_a_known_one(variant: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=variant) as refused:
        criteria.load("force", variant)
    assert hint in refused.value.hint
    with pytest.raises(ConfigError, match="magnitude has no variant 'published'"):
        criteria.load("magnitude", "published")


# NTK-SAP permutes all weights of a layer to draw it anew
@pytest.mark.parametrize("name", [n for n in NAMES if has(n, "mask") and n != "ntk-sap"])
def test_weights_behind_the_mask_are_not_seen(name: str) -> None:
    model, batches = residual(), chunks(4, 3)
    whole = {layer: torch.ones_like(w, dtype=torch.bool) for layer, w in prunable(model).items()}
    assert same(score(name, model, batches, mask=whole), score(name, model, batches))
    mask = {layer: value.clone() for layer, value in whole.items()}
    for layer in mask.values():
        layer.view(-1)[::3] = False
    other = deepcopy(model)
    with torch.no_grad():
        for layer, weight in prunable(other).items():
            weight[~mask[layer]] *= -3
    seen, elsewhere = (score(name, net, batches, mask=mask) for net in (model, other))
    for layer, kept in mask.items():
        assert torch.equal(seen[layer][kept], elsewhere[layer][kept])
    assert not same(seen, score(name, model, batches))


@pytest.mark.parametrize("make", [plain, residual, attention])
@EVERY_WAY
def test_scores_fit_the_weights(name: str, knobs: dict[str, str], make: Any) -> None:
    model = make()
    scores = score(name, model, chunks(4, 3), **knobs)
    assert list(scores) == list(prunable(model))
    for layer, weight in prunable(model).items():
        assert scores[layer].shape == weight.shape
        assert scores[layer].dtype == torch.float32
        assert scores[layer].device == weight.device
        assert not scores[layer].requires_grad
        assert scores[layer].isfinite().all()
        assert scores[layer].data_ptr() != weight.data_ptr()
    kept = masks.keep_top(scores, 0.7).kept
    assert kept == round(0.3 * sum(weight.numel() for weight in prunable(model).values()))


@pytest.mark.parametrize("make", [plain, residual])
@EVERY_WAY
def test_the_model_and_the_generator_are_left_as_found(
    name: str, knobs: dict[str, str], make: Any
) -> None:
    model = make()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    state = deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    grads = [value.grad for value in parameters]
    wanted = [value.requires_grad for value in parameters]
    random = torch.get_rng_state()

    score(name, model, chunks(4, 3), **knobs)

    assert same(model.state_dict(), state)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(value.grad is grad for value, grad in zip(parameters, grads, strict=True))
    assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))
    assert [value.requires_grad for value in parameters] == wanted
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


@EVERY_WAY
def test_scores_are_a_function_of_their_arguments(name: str, knobs: dict[str, str]) -> None:
    model = plain()
    first = score(name, model, chunks(4, 3), **knobs)
    torch.manual_seed(99)
    model.eval().requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert same(score(name, model, chunks(4, 3), **knobs), first)


def test_the_first_scores_of_a_process_are_its_later_ones_bit_for_bit() -> None:
    code = """
import torch
from small_networks import chunks, plain, residual, same, score
from test_contract import NAMES

for name in ("force", *NAMES):
    for make in (plain, residual):
        first = score(name, make(), chunks(4, 3))
        assert same(score(name, make(), chunks(4, 3)), first), name
assert torch.get_num_threads() == 1
"""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    # what starts threads of its own must not change PyTorch's number of them
    few = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **few}, check=True)


@pytest.mark.parametrize("name", NAMES)
def test_how_samples_are_split_does_not_matter_without_batch_norm(name: str) -> None:
    whole = score(name, plain(), chunks(12))
    near(score(name, plain(), chunks(7, 4, 1)), whole, 1e-4)


@pytest.mark.parametrize("name", DATA_AWARE)
def test_batch_norm_takes_the_statistics_of_the_chunk(name: str) -> None:
    other = residual()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    assert same(score(name, residual(), chunks(6, 6)), score(name, other, chunks(6, 6)))
    assert not same(score(name, residual(), chunks(6, 6)), score(name, other, chunks(12)))


@pytest.mark.parametrize("name", DATA_AWARE)
def test_scoring_is_in_full_precision_and_gives_the_switches_back(name: str) -> None:
    backends = torch.backends
    switches: list[Any] = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul]
    seen = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append({switch.fp32_precision for switch in switches})
        return cross_entropy(logits, labels)

    try:
        torch.set_float32_matmul_precision("medium")
        found = [switch.fp32_precision for switch in switches]
        criteria.load(name).score(plain(), chunks(4), loss, 0)
        assert [switch.fp32_precision for switch in switches] == found
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "ieee" not in found
    assert seen and all(precisions == {"ieee"} for precisions in seen)


@pytest.mark.parametrize("name", DATA_AWARE)
def test_a_failing_loss_leaves_modes_and_switches_as_found(name: str) -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        raise KeyError("mine")

    model, matmul = residual(), torch.backends.cuda.matmul
    found = matmul.fp32_precision
    with pytest.raises(KeyError, match="mine"):
        criteria.load(name).score(model, chunks(4), loss, 0)
    assert all(module.training for module in model.modules())
    assert matmul.fp32_precision == found


@pytest.mark.parametrize("name", DATA_AWARE)
def test_an_infinite_gradient_names_its_layer(name: str) -> None:
    model = plain()
    with torch.no_grad():
        model[7].weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"not finite in \d of \d layers, first in 0\.weight"):
        score(name, model, chunks(4))


@pytest.mark.parametrize("name", DATA_AWARE)
def test_no_samples_and_no_weights_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="no samples"):
        score(name, plain(), [])
    with pytest.raises(ModelError, match="no prunable weights"):
        score(name, nn.Sequential(nn.BatchNorm2d(3)), chunks(4))


def test_a_generator_of_batches_is_refused() -> None:
    with pytest.raises(DataError, match="only once") as refused:
        score("grasp", plain(), (batch for batch in chunks(4, 3)))
    assert "generator" in refused.value.hint


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("make", [plain, residual, attention])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_scores_of_the_cpu(name: str, make: Any) -> None:
    found = score(name, make().cuda(), chunks(8, 5))
    assert all(value.is_cuda for value in found.values())
    near(
        {layer: value.cpu() for layer, value in found.items()},
        score(name, make(), chunks(8, 5)),
        1e-3,
    )
