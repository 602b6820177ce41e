"""The only Click plumbing: options made from settings, panels, output."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from dop_fast.cli import _ranks
from dop_fast.cli._failures import ENVIRONMENT, plain, style, there
from dop_fast.cli._progress import log, progress
from dop_fast.errors import ConfigError, nearest
from dop_fast.settings import StageConfig, span
from dop_fast.workspace import Workspace, load

Body = Callable[..., "Outcome"]

SOURCES = "dopfast.sources"
"""Key of `Context.meta`: where defaults come from that are not those of dopfast.toml."""
LAST_PANELS = ("Workspace", "Reproducibility", "Compute", "Output")


@dataclass(frozen=True)
class Outcome:
    """What a command tells: `result` for --json, `lines` for people, and the way on."""

    result: dict[str, Any]
    lines: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    wrote: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    next: str = ""


@dataclass(frozen=True)
class Call:
    """What every command in a workspace gets beside its own settings."""

    workspace: Workspace
    seed: int
    device: str
    force: bool
    sources: dict[str, str]

    @property
    def afresh(self) -> bool:
        """Whether to replace what is there, which a job that torchrun started anew has begun."""
        return self.force and not _ranks.restarted()


class Several(click.ParamType[tuple[Any, ...], Any]):
    """Several numbers or names, separated by commas."""

    def __init__(self, kind: type[int] | type[float] | type[str]) -> None:
        self.kind = kind
        self.name = "names" if kind is str else "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Turn `15,50,80`, a list of TOML or a default into a tuple."""
        parts = value.split(",") if isinstance(value, str) else value
        try:
            return tuple(self.kind(part) for part in parts if part != "")
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not numbers separated by commas", param, ctx)


class Choice(click.Choice[str]):
    """One of several words; another is refused with the nearest of them."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Name the nearest word, or all of them where none is near."""
        return f"there is no {value!r}; {nearest(str(value), self.choices)}"

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        """Name all words, in a line."""
        return f"Choose from: {', '.join(self.choices)}"


