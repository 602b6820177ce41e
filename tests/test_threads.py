"""Results do not depend on the number of threads, and work is done by as many as there are."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, get_ident
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dop_fast import criteria, engine, models, threads
from dop_fast.concepts import Extractor
from dop_fast.concepts.activations import Probe
from dop_fast.config import DataConfig, ExtractConfig
from dop_fast.images import open_images
from dop_fast.types import ClassConcepts

COUNTS = (1, 2, 4)
KNOBS: dict[str, Any] = {
    "image": (3, 32, 32), "sparsity": 0.6, "samples": 24, "draws": 2, "steps": 1,
}  # fmt: skip


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on(count: int, work: Callable[[], Any]) -> Any:
    with threads_of(count):
        return work()


def images(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    stream = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 32, 32, generator=stream), torch.arange(size) % 10) for size in sizes
    ]


def test_results_come_in_order_and_from_single_threads() -> None:
    meet = Barrier(3, timeout=60)  # passed by three at once, or not at all

    def work(item: int) -> tuple[int, int, int]:
        if item < 3:
            meet.wait()
        return item, torch.get_num_threads(), get_ident()

    with threads_of(3), threads.single():
        found = list(threads.spread(work, range(7)))
        assert threads.width() == 3
    assert [item for item, _, _ in found] == list(range(7))
    assert {count for _, count, _ in found} == {1}
    assert get_ident() not in {thread for _, _, thread in found}


def test_the_number_of_threads_is_given_back() -> None:
    with threads_of(3):
        with pytest.raises(ZeroDivisionError), threads.single():
            with threads.single():
                assert torch.get_num_threads() == 1 and threads.width() == 3
            list(threads.spread(lambda item: 1 // item, [1, 0, 1]))
        assert torch.get_num_threads() == 3 and threads.width() == 1
        assert on_another_thread(torch.get_num_threads) == 3


def on_another_thread(work: Callable[[], int]) -> int:
    with threads.ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_no_more_are_worked_on_than_is_said() -> None:
    taken, done = [], []

    def items() -> Iterator[int]:
        for item in range(6):
            taken.append(item)
            assert len(taken) - len(done) <= 3  # one at work, one waited for, one taken ahead
            yield item

    with threads_of(4), threads.single():
        for item in threads.spread(lambda item: item, items(), lambda: 1):
            done.append(item)
    assert done == list(range(6))


def test_after_an_error_nobody_waits_for_the_others() -> None:
    begun, finished = threading.Event(), []

    def work(item: int) -> None:
        begun.set()
        for _ in range(10**8):
            threads.go_on()
        finished.append(item)

    def items() -> Iterator[int]:
        yield 0
        begun.wait()
        raise KeyboardInterrupt

    with threads_of(2), threads.single(), pytest.raises(KeyboardInterrupt):
        list(threads.spread(work, items()))
    assert not finished


def test_an_interrupted_chunk_is_left_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps, go_on = models.build("resnet20", 10, 0), [], threads.go_on
    apply = torch.autograd.Function.__dict__["apply"]

    def step() -> None:
        steps.append(get_ident())
        go_on()

    monkeypatch.setattr(threads, "go_on", step)

    def batches(reached: int) -> Any:
        class Two(list[Any]):
            def __getitem__(self, at: Any) -> Any:
                if at == 1:
                    while len(steps) < reached:
                        pass
                    raise KeyboardInterrupt
                return super().__getitem__(at)

        return Two(images(8, 8))

    with threads_of(2), pytest.raises(KeyboardInterrupt):
        engine.gradients(model, batches(10), cross_entropy)
    interrupted = len(steps)
    engine.gradients(model, images(8), cross_entropy)
    assert interrupted < len(steps) - interrupted
    assert torch.autograd.Function.__dict__["apply"] is apply


def scores(name: str) -> dict[str, Tensor]:
    model = models.build("resnet20", 10, 0)
    criterion = criteria.load(name)
    own = {**KNOBS, "like": {key: value > 0 for key, value in models.prunable(model).items()}}
    taken = criterion.score.__kwdefaults__ or {}
    knobs = {key: value for key, value in own.items() if key in taken}
    sizes = (8, 16) if name == "prospr" else (24, 16, 24)  # which goes through them seven times
    return criterion.score(model, images(*sizes), cross_entropy, 0, **knobs)


@pytest.mark.parametrize("name", criteria.names())
def test_scores_have_the_same_bits_on_any_number_of_threads(name: str) -> None:
    one, *others = (on(count, lambda: scores(name)) for count in COUNTS)
    for other in others:
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("keep", [True, False])
def test_chunks_that_a_tape_cannot_follow_do_not_meet_either(keep: bool) -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            return 2 * slope

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).tanh()
            x = Twice.apply(x) if len(x) % 2 else 2 * x
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Sometimes()

    def work() -> dict[str, Tensor]:
        return engine.hessian_gradient(model, images(8, 7, 6, 9, 5, 8), cross_entropy, keep=keep)

    one, *others = (on(count, work) for count in COUNTS)
    for other in others:
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not any(
        weight.requires_grad and weight.grad is not None for weight in model.parameters()
    )


@pytest.mark.parametrize("layer", ["features", "features.17"])
def test_activations_have_the_same_bits_on_any_number_of_threads(layer: str) -> None:
    probe = Probe(models.build("mobilenet_v2", 10, 0), layer, torch.device("cpu"), "off")
    batches = [torch.randn(8, 3, 96, 96).contiguous(memory_format=torch.channels_last)] * 3

    def work() -> Tensor:
        with threads.single():
            return torch.cat(list(probe.activations(batches)))

    one, *others = (on(count, work) for count in COUNTS)
    assert all(torch.equal(one, other) for other in others)


def concepts(folder: Path, features: str, cav: str) -> ClassConcepts:
    data = DataConfig(path=str(folder), size=48)
    train, _ = open_images(data, folder, 0)
    config = ExtractConfig(
        images=8, tcav_images=4, n_segments=(6, 12), clusters=6, min_members=4, max_members=10,
        random_sets=4, amp="off", features=features, cav=cav,
    )  # fmt: skip
    teacher = models.build("resnet20", len(train.classes), 0)
    return Extractor(teacher, "", train, data, config, 0, torch.device("cpu")).extract(0)


@pytest.mark.parametrize(("features", "cav"), [("exact", "ridge"), ("roi", "sgd")])
def test_concepts_have_the_same_bits_on_any_number_of_threads(
    tiny_images: Path, features: str, cav: str
) -> None:
    one, *others = (on(count, lambda: concepts(tiny_images, features, cav)) for count in COUNTS)
    assert one.concepts
    for other in others:
        assert len(one.concepts) == len(other.concepts)
        for mine, theirs in zip(one.concepts, other.concepts, strict=True):
            assert (mine.members == theirs.members).all() and (
                mine.tcav_runs == theirs.tcav_runs
            ).all()
            assert np.array_equal([mine.tcav, mine.p_value], [theirs.tcav, theirs.p_value])
