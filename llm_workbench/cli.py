"The command `llm-workbench`. Heavy libraries load inside the commands, so that `--help` answers at once."
import json
import sys
from typing import Annotated, Optional

import typer

from llm_workbench.errors import ContextLengthError, WorkbenchError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Understand, run and check open LLMs on this machine.")


def _version(wanted: bool):
    if not wanted: return
    from llm_workbench import __version__
    print(__version__)
    raise typer.Exit()


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False): pass


def _fail(message) -> typer.Exit:
    "One clear line on stderr, exit status 1."
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return typer.Exit(1)


# ---------------------------------------------------------------------------------------------------------- doctor
@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the machine and the findings as JSON.")] = False):
    "What this machine can run, and why not."
    try:
        from llm_workbench.hardware.doctor import diagnose
        from llm_workbench.hardware.machine import describe_machine
    except ImportError as e: raise _fail(f"{e}: the installation is incomplete; run pip install -e . -c constraints.txt again") from None
    machine, findings = describe_machine(), diagnose()
    broken = [f.name for f in findings if f.required and not f.ok]
    if as_json:
        from dataclasses import asdict
        print(json.dumps(dict(machine=asdict(machine), findings=[asdict(f) for f in findings], ok=not broken), indent=1))
    else: _show(machine, findings, broken)
    raise typer.Exit(1 if broken else 0)


def _show(machine, findings, broken):
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    table = Table(title=f"{machine.cpu}, {machine.cores} cores, {machine.memory / 1e9:.0f} GB, {machine.system}", title_justify="left")
    for column in ("", "part", "found", "what to do"): table.add_column(column, overflow="fold")
    words = {True: Text("works", "green"), None: Text("absent", "yellow"), False: Text("BROKEN", "bold red")}
    for f in findings: table.add_row(words[f.ok], f.name, Text(f.has), Text(f.advice))  # Text: "[dev]" is not markup
    console = Console()
    console.print(table)
    console.print(f"The workbench cannot run: mend {', '.join(broken)} first." if broken else
                  "The workbench runs here. What is absent or broken above is used by single chapters only.")


# ------------------------------------------------------------------------------------------------------------ chat
@app.command()
def chat(
    model: Annotated[Optional[str], typer.Option(help="A folder, a .gguf file or a hub id; the embedded SmolLM2 by default.")] = None,
    prompt: Annotated[Optional[str], typer.Option(help="Answer this one message and leave.")] = None,
    system: Annotated[Optional[str], typer.Option(help="The system message; the model's own by default.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.2,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that hold this probability.")] = 0.9,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    seed: Annotated[Optional[int], typer.Option(help="Makes sampling repeatable.")] = None,
):
    "Talk with a model. /reset forgets the conversation, /exit leaves, Ctrl-C stops an answer."
    if prompt is not None and not prompt.strip(): raise _fail("the prompt is empty: write a message after --prompt")
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows "?" instead of a traceback
        if hasattr(stream, "reconfigure"): stream.reconfigure(errors="replace")
    options = dict(temperature=temperature, top_p=top_p, max_new_tokens=max_tokens, seed=seed)
    try:
        import llm_workbench
        from llm_workbench.kernels.cpu import fastest
        lm = llm_workbench.load(model, ops=fastest())
        start = [dict(role="system", content=system)] if system else []
        if prompt is not None: _answer(lm, [*start, dict(role="user", content=prompt)], options, [])
        else: _converse(lm, start, options)
    except WorkbenchError as e: raise _fail(e) from None
    except KeyboardInterrupt: raise typer.Exit(130) from None


def _answer(lm, messages, options, said: list):
    "Print the answer piece by piece and collect the pieces in `said`, also when it is cut short."
    for piece in lm.stream(messages, **options):
        said.append(piece)
        print(piece, end="", flush=True)
    print(flush=True)


def _converse(lm, start, options):
    "Ask, answer, remember; until /exit or the end of the input."
    try: import readline  # noqa: F401  (arrow keys and history, where the system has it)
    except ImportError: pass
    asks = sys.stdin.isatty()
    if asks: print(f"{getattr(lm.card, 'name', None) or 'The model'} is ready. /reset forgets, /exit leaves, Ctrl-C stops an answer.")
    messages = list(start)
    while True:
        try: text = input("> " if asks else "").strip()
        except EOFError: return
        except KeyboardInterrupt:
            print("\n/exit leaves")
            continue
        if not text: continue
        if text == "/exit": return
        if text == "/reset":
            messages = list(start)
            print("Forgotten.")
            continue
        if text.startswith("/"):
            print(f"{text.split()[0]} is no command: /reset or /exit")
            continue
        messages.append(dict(role="user", content=text))
        messages = _turn(lm, messages, options)


def _turn(lm, messages, options):
    "One answer; the conversation to go on with. A stopped answer is remembered as far as it went."
    said = []
    try: _answer(lm, messages, options, said)
    except KeyboardInterrupt: print(" (stopped)")
    except ContextLengthError as e:
        print(f"error: {e} Here: /reset starts a new conversation.", file=sys.stderr)
        return messages[:-1]
    return [*messages, dict(role="assistant", content="".join(said))]


if __name__ == "__main__": app()
