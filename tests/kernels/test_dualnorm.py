"""Dual batch norm: autograd's double backward, the reference, Numba, Triton."""

import os
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dop_fast.kernels import dualnorm
from dop_fast.kernels.dualnorm import Norm, cpu, reference

EPS = 1e-5
SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
Results = dict[str, Tensor]


def arrays(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return y, away from zero, and noise: residual, tangents and adjoints, weight and bias."""
    rng = torch.Generator().manual_seed(0)
    names = ("y", "residual", "dy", "dresidual", "g", "dg", "gy")
    made = {name: torch.randn(shape, generator=rng, dtype=DOUBLE).to(dtype) for name in names}
    made["y"] = 2 * made["y"] + 3
    wide = DOUBLE if dtype == DOUBLE else SINGLE
    made["weight"], made["bias"] = torch.randn((2, shape[1]), generator=rng, dtype=wide)
    return made


def memory(module: ModuleType, like: Tensor, g: Tensor | None = None, masked: bool = True) -> Any:
    """Return the last argument that a module with kernels takes: where results go."""
    if module is reference:
        return ()
    if g is None:
        return (torch.empty_like(like),)
    return ((torch.empty_like(g), torch.empty_like(g) if masked else g),)


def all_of(
    module: ModuleType, x: dict[str, Tensor], rectified: bool = True, added: bool = True
) -> Results:
    """Return what all functions of a module make of the same arguments."""
    y, dy, g, dg = x["y"], x["dy"], x["g"], x["dg"]
    residual, dresidual = (x["residual"], x["dresidual"]) if added else (None, None)
    exact = Norm(*reference.moments(y, EPS), x["weight"], EPS)
    z = reference.forward(exact, y, x["bias"], residual, True) if rectified else None
    _, *sums = reference.tangent(exact, y, dy, z, dresidual)
    b = reference.adjoint(exact, g, y, z)[2]
    mean, rstd = module.moments(y, EPS)
    out = module.forward(exact, y, x["bias"], residual, rectified, *memory(module, y))
    dz, dmean, slope = module.tangent(exact, y, dy, z, dresidual, *memory(module, dy))
    gy, ga, own_b = module.adjoint(exact, g, y, z, *memory(module, y, g, rectified))
    dgy, dga = module.tangent_adjoint(
        exact, dg, (y, x["gy"], z), dy, (*sums, b), *memory(module, y, dg, rectified)
    )
    return {
        "mean": mean, "rstd": rstd, "z": out, "dz": dz, "dmean": dmean, "slope": slope, "gy": gy,
        "ga": ga, "b": own_b, "dgy": dgy, "dga": dga,
    }  # fmt: skip


def assert_close(found: Results, expected: Results, rounding: float) -> None:
    """Sums differ by float32's rounding of terms as large as the largest value of a channel.

    `rounding`: what the storage adds, relative to each element.
    """
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert found[name].dtype == right.dtype and found[name].shape == right.shape, name
        right, left = right.double(), found[name].double()
        scale = right.nan_to_num().abs().amax(0).clamp(min=1)
        stored = rounding if right.dim() == 2 else 0.0
        allowed = 2e-5 * scale + stored * right.abs()
        same = (left - right).abs() <= allowed
        assert (same | (left.isnan() & right.isnan())).all(), name


def gpu_module() -> ModuleType:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    from dop_fast.kernels.dualnorm import gpu

    return gpu


@pytest.fixture(params=["cpu", "gpu"])
def twin(request: pytest.FixtureRequest) -> ModuleType:
    return cpu if request.param == "cpu" else gpu_module()


def plain(x: dict[str, Tensor], y: Tensor, residual: Tensor | None, rectified: bool) -> Tensor:
    """Batch norm, residual and ReLU as anybody would write them."""
    centred = y - y.mean(0)
    a = centred / (centred.square().mean(0) + EPS).sqrt() * x["weight"] + x["bias"]
    a = a if residual is None else a + residual
    return a.relu() if rectified else a


@pytest.mark.parametrize("rectified", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("added", [True, False], ids=["residual", "alone"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # said by torch.func.jvp
def test_the_reference_is_autograds_forward_over_reverse(rectified: bool, added: bool) -> None:
    x = arrays((9, 4), DOUBLE)
    x["weight"][1] = 0  # nothing may divide by it
    norm = Norm(*reference.moments(x["y"], EPS), x["weight"], EPS)

    def function(y: Tensor, residual: Tensor) -> Tensor:
        return plain(x, y, residual if added else None, rectified)

    def both(y: Tensor, residual: Tensor, g: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        z, back = torch.func.vjp(function, y, residual)
        return z, back(g)

    primals, tangents = (
        tuple(x[name] for name in names)
        for names in (("y", "residual", "g"), ("dy", "dresidual", "dg"))
    )
    (z, (gy, ga)), (dz, (dgy, dga)) = torch.func.jvp(both, primals, tangents)
    residual, dresidual = primals[1:2] + tangents[1:2] if added else (None, None)
    ours = reference.forward(norm, x["y"], x["bias"], residual, rectified)
    mask = ours if rectified else None
    our_dz, *sums = reference.tangent(norm, x["y"], x["dy"], mask, dresidual)
    our_gy, our_ga, b = reference.adjoint(norm, x["g"], x["y"], mask)
    seconds = reference.tangent_adjoint(norm, x["dg"], (x["y"], our_gy, mask), x["dy"], (*sums, b))
    pairs = [(ours, z), (our_dz, dz), (our_gy, gy), (seconds[0], dgy)]
    pairs += [(our_ga, ga), (seconds[1], dga)] if added else []
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


SHAPES = [(7, 5), (1, 3), (40, 1), (90, 70)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parts", [(True, True), (False, False), (True, False)], ids=str)
def test_float32_is_the_reference(
    twin: ModuleType, shape: tuple[int, int], parts: tuple[bool, bool]
) -> None:
    x = arrays(shape, SINGLE)
    x["weight"][0] = 0
    x["y"][:, -1] = 2.5  # a constant channel
    assert_close(all_of(twin, x, *parts), all_of(reference, x, *parts), 0)


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["float32", "bfloat16"])
def test_more_channels_than_a_tile_are_the_reference(dtype: torch.dtype) -> None:
    x = arrays((65, cpu.TILE + 18), dtype)
    assert_close(all_of(cpu, x), all_of(reference, x), 0 if dtype == SINGLE else 2**-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parts", [(True, True), (False, False)], ids=str)
def test_bfloat16_is_the_reference_rounded(
    twin: ModuleType, shape: tuple[int, int], parts: tuple[bool, bool]
) -> None:
    """One step of bfloat16 at most: two nearly equal sums on two sides of a border.

    Triton's interpreter, unlike a GPU, cuts instead of rounding: again one step at most.
    """
    x = arrays(shape, HALF)
    assert_close(all_of(twin, x, *parts), all_of(reference, x, *parts), 2**-7)


def test_bfloat16_rounds_to_nearest() -> None:
    x = arrays((300, 70), HALF)
    found, expected = (all_of(module, x) for module in (cpu, reference))
    for name in ("z", "dz", "gy", "ga", "dgy", "dga"):
        assert (found[name] == expected[name]).float().mean() > 0.99, name


@pytest.mark.parametrize("name", ["y", "dy", "g", "dg", "gy", "residual", "dresidual"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["float32", "bfloat16"])
def test_nan_spreads_as_in_the_reference(twin: ModuleType, name: str, dtype: torch.dtype) -> None:
    x = arrays((40, 6), dtype)
    x[name][17, 2] = torch.nan
    found, expected = all_of(twin, x), all_of(reference, x)
    for key, right in expected.items():
        assert torch.equal(found[key].isnan(), right.isnan()), key
    assert any(right.isnan().any() for right in expected.values())


def test_infinities_warn_nobody() -> None:
    x = arrays((40, 6), SINGLE)
    x["y"][3, 1] = x["dy"][4, 2] = x["g"][5, 3] = torch.inf
    x["dy"][5, 2] = -torch.inf
    found, expected = all_of(cpu, x), all_of(reference, x)
    for name in ("rstd", "z", "dz", "gy", "dgy"):
        assert torch.equal(found[name].isfinite(), expected[name].isfinite()), name


@pytest.mark.parametrize("kinds", [(SINGLE, HALF, HALF), (HALF, SINGLE, HALF)], ids=str)
def test_types_may_differ(twin: ModuleType, kinds: tuple[torch.dtype, ...]) -> None:
    x, others = arrays((50, 9), SINGLE), arrays((50, 9), HALF)
    y, dy, z = (x[n].to(kind) for n, kind in zip(("y", "dy", "residual"), kinds, strict=True))
    norm = Norm(*reference.moments(y, EPS), x["weight"], EPS)
    expected = reference.tangent(norm, y, dy, z, others["dresidual"])
    found = twin.tangent(norm, y, dy, z, others["dresidual"], torch.empty_like(dy))
    names = ("dz", "dmean", "slope")
    pairs = (dict(zip(names, made, strict=True)) for made in (found, expected))
    assert_close(*pairs, 2**-7 if dy.dtype == HALF else 0)


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SPAN", 1 << 11)  # many spans, the last of them ragged
    x = arrays((1000, 37), SINGLE)
    alone = all_of(cpu, x)
    for threads in (2, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for name, value in all_of(cpu, x).items():
            assert torch.equal(value, alone[name]), (threads, name)
    assert_close(alone, all_of(reference, x), 0)


def test_partial_sums_of_many_programs_are_the_reference() -> None:
    gpu = gpu_module()
    x = arrays((5000, 3), SINGLE)
    assert gpu._grid(x["y"])[0][1] > 1
    assert_close(all_of(gpu, x), all_of(reference, x), 0)


def test_moments_survive_a_mean_far_from_zero(twin: ModuleType) -> None:
    y = 1000 + torch.randn((3000, 4), generator=torch.Generator().manual_seed(0))
    y[::32] += 50  # what the sums of a block are taken about is no typical value
    exact = reference.moments(y.double(), EPS)
    for found, expected in zip(twin.moments(y, EPS), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_results_may_take_the_place_of_arguments(twin: ModuleType) -> None:
    x = arrays((70, 9), SINGLE)
    norm = Norm(*reference.moments(x["y"], EPS), x["weight"], EPS)
    z = reference.forward(norm, x["y"], x["bias"], x["residual"], True)
    residual = x["residual"].clone()
    assert twin.forward(norm, x["y"], x["bias"], residual, True, residual) is residual
    assert torch.allclose(residual, z, atol=1e-5)
    expected, *sums = reference.tangent(norm, x["y"], x["dy"], z, None)
    dy = x["dy"].clone()
    twin.tangent(norm, x["y"], dy, z, None, dy)
    assert torch.allclose(dy, expected, atol=1e-5)
    gy, ga, b = reference.adjoint(norm, x["g"], x["y"], z)
    g, into = x["g"].clone(), torch.empty_like(x["g"])
    twin.adjoint(norm, g, x["y"], z, (into, g))
    assert torch.allclose(into, gy, atol=1e-5) and torch.equal(g, ga)
    primal, sums = (x["y"], gy, z), (*sums, b)
    dgy, dga = reference.tangent_adjoint(norm, x["dg"], primal, x["dy"], sums)
    dg, over = x["dg"].clone(), gy.clone()
    twin.tangent_adjoint(norm, dg, (x["y"], over, z), x["dy"], sums, (over, dg))
    assert torch.allclose(over, dgy, atol=1e-5) and torch.equal(dg, dga)


class Public:
    """The package's own functions, in the form of a module with kernels."""

    moments = staticmethod(dualnorm.moments)

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return dualnorm.forward(*arguments[:-1], out=arguments[-1])

    @staticmethod
    def tangent(*arguments: Any) -> Any:
        return dualnorm.tangent(*arguments[:-1], out=arguments[-1])

    @staticmethod
    def adjoint(*arguments: Any) -> Any:
        return dualnorm.adjoint(*arguments[:-1], out=arguments[-1])

    @staticmethod
    def tangent_adjoint(*arguments: Any) -> Any:
        return dualnorm.tangent_adjoint(*arguments[:-1], out=arguments[-1])


@pytest.mark.parametrize("layout", ["rows", "columns", "float64", "integer weight"])
@pytest.mark.parametrize("rectified", [True, False], ids=["relu", "linear"])
def test_the_public_functions_take_every_layout(layout: str, rectified: bool) -> None:
    x = arrays((33, 6), DOUBLE if layout == "float64" else SINGLE)
    if layout == "columns":
        x = {name: v.t().contiguous().t() if v.dim() == 2 else v for name, v in x.items()}
    if layout == "integer weight":
        x["weight"] = torch.arange(6)
    public: Any = Public
    assert_close(all_of(public, x, rectified), all_of(reference, x, rectified), 0)


@pytest.mark.parametrize("shape", [(0, 4), (5, 0)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, int]) -> None:
    y, channel = torch.zeros(shape), torch.ones(shape[1])
    norm = Norm(channel, channel, channel, EPS)
    assert dualnorm.forward(norm, y, channel, None, True).shape == shape
    assert dualnorm.adjoint(norm, y, y, y)[0].shape == shape


def test_shapes_that_do_not_fit_are_refused() -> None:
    y, channel = torch.zeros(8, 4), torch.ones(4)
    norm = Norm(channel, channel, channel, EPS)
    with pytest.raises(RuntimeError, match="size"):
        dualnorm.forward(norm, y, channel, torch.zeros(8, 3), True)
    with pytest.raises(RuntimeError, match="size"):
        dualnorm.forward(norm, y, torch.ones(3), None, True)
    with pytest.raises(RuntimeError, match="size"):
        dualnorm.forward(norm, y, channel, None, True, out=torch.zeros(7, 4))
