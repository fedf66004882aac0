"""How is it typed? Commands, their output, and exit codes: 0, 1 for an error of ours in one line, 2 for usage.

Results go to stdout, progress and errors to stderr. torch and transformers load only when a command needs them.
"""

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparsegpt_lite.config import EvalConfig, MaybeStr, PruneConfig
from sparsegpt_lite.errors import CalibrationError, ConfigError, SparseGPTError, one_line

PROGRAM = "sparsegpt-lite"
DATA_OPTIONS = ("--text", "--dataset", "--text-column", "--nsamples", "--seqlen", "--seed", "--digest")
USAGE = """\
usage: sparsegpt-lite MODEL [--sparsity 0.5|2:4|4:8] [--out DIR] [options]

Prune a Hugging Face decoder-only model in one shot, one block in memory at a time.

commands:
  MODEL, or prune MODEL   prune a Hub id or a folder with safetensors weights
  eval MODEL              perplexity on held-out text, by the papers' protocol
  inspect MODEL           zeros and pattern of every matrix; no model code is loaded
  demo                    prune and evaluate the built-in model with every method; no network

examples:
  sparsegpt-lite meta-llama/Llama-3.1-8B --sparsity 0.5 --eval wikitext2
  sparsegpt-lite ./my-model --sparsity 2:4 --text corpus.txt --out ./my-model-2of4
  sparsegpt-lite eval ./my-model-2of4 --baseline ./my-model --dataset heldout.txt

`sparsegpt-lite COMMAND --help` lists the options of a command. `python -m sparsegpt_lite` is the same program.
"""

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Quiet = Annotated[bool, tyro.conf.arg(aliases=["-q"])]


@dataclass(frozen=True)
class Prune:
    """Prune a model: calibrate, solve and write one block after the other."""

    model: Model
    """Hub id or folder."""
    config: tyro.conf.OmitArgPrefixes[PruneConfig] = field(default_factory=PruneConfig)
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Output folder; MODEL-METHOD-SPARSITY in the current folder by default."""
    repeat: Annotated[str | None, tyro.conf.arg(name="from", metavar="REPORT")] = None
    """Take model and options from the sparsity.json of an earlier run; what is typed besides goes before them."""
    overwrite: bool = False
    """Replace an earlier output in that folder."""
    resume: bool = False
    """Go on with a run that was stopped or killed; finished blocks are read back from the output folder."""
    eval: MaybeStr = None
    """Evaluate before and after on wikitext2, c4, another data set, or a text file."""
    json: bool = False
    """Print the report as JSON."""
    quiet: Quiet = False
    """No progress; print the output folder only."""

    def run(self) -> None:
        """Prune, evaluate if asked to, and print the report."""
        from sparsegpt_lite.pipeline import prune

        report = prune(
            self.model,
            self.target,
            self.config,
            evaluate=self._perplexity if self.eval else None,
            overwrite=self.overwrite,
            resume=self.resume,
            progress=not self.quiet,
        )
        print(report.to_json() if self.json else report.target if self.quiet else report.table())

    @property
    def target(self) -> Path:
        """Output folder."""
        pattern = self.config.sparsity.replace(":", "of")
        return self.out or Path(f"{Path(self.model).resolve().name}-{self.config.method}-{pattern}")

    def _perplexity(self, model: str) -> dict[str, Any]:
        from sparsegpt_lite.eval.perplexity import perplexity

        assert self.eval is not None
        config = EvalConfig(
            dataset=self.eval,
            text_column=self.config.text_column,
            seqlen=self.config.seqlen,
            device=self.config.device,
            dtype=self.config.dtype,
            revision=self.config.revision if model == self.model else None,
            trust_remote_code=self.config.trust_remote_code,
        )
        return perplexity(model, config, progress=not self.quiet).to_dict()


@dataclass(frozen=True)
class Eval:
    """Measure perplexity: windows of seqlen that do not overlap, each predicting seqlen - 1 tokens."""

    model: Model
    """Hub id or folder."""
    config: tyro.conf.OmitArgPrefixes[EvalConfig] = field(default_factory=EvalConfig)
    baseline: MaybeStr = None
    """Evaluate this model on the same windows too and compare."""
    json: bool = False
    """Print JSON."""
    quiet: Quiet = False
    """No progress; print the perplexity only."""

    def run(self) -> None:
        """Print the perplexity, and that of the baseline."""
        from sparsegpt_lite.eval.perplexity import comparison, perplexity

        results = [perplexity(self.model, self.config, progress=not self.quiet)]
        if self.baseline:
            config = replace(self.config, revision=None)
            results.insert(0, perplexity(self.baseline, config, progress=not self.quiet))
            dense, sparse = (result.data for result in results)
            if dense["digest"] != sparse["digest"]:
                raise CalibrationError(
                    f"{self.baseline} and {self.model} read the text as other windows (of {dense['seqlen']} and "
                    f"{sparse['seqlen']} tokens): give --seqlen, and models of one tokenizer"
                )
        if self.json:
            print(json.dumps([r.to_dict() for r in results] if self.baseline else results[0].to_dict(), indent=1))
        elif self.quiet:
            print("\n".join(f"{r.perplexity:.6g}" for r in results))
        else:
            print(comparison(results))


@dataclass(frozen=True)
class Inspect:
    """Count zeros and find the pattern of every matrix of a checkpoint, from its bytes alone."""

    model: Model
    """Hub id or folder."""
    revision: MaybeStr = None
    """Branch, tag or commit on the Hub."""
    all: bool = False
    """A line for every matrix, not one for each kind."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Print what was found."""
        from sparsegpt_lite.checkpoint import Checkpoint
        from sparsegpt_lite.inspection import inspect, table

        found = inspect(Checkpoint(self.model, self.revision))
        print(json.dumps(found, indent=1) if self.json else table(found, every=self.all))


