"""The commands: what is asked on the command line, and which exit code answers it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

OK, REFUSED, USAGE, RUNS_FAILED, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 4, 130
EXIT_CODES = "Exit codes: 0 ok; 1 no answer, or the verification failed; 2 usage; 3 some runs failed; 4 environment; 130 interrupted."

app = typer.Typer(
    name="towtank",
    help="Know how a neural network will train before you pay for the big run.",
    epilog=EXIT_CODES,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on the standard output.")]
Target = Annotated[
    str, typer.Argument(help="package.module:function, which makes the model.", metavar="TARGET", show_default=False)
]
Folder = Annotated[Path, typer.Argument(help="Folder of a sweep.", metavar="FOLDER", show_default=False)]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name.

    Returns:
        The exit code; every error has become one line on the error stream (TOWTANK_DEBUG=1 shows its traceback).
    """
    _open_streams()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # tasks of the user, beside their study
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="towtank", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else OK
    except BrokenPipeError:  # the reader of our output has had enough
        from towtank.cli.output import drop_output

        drop_output()
        return OK
    except Exception as error:
        if os.environ.get("TOWTANK_DEBUG"):
            raise
        return _report_error(error)


@app.callback(invoke_without_command=True)
def _towtank(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        import towtank

        print(towtank.__version__)
        raise typer.Exit


@app.command()
def studies(json: Json = False) -> None:
    """List the built-in studies."""
    from towtank.cli.output import print_json
    from towtank.study.load import builtin_studies

    found = builtin_studies()
    if json:
        print_json("studies", studies=found)
        return
    width = max(map(len, found))
    for name, question in found.items():
        print(f"{name:{width}}  {question}")


@app.command()
def sweep(
    study: Annotated[str, typer.Argument(help="A TOML file, or the name of a built-in study.", metavar="STUDY")],
    out: Annotated[Path | None, typer.Option(help="Folder of the records and the report [runs/NAME].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the grid, what is done, time, memory.")] = False,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, mps.")] = "cpu",
    workers: Annotated[int | None, typer.Option(min=1, help="Ensembles trained at a time [one a processor].")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory for all of them, such as 4GB [half of what is free].")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=10_000, help="Run the grid with this many seeds.")] = None,
    json: Json = False,
) -> int:
    """Run what is missing of a study, then answer it.

    The same command again goes on where it stopped.
    """
    from towtank.cli import sweeping

    request = sweeping.prepare(study, out, device, workers, memory, seeds)
    return sweeping.plan(request, json) if dry_run else sweeping.run(request, json)


@app.command()
def predict(
    folder: Folder,
    width: Annotated[float | None, typer.Option(help="Width of the model to predict.")] = None,
    depth: Annotated[float | None, typer.Option(help="Depth of the model to predict.")] = None,
    size: Annotated[
        float | None, typer.Option(help="Size of the model to predict, in the study's own size key.")
    ] = None,
    json: Json = False,
) -> int:
    """Learning rate, loss and stability of a model of another size."""
    from towtank.cli import answering

    return answering.predict(folder, {"width": width, "depth": depth, "size": size}, json)


@app.command()
def report(
    folder: Folder,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    json: Json = False,
) -> int:
    """Answer the study of a folder from its records, and write its report.html anew."""
    from towtank.cli import answering

    return answering.report(folder, json, open_page=open_page)


@app.command()
def laws(json: Json = False) -> None:
    """List the laws: formula, data needed, source."""
    from towtank.cli import fitting

    fitting.laws(json)


@app.command(no_args_is_help=True)
def fit(
    words: Annotated[
        list[str],
        typer.Argument(
            help="CSV, JSON lines, Parquet, a folder of a sweep, or what wandb and TensorBoard export.",
            metavar="TABLE",
            show_default=False,
        ),
    ],
    law: Annotated[str, typer.Option(help="Name of the law; `towtank laws` lists them.", show_default=False)],
    y: Annotated[str, typer.Option(help="Column of the measured quantity.", show_default=False)],
    x: Annotated[list[str] | None, typer.Option(help="Column of a variable: COLUMN=VARIABLE, or COLUMN.")] = None,
    weights: Annotated[str | None, typer.Option(help="Column of weights.")] = None,
    groups: Annotated[
        str | None, typer.Option("--groups", "--curves", help="Column that names the run of a row.")
    ] = None,
    step: Annotated[str | None, typer.Option(help="Column of the step, for laws of loss curves [step].")] = None,
    lr: Annotated[str | None, typer.Option(help="Column of the learning rate, for laws of loss curves [lr].")] = None,
    censored: Annotated[str | None, typer.Option(help="Column that is true where y is only a lower bound.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="Keep rows: loss<4.5, N>=1e8, data=c4,rpj.")] = None,
    drop_nan: Annotated[bool, typer.Option("--drop-nan", help="Leave out rows with missing numbers.")] = False,
    predict: Annotated[list[str] | None, typer.Option(help="Predict here: N=7e10 D=1.4e12, or a number.")] = None,
    hold_out: Annotated[str, typer.Option(help="Backtest: largest, a number of runs, or a fraction.")] = "largest",
    out: Annotated[Path | None, typer.Option(help="File of the page [TABLE.LAW.html].")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    json: Json = False,
) -> int:
    """Fit a law to a table of runs: coefficients, forecast, backtest, and a page.

    towtank fit table.csv --law chinchilla --x params=N --x tokens=D --y loss --predict N=7e10 D=1.4e12
    """
    from towtank.cli import fitting
    from towtank.cli.asking import Request

    named = {"weights": weights, "groups": groups, "censored": censored}
    columns = {name: column for name, column in named.items() if column is not None}
    curves = [f"{column}={name}" for name, column in (("step", step), ("lr", lr)) if column is not None]
    request = Request(
        words=words, law=law, x=[*(x or []), *curves], y=y, columns=columns, where=where or [], drop=drop_nan, predict=predict or [],
        hold_out=hold_out, out=out, seed=seed,
    )  # fmt: skip
    return fitting.fit(request, json)


@app.command()
def optimizers(
    name: Annotated[str | None, typer.Argument(help="Tell all about this one.", metavar="NAME")] = None,
    json: Json = False,
) -> int:
    """List the optimizers: state, extra passes, learning rate, source; with a NAME also its known deviations."""
    from towtank.cli import listing

    return listing.optimizers(name, json)


@app.command()
def measure(
    target: Target,
    top: Annotated[int, typer.Option(min=1, help="Eigenvectors that the gradient is compared with.")] = 10,
    rtol: Annotated[float, typer.Option(min=1e-6, help="Relative standard error asked of traces.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Of the random probes.")] = 0,
    json: Json = False,
) -> int:
    """Loss, gradient, curvature of a model, and the learning rates they allow.

    TARGET returns (model, loss, data), (model, loss, data, optimizer), a towtank.Problem, or a mapping of these by name.
    """
    from towtank.cli import measuring

    return measuring.measure(target, top=top, rtol=rtol, seed=seed, json=json)


@app.command()
def landscape(
    target: Target,
    kind: Annotated[str, typer.Option(help="Directions: filter, random, eigen.")] = "filter",
    dims: Annotated[int, typer.Option(min=1, max=2, help="A line or a plane.")] = 1,
    span: Annotated[float | None, typer.Option(help="How far the slice runs to both sides.")] = None,
    points: Annotated[int, typer.Option(min=2, max=1000, help="Along each direction.")] = 21,
    out: Annotated[Path | None, typer.Option(help="HTML file of the figure [landscape.html].")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random directions.")] = 0,
    json: Json = False,
) -> int:
    """Draw the loss of a model along a line or a plane through its parameters."""
    from towtank.cli import measuring

    return measuring.landscape(target, kind=kind, dims=dims, span=span, points=points, out=out, seed=seed, json=json)


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="FOLDER", show_default=False)],
    follow: Annotated[
        bool | None,
        typer.Option(
            "--follow/--once", help="Until the run ends, or print once [follow on a terminal].", show_default=False
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every tensor and module, not only the worst.")] = False,
    every: Annotated[float, typer.Option(min=0.05, max=3600, help="Seconds between looks.")] = 1.0,
    json: Json = False,
) -> int:
    """Watch a run that towtank.Monitor(..., out=FOLDER) writes: readings, limits, alarms, notes.

    Ctrl-C stops watching, with 0; the run goes on. A run that failed, or whose process is gone, exits with 3.
    """
    from towtank.cli import watching

    return watching.watch(folder, follow=follow, everything=everything, every_s=every, json=json)


def _open_streams() -> None:
    """Lead standard streams that were closed before we began to nowhere: Python has None for them."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open as long as the process)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _report_error(error: Exception) -> int:
    from towtank.record.errors import ConfigError, FolderError, plain

    usage = getattr(error, "format_message", None)  # errors of the option parser
    if usage is not None:
        command = getattr(getattr(error, "ctx", None), "command_path", "towtank")
        return _fail(f"{' '.join(usage().split())} (see {command} --help)", USAGE)
    if type(error).__name__ == "Abort":
        return _fail("interrupted", INTERRUPTED)
    if isinstance(error, ConfigError):
        return _fail(str(error), USAGE)
    if isinstance(error, FolderError | OSError | ImportError):
        return _fail(str(error) or type(error).__name__, ENVIRONMENT)
    what = plain(" ".join(str(error).split())[:300])
    return _fail(f"{type(error).__name__}: {what} (TOWTANK_DEBUG=1 shows where)", ENVIRONMENT)


def _fail(text: Any, code: int) -> int:
    from towtank.record.errors import plain

    print(f"towtank: {plain(text)}", file=sys.stderr)
    return code
