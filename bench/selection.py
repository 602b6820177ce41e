"""The k best of many scores: selection by counting against topk, kthvalue and sort.

On the CPU one thread, its CPU time. Peers need all scores in one tensor: joining them counts.
`--full` adds 10^9 scores, which take 4 GB, and a peer as much again and more.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from _networks import drawn, extra_mb, shapes
from _timing import Row, alternate, arguments, faster, report
from torch import Tensor

from dop_fast.kernels.select import reference, top

KEPT, TOPK_GOAL = 0.05, {"cpu": 5.0, "cuda": 10.0}
MEMORY_GOAL = 1.1
"""All the memory in use, the scores included, by that of the scores."""
Scores = list[Tensor]


def join(scores: Scores) -> Tensor:
    return torch.cat([score.view(-1) for score in scores])


def kthvalue(scores: Scores, k: int) -> Tensor:
    joined = join(scores)
    return joined > joined.kthvalue(len(joined) - k).values


PEERS: dict[str, Callable[[Scores, int], object]] = {
    "topk": lambda scores, k: join(scores).topk(k),
    "topk, unsorted": lambda scores, k: join(scores).topk(k, sorted=False),
    "kthvalue, comparison": kthvalue,
    "sort": lambda scores, k: join(scores).sort(descending=True),
    "partition in NumPy": reference.top,
}
FULL_PEER = {"cpu": "partition in NumPy", "cuda": "topk, unsorted"}
"""What fits beside 10^9 scores: on the CPU topk takes five times as much again."""


def scores_of(sizes: list[torch.Size], device: str) -> Scores:
    """Return products of two normal numbers, about as scores are spread."""
    scores = drawn(sizes, 0, device)
    for score, other in zip(scores, sizes, strict=True):
        score.mul_(torch.randn(other, device=device)).abs_()
    return scores


def against(what: str, scores: Scores, peers: Sequence[str], repeats: int) -> list[Row]:
    k, device = round(KEPT * sum(map(Tensor.numel, scores))), scores[0].device.type
    jobs: dict[str, Callable[[], object]] = {"ours": lambda: top(scores, k)}
    jobs |= {peer: partial(PEERS[peer], scores, k) for peer in peers}
    if device == "cpu":
        seconds = alternate(jobs, repeats)
    else:
        seconds = alternate(jobs, repeats, clock=time.perf_counter, sync=torch.cuda.synchronize)
    cost = {job: min(x) * 1e3 for job, x in seconds.items()}
    goals = {"topk": TOPK_GOAL[device]}
    return [
        faster(f"{what}: {peer}", cost["ours"], cost[peer], goals.get(peer), device=device)
        for peer in peers
    ]


def memory(what: str, scores: Scores, peer: str) -> list[Row]:
    """Compare the peak with the goal, then with the peer's."""
    count, device = sum(map(Tensor.numel, scores)), scores[0].device.type
    k, held = round(KEPT * count), 4 * count / 1e6
    extra = [extra_mb(lambda job=job: job(scores, k), device) for job in (top, PEERS[peer])]
    if None in extra:
        print("left out: memory, which this system does not tell")
        return []
    ours, other = (1 + (mb or 0) / held for mb in extra)
    return [
        Row(f"{what}: memory, the goal", device, ours, MEMORY_GOAL, "x", MEMORY_GOAL / ours, 1.0),
        Row(f"{what}: memory, {peer}", device, ours, other, "x", other / ours, None),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="10^9 scores, too: 16 GB, minutes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, devices = [], ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    else:
        print("left out: the rows of a GPU, there is none")
    for device in devices:
        scores = scores_of(shapes("resnet50"), device)
        what = f"resnet50 ({sum(score.numel() for score in scores) / 1e6:.1f} M scores)"
        rows += against(what, scores, tuple(PEERS), 2 if options.quick else 7)
        rows += memory(what, scores, "topk")
        equal = [score.fill_(0.3) for score in scores]
        rows += against(f"{what}, all equal", equal, ["topk"], 2 if options.quick else 5)
    if options.full:
        for device in devices:
            scores = scores_of([torch.Size([25_000_000])] * 40, device)
            rows += against("10^9 scores", scores, [FULL_PEER[device]], 1)
            rows += memory("10^9 scores", scores, FULL_PEER[device])
    else:
        print("left out: 10^9 scores (--full)")
    report(rows, ["torch", "triton", "numba", "numpy"], options.json)


if __name__ == "__main__":
    main()