@dataclass(frozen=True)
class Demo:
    """Prune the built-in model at 50 % and 2:4 with every method and compare perplexities; no network."""

    json: bool = False
    """Print JSON."""
    quiet: Quiet = False
    """No progress."""

    def run(self) -> None:
        """Print the comparison."""
        from sparsegpt_lite.demo import run_demo, table

        result = run_demo(progress=not self.quiet)
        print(json.dumps(result, indent=1) if self.json else table(result))


def _earlier_run(argv: list[str]) -> Prune | None:
    """Model and options of the report behind `--from`, if it is there."""
    pairs = zip(argv, [*argv[1:], ""], strict=False)
    given = [(option, value) for option, value in pairs if option.partition("=")[0] == "--from"]
    if not given:
        return None
    option, value = given[-1]
    path = option.partition("=")[2] or value
    try:
        report = json.loads(Path(path).read_bytes())
        config = PruneConfig(**report["config"])
        config = replace(config, revision=report["commit"] or config.revision)
        if not any(option.partition("=")[0] in DATA_OPTIONS for option in argv):
            config = replace(config, digest=report["calibration"]["digest"])
        return Prune(model=report["source"], config=config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--from {path}: no report of ours ({one_line(error)}); give the sparsity.json of a run"
        ) from error


COMMANDS: dict[str, type[Prune] | type[Eval] | type[Inspect] | type[Demo]] = {
    "prune": Prune,
    "eval": Eval,
    "inspect": Inspect,
    "demo": Demo,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin on busy cores slow small solves tenfold
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, rest = (argv[0], argv[1:]) if argv[0] in COMMANDS else ("prune", argv)
    command = None
    try:
        with _terminable():
            options: dict[str, Any] = {"prog": f"{PROGRAM} {name}", "config": (tyro.conf.FlagCreatePairsOff,)}
            if name == "prune" and (earlier := _earlier_run(rest)):
                options["default"] = earlier
            command = tyro.cli(COMMANDS[name], args=rest, **options)
            if getattr(command, "quiet", False):
                os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
            command.run()
    except BrokenPipeError:  # the reader of stdout went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SparseGPTError, KeyboardInterrupt, MemoryError, OSError, RuntimeError) as error:
        text = _explained(error)
        if getattr(error, "resumable", False) and "--resume" not in text:
            again = [PROGRAM, *(a for a in argv if a not in ("--overwrite", "--resume")), "--resume"]
            text += f"; what is finished is kept, go on with: {shlex.join(again)}"
        print(f"{PROGRAM}: {text}", file=sys.stderr)
        return error.code if isinstance(error, _Terminated) else 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is to end a run as cleanly as Ctrl-C does."""

    code = 128 + signal.SIGTERM


@contextmanager
def _terminable() -> Iterator[None]:
    """Make an exception of SIGTERM, where it can be had."""

    def stop(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _explained(error: BaseException) -> str:
    """One line for what is ours, the system's, an interruption or a lack of memory; the rest are bugs, raised again."""
    if isinstance(error, SparseGPTError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "terminated" if isinstance(error, _Terminated) else "interrupted"
    if isinstance(error, OSError):
        return f"{one_line(error)}; check the path and its permissions"
    lacks = any(words in str(error) for words in ("allocate memory", "out of memory", "ALLOC_FAILED"))
    if isinstance(error, MemoryError) or lacks:
        return f"out of memory ({one_line(error)}); lower --hessian-gib or --seqlen, or use --activations disk"
    raise error