class Option(click.Option):
    """An option that knows its panel in the help."""

    def __init__(self, *args: Any, panel: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.panel = panel


class Helped(click.Command):
    """What tells of `-h` as of every other option."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return the option that shows the help."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.help = "show this message, then stop"
        return option


class Command(Helped):
    """A command whose help shows an example and its options in panels."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Look at -h first: a workspace that cannot be opened does not hide the help."""
        asked = [arg for arg in args if arg in ctx.help_option_names]
        return super().parse_args(ctx, asked + args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example, then one section for each panel."""
        with formatter.section("Example"):
            formatter.write_text(self.example)
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record and isinstance(param, click.Option):  # arguments stand in the usage
                panels.setdefault(getattr(param, "panel", "Output"), []).append(record)
        own = [panel for panel in panels if panel not in LAST_PANELS]
        for panel in (*own, *(panel for panel in LAST_PANELS if panel in panels)):
            with formatter.section(panel):
                formatter.write_dl(panels[panel])


def settings(config: type[StageConfig], **choices: tuple[str, ...]) -> Callable[[Body], Body]:
    """Give a command one option for each setting, and its body `config`, checked.

    `choices` are those that only the code knows, such as the names of files.
    """

    def decorate(body: Body) -> Body:
        def wrapped(**values: Any) -> Outcome:
            mine = {item.name: values.pop(item.name) for item in dataclasses.fields(config)}
            return body(config=config(**mine), **values)

        wrapped.__name__, wrapped.__doc__ = body.__name__, body.__doc__
        wrapped.__click_params__ = [  # type: ignore[attr-defined]
            *getattr(body, "__click_params__", []),
            *(
                _option(item, choices.get(item.name, ()))
                for item in dataclasses.fields(config)[::-1]
            ),
        ]
        return wrapped

    return decorate


def _option(item: "dataclasses.Field[Any]", choices: tuple[str, ...]) -> Option:
    default = item.default
    choices = choices or item.metadata["choices"]
    if choices:
        kind: click.ParamType[Any, Any] = Choice(choices)
    elif isinstance(default, tuple):
        kind = Several(type(default[0]) if default else int)  # n_segments alone has no default
    else:
        kind = click.types.convert_type(type(default))
    text = item.metadata["help"] + (f"  {span(item)}" if span(item) else "")
    flag = item.name.replace("_", "-")
    return Option(
        [f"--{flag}/--no-{flag}" if isinstance(default, bool) else f"--{flag}", item.name],
        type=kind,
        default=default,
        show_default=default not in ((), ""),
        help=text,
        panel=item.metadata["panel"],
    )


def completes(kind: Literal["masks", "runs"]) -> Callable[..., list[str]]:
    """Return what completes the name of a mask or a run of the workspace."""

    def names(ctx: click.Context, param: click.Parameter, text: str) -> list[str]:
        workspace: Workspace | None = ctx.params["workspace"]
        if workspace is None:
            return []
        if kind == "masks":
            found = [path.stem for path in workspace.masks.glob("*.safetensors")]
        else:
            found = [path.name for path in workspace.runs.glob("*")]
        return sorted(name for name in found if name.startswith(text))

    return names


def _open_workspace(ctx: click.Context, param: click.Parameter, value: Path) -> Workspace | None:
    try:
        workspace = load(value)
    except ConfigError:
        if ctx.resilient_parsing:  # of a completion, which tells no error
            return None
        raise
    ctx.default_map = {"seed": workspace.seed, **workspace.stages.get(ctx.info_name or "", {})}
    return workspace


def _common(
    *, workspace: bool, compute: bool, preview: bool, without: tuple[str, ...]
) -> list[click.Parameter]:
    """Return the options that commands have in common."""
    stream = "number that every random stream follows from"
    if workspace:
        options = [
            Option(
                ["-w", "--workspace"], type=click.Path(path_type=Path), default=".",
                envvar=f"{ENVIRONMENT}_WORKSPACE", show_default=True, is_eager=True,
                callback=_open_workspace, help="folder with dopfast.toml", panel="Workspace",
            ),
            Option(["--seed"], type=click.INT, panel="Reproducibility",
                   help=f"{stream}  [default: the workspace's]"),
        ]  # fmt: skip
    else:
        options = [
            Option(["--seed"], type=click.INT, default=0, show_default=True,
                   panel="Reproducibility", help=stream)
        ]  # fmt: skip
    if compute:
        options.append(
            Option(["--device"], default="auto", show_default=True, panel="Compute",
                   help="cpu, cuda, cuda:1; auto: the GPU if there is one")
        )  # fmt: skip
    shown = "what would be done" if preview else "every value and its source"
    options += [
        Option(["--force"], is_flag=True, help="replace what is there", panel="Output"),
        Option(["--dry-run"], is_flag=True, help=f"show {shown}, then stop", panel="Output"),
        Option(["--json"], is_flag=True, help="print one JSON object", panel="Output"),
        Option(["-q", "--quiet"], is_flag=True, help="print results only", panel="Output"),
        Option(
            ["-v", "--verbose"], is_flag=True, help="log each step and its time", panel="Output"
        ),
    ]
    return [option for option in options if option.name not in without]


def command(
    example: str,
    *,
    workspace: bool = True,
    compute: bool = True,
    preview: bool = False,
    without: tuple[str, ...] = (),
    ranks: _ranks.Who = "first",
) -> Callable[[Body], Command]:
    """Make a command of a body that returns an Outcome; the common options come with it.

    With `preview` the body itself takes `dry_run`, and shows what it would do. `without`: common
    options that would have no effect. `ranks`: who does its work where torchrun started several.
    """
    options = _common(workspace=workspace, compute=compute, preview=preview, without=without)

    def decorate(body: Body) -> Command:
        def run(**values: Any) -> None:
            ctx = click.get_current_context()
            as_json, quiet = values.pop("json"), values.pop("quiet")
            verbose = values.pop("verbose")
            if not preview and values.pop("dry_run"):
                if _ranks.first():
                    _show_values(ctx, as_json)
                return
            device = values.get("device", "cpu")
            with _ranks.meeting(ranks, device) as takes_part:
                if not takes_part:
                    return
                if workspace:
                    values = _with_call(ctx, values)
                with progress(ctx, quiet=quiet, verbose=verbose):
                    if verbose:
                        log(_machine(device))
                    outcome = body(**values)
                if _ranks.first():
                    _show(ctx, outcome, as_json=as_json, quiet=quiet)

        own = getattr(body, "__click_params__", [])[::-1]  # decorators apply from the bottom up
        about = (body.__doc__ or "").strip()
        return Command(
            name=body.__name__.rstrip("_").replace("_", "-"),
            callback=run,
            params=[*own, *options],
            help=about,
            example=example,
            context_settings={"help_option_names": ["-h", "--help"]},
        )

    return decorate


def _machine(device: str) -> str:
    """Return what a command computes on."""
    import torch

    from dop_fast import pipeline

    return f"device {pipeline.device_of(device)}, threads {torch.get_num_threads()}"


def _with_call(ctx: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    call = Call(
        workspace=values.pop("workspace"),
        seed=values.pop("seed", 0),
        device=values.pop("device", "cpu"),
        force=values.pop("force", False),
        sources=_sources(ctx),
    )
    return {**values, "call": call}


def _sources(ctx: click.Context) -> dict[str, str]:
    names = {"COMMANDLINE": "flag", "DEFAULT_MAP": "dopfast.toml", "ENVIRONMENT": "environment"}
    found = {}
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        found[name] = names.get(source.name, "default") if source else "default"
        if found[name] == names["DEFAULT_MAP"]:
            found[name] = ctx.meta.get(SOURCES, {}).get(name, found[name])
    return found


def _show_values(ctx: click.Context, as_json: bool) -> None:
    sources = _sources(ctx)
    rows = {
        name: value.root if isinstance(value, Workspace) else value
        for name, value in ctx.params.items()
        if name not in ("json", "quiet", "verbose", "dry_run")
    }
    if as_json:
        values = {key: {"value": value, "source": sources[key]} for key, value in rows.items()}
        click.echo(json.dumps({"schema": "dopfast.settings", "values": values}, default=str))
        return
    width = max(map(len, rows))
    for key, value in rows.items():
        click.echo(f"{key:<{width}}  {_as_given(value):<24} {sources[key]}")


def _as_given(value: object) -> str:
    """Return a value as an option or a variable would give it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _show(ctx: click.Context, outcome: Outcome, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        about = {"schema": f"dopfast.{ctx.info_name}", **outcome.result}
        about |= {"read": outcome.read, "wrote": outcome.wrote, "warnings": outcome.warnings}
        click.echo(json.dumps(about, default=str))
        return
    for line in outcome.lines:
        click.echo(plain(line))
    for line in outcome.warnings:
        click.echo(style(f"warning: {plain(line)}", fg="yellow"), err=True)
    if quiet:
        return
    for label, items in (("read", outcome.read), ("wrote", outcome.wrote)):
        for item in items:
            click.echo(style(f"{label:<6}{plain(item)}", dim=True), err=True)
    if outcome.next:
        source = ctx.get_parameter_source("workspace")
        flag = source is not None and source.name == "COMMANDLINE"
        given = ctx.params["workspace"] if flag else ""
        folder = str(given.root if isinstance(given, Workspace) else given)
        click.echo(style("next  ", bold=True) + plain(there(outcome.next, folder)), err=True)


def table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> tuple[str, ...]:
    """Return a plain table: the first column to the left, the others to the right."""
    cells = [header, *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        rest = "  ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append(f"{row[0].ljust(widths[0])}  {rest}".rstrip())
    return tuple(lines)
