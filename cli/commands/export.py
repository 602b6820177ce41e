"""`dopfast export`: the sparse network for other programs."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dop_fast.cli._click import Call, Choice, Option, Outcome, command, completes
from dop_fast.workspace import EXPORTS

if TYPE_CHECKING:
    from dop_fast.interop import Exported


@command("dopfast export onnx --run grasp-stitched-0.95-s0", compute=False, without=("seed",))
@click.argument("kind", type=Choice(list(EXPORTS)))
@click.option("--run", default="", cls=Option, panel="Input",
              help="trained network  [default: the run that was finished last]",
              shell_complete=completes("runs"))  # fmt: skip
@click.option("--mask", default="", cls=Option, panel="Input",
              help="a mask and its weights before training, in place of a run",
              shell_complete=completes("masks"))  # fmt: skip
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    cls=Option,
    panel="Output",
    help="file to write  [default: exports/NAME-KIND.safetensors or .onnx]",
)
def export(call: Call, kind: str, run: str, mask: str, output: Path | None) -> Outcome:
    """Write the sparse network, or its mask, as one file.

    dense: safetensors with the zeros in it. prune: a state for torch.nn.utils.prune. csr: sparse
    rows. masks: a bit a weight. onnx: checked with onnxruntime where that is installed.
    """
    from dop_fast import pipeline

    if run and mask:
        raise click.UsageError("--run has a mask already: leave out --mask")
    name, made = pipeline.export(call.workspace, kind, run, mask, output, force=call.force)
    return Outcome(
        result={"name": name, "kind": kind, **asdict(made)},
        lines=_lines(name, made),
        wrote=(str(made.path),),
    )


def _lines(name: str, made: "Exported") -> tuple[str, ...]:
    lines = [
        f"{name}: {made.parameters:,} parameters, {made.kept:,} of them kept",
        f"{made.bytes / 1e6:.3f} MB; dense parameters alone take {made.dense_bytes / 1e6:.3f} MB",
    ]
    if made.flops is not None and made.sparse_flops is not None:
        lines.append(
            f"{made.flops / 1e6:,.1f} million FLOPs an image, "
            f"{made.sparse_flops / 1e6:,.1f} million without those of removed weights"
        )
    if made.difference is not None:
        lines.append(f"onnxruntime is within {made.difference:.1g} of PyTorch's largest logit")
    lines += [
        f"2:4 sparse product of {layer}: {gain:.2f} times as fast as dense, float16"
        for layer, gain in made.speedups.items()
    ]
    return (*lines, "single zeros do not make a dense runtime faster: that takes sparse kernels")
