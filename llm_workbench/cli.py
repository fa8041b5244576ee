"The command `llm-workbench`. Heavy libraries load inside the commands, so that `--help` answers at once."
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from typer.core import TyperGroup

from llm_workbench.errors import ContextLengthError, WorkbenchError, did_you_mean


class OneLine(TyperGroup):
    "A wrong command line, too, is told in one line."
    def main(self, args=None, prog_name=None, **more):
        try: status = super().main(args, prog_name or "llm-workbench", **{**more, "standalone_mode": False})
        except typer.Abort: status = 130
        except Exception as e:
            if not hasattr(e, "format_message"): raise  # typer's class of such errors has moved between its versions
            where = getattr(e, "ctx", None)
            _fail(f"{e.format_message()}{f' (see {where.command_path} --help)' if where else ''}")
            status = e.exit_code
        sys.exit(status or 0)


app = typer.Typer(cls=OneLine, invoke_without_command=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Understand, run and check open LLMs on this machine.")


def _version(wanted: bool):
    if not wanted: return
    from llm_workbench import __version__
    print(__version__)
    raise typer.Exit()


Version = typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")


@app.callback()
def main(context: typer.Context, version: Annotated[bool, Version] = False):
    if context.invoked_subcommand is None: typer.echo(context.get_help())


def _fail(message) -> typer.Exit:
    "One clear line on stderr, exit status 1."
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return typer.Exit(1)


def _number(kind, low, high, wanted):
    "A parser whose complaint names the value."
    def parse(text):
        try: value = kind(text)
        except ValueError: value = math.nan
        if not low <= value <= high: raise typer.BadParameter(f"{text!r} is not {wanted}")
        return value
    return parse


# ---------------------------------------------------------------------------------------------------------- doctor
AsJson = typer.Option("--json", help="Print the machine and the findings as JSON.")


@app.command()
def doctor(as_json: Annotated[bool, AsJson] = False):
    "What this machine can run, and why not."
    try:
        from llm_workbench.hardware.doctor import diagnose
        from llm_workbench.hardware.machine import describe_machine
        from llm_workbench.lobby import chosen_ops
    except ImportError as e:
        raise _fail(f"{e}: the installation is incomplete; run make lab") from None
    machine, findings = describe_machine(), [*diagnose(), *chosen_ops()]
    broken = [f.name for f in findings if f.required and not f.ok]
    if as_json:
        from dataclasses import asdict
        report = dict(machine=asdict(machine), findings=[asdict(f) for f in findings], ok=not broken)
        print(json.dumps(report, indent=1))
    else: _show(machine, findings, broken)
    raise typer.Exit(1 if broken else 0)


def _show(machine, findings, broken):
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    title = f"{machine.cpu}, {machine.cores} cores, {machine.memory / 1e9:.0f} GB, {machine.system}"
    table = Table(title=title, title_justify="left")
    for column in ("", "part", "found", "what to do"): table.add_column(column, overflow="fold")
    words = {True: Text("works", "green"), None: Text("absent", "yellow"), False: Text("BROKEN", "bold red")}
    for f in findings: table.add_row(words[f.ok], f.name, Text(f.has), Text(f.advice))  # Text: "[dev]" is not markup
    console = Console()
    console.print(table)
    console.print(f"The workbench cannot run: mend {', '.join(broken)} first." if broken else
                  "The workbench runs here. What is absent or broken above is used by single chapters only.")


# ------------------------------------------------------------------------------------------------------------ chat
COMMANDS = {"/help": "lists the commands", "/reset": "forgets the conversation", "/exit": "leaves"}
KEYS = {"Ctrl-C": "stops an answer"}
Model = typer.Argument(metavar="MODEL", show_default=False,
                       help="A folder, a .gguf file or a hub id; the embedded SmolLM2 by default.")
Temperature = typer.Option(parser=_number(float, 0, 1e6, "a number from 0 up"), metavar="NUMBER",
                           help="0 always takes the likeliest token.")
TopP = typer.Option(parser=_number(float, 1e-9, 1, "a number above 0 and up to 1"), metavar="NUMBER",
                    help="Sample from the likeliest tokens that hold this probability.")
MaxTokens = typer.Option(parser=_number(int, 1, 2**31, "a whole number from 1 up"), metavar="COUNT",
                         help="Longest answer, in tokens.")
Adapter = typer.Option(metavar="FOLDER", help="An adapter in peft's format, such as `tune` writes.")
Seed = typer.Option(parser=_number(int, 0, 2**63 - 1, "a whole number from 0 up"), metavar="NUMBER",
                    help="Makes sampling repeatable.")


@app.command()
def chat(
    model: Annotated[Optional[str], Model] = None,
    prompt: Annotated[Optional[str], typer.Option(help="Answer this one message and leave.")] = None,
    system: Annotated[Optional[str], typer.Option(help="The system message; the model's own by default.")] = None,
    temperature: Annotated[float, Temperature] = 0.2,
    top_p: Annotated[float, TopP] = 0.9,
    max_tokens: Annotated[int, MaxTokens] = 512,
    seed: Annotated[Optional[int], Seed] = None,
    adapter: Annotated[Optional[str], Adapter] = None,
):
    "Talk with a model. /help lists what can be typed beside messages; Ctrl-C stops an answer."
    if prompt is not None and not prompt.strip(): raise _fail("the prompt is empty: write a message after --prompt")
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # a character that a terminal lacks becomes "?", no traceback
        if hasattr(stream, "reconfigure"): stream.reconfigure(errors="replace")
    options = dict(temperature=temperature, top_p=top_p, max_new_tokens=max_tokens, seed=seed)
    try:
        import llm_workbench
        lm = llm_workbench.load(model)
        if adapter is not None: lm = _adapted(lm, adapter)
        start = [dict(role="system", content=system)] if system else []
        if prompt is not None: _answer(lm, [*start, dict(role="user", content=prompt)], options, [])
        else: _converse(lm, start, options)
    except WorkbenchError as e: raise _fail(e) from None
    except KeyboardInterrupt: raise typer.Exit(130) from None


def _adapted(lm, folder):
    from dataclasses import replace
    from llm_workbench.finetuning.lora import load_adapter
    return replace(lm, decoder=load_adapter(lm.decoder, folder))


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
    if asks: print(f"{getattr(lm.card, 'name', None) or 'The model'} is ready. /help lists the commands, /exit leaves.")
    messages = list(start)
    while True:
        try: text = input("> " if asks else "").strip()
        except EOFError: return
        except KeyboardInterrupt:
            print("\n/exit leaves")
            continue
        if not text: continue
        if text.startswith("/"):
            command = text.split()[0]
            if command == "/exit": return
            if command == "/reset": messages = list(start)
            print(_reply(command))
            continue
        messages.append(dict(role="user", content=text))
        messages = _turn(lm, messages, options)


def _reply(command) -> str:
    "What is said to a command."
    if command == "/reset": return "Forgotten."
    if command == "/help": return "\n".join(f"{name:8}{what}" for name, what in {**COMMANDS, **KEYS}.items())
    return f"{command} is no command.{did_you_mean(command, COMMANDS) or ' /help lists them.'}"


def _turn(lm, messages, options):
    "One answer; the conversation to go on with. A stopped answer is remembered as far as it went."
    said = []
    try: _answer(lm, messages, options, said)
    except KeyboardInterrupt: print(" (stopped)")
    except ContextLengthError as e:
        _fail(f"{e} Here: /reset starts a new conversation.")
        return messages[:-1]
    return [*messages, dict(role="assistant", content="".join(said))]


# ------------------------------------------------------------------------------------------------------------ tune
Count = _number(int, 1, 2**31, "a whole number from 1 up")
Data = typer.Argument(metavar="DATA", show_default=False, help="Lines of JSON with messages; prompt and completion; or "
                                                                "prompt, chosen and rejected.")
Out = typer.Argument(metavar="OUT", show_default=False, help="A folder for the adapter, the log and the checkpoint.")
ModelOption = typer.Option(metavar="MODEL", show_default=False, help=Model.help)
Method = typer.Option(metavar="NAME", help="lora, dora, qlora or full.")
Epochs = typer.Option(parser=_number(float, 1e-9, 1e9, "a number above 0"), metavar="NUMBER",
                      help="Times that every text is seen.")
Steps = typer.Option(parser=Count, metavar="COUNT", help="Steps, instead of epochs.")
Texts = typer.Option(parser=Count, metavar="COUNT", help="Texts of a step.")
Length = typer.Option(parser=Count, metavar="TOKENS", help="Longest text, and longest row of texts.")
Rate = typer.Option(parser=_number(float, 1e-12, 1e3, "a number above 0"), metavar="NUMBER",
                    help="Learning rate; by default 5e-4 for adapters, 5e-5 for full, a tenth of it for preferences.")
Rank = typer.Option(parser=Count, metavar="COUNT", help="Rank of the adapter.")
Held = typer.Option(parser=_number(float, 0, 0.999, "a share from 0 to below 1"), metavar="SHARE",
                    help="Share of the texts that is not learned but asked before and after.")
Every = typer.Option(parser=Count, metavar="COUNT", help="Steps between checkpoints.")
Recompute = typer.Option("--recompute", help="Compute blocks twice instead of keeping what is inside them.")
DryRun = typer.Option("--dry-run", help="Say what would be learned, and the memory that it takes; train nothing.")
Anyway = typer.Option("--anyway", help="Begin even where the plan needs more memory than is free.")


@app.command()
def tune(
    data: Annotated[str, Data],
    out: Annotated[str, Out],
    model: Annotated[Optional[str], ModelOption] = None,
    method: Annotated[str, Method] = "lora",
    epochs: Annotated[float, Epochs] = 3.0,
    steps: Annotated[Optional[int], Steps] = None,
    batch: Annotated[int, Texts] = 8,
    length: Annotated[int, Length] = 512,
    lr: Annotated[Optional[float], Rate] = None,
    rank: Annotated[int, Rank] = 8,
    held: Annotated[float, Held] = 0.1,
    every: Annotated[int, Every] = 20,
    seed: Annotated[int, Seed] = 0,
    recompute: Annotated[bool, Recompute] = False,
    dry_run: Annotated[bool, DryRun] = False,
    anyway: Annotated[bool, Anyway] = False,
):
    "Fine-tune a model on a file of texts. Started again after an interruption, it goes on where it stood."
    try:
        import llm_workbench
        from llm_workbench.families.loading import read_config
        from llm_workbench.families.opening import open_checkpoint
        from llm_workbench.finetuning import tuning
        job = tuning.Job(data, out, method, epochs, steps, batch, length, lr, rank, None, held, recompute, seed, every)
        checkpoint = open_checkpoint(model)
        config, texts = read_config(checkpoint.config), tuning.material(checkpoint.tokenizer, job)
        tuning.check_folder(Path(out))
        need, free = _bill(job, texts, config)
        if dry_run: return
        if need > free and not anyway:
            raise _fail(f"the run needs {_size(need)} and {_size(free)} are free: try --recompute, --method qlora or a "
                        "smaller --length; --anyway begins nevertheless")
        result = tuning.tune(llm_workbench.load(model, weights="dense"), job, texts, _line(texts.steps(job)))
    except WorkbenchError as e: raise _fail(e) from None
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    if result.after is not None: print(f"loss on texts held out: {result.before:.3f} before, {result.after:.3f} after")
    print(f"written: {result.path}" + ("" if method == "full" else
          f"\nTalk with it: llm-workbench chat {model + ' ' if model else ''}--adapter {result.path}"))


def _size(nbytes) -> str: return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def _bill(job, texts, config) -> tuple[float, float]:
    "Say what will be done and what it needs; bytes needed, bytes free."
    import psutil
    from llm_workbench.errors import UnsupportedError
    from llm_workbench.finetuning import tuning
    learns, every = tuning.learned(config, job)
    print(f"{len(texts.train)} {texts.kind} to learn from ({texts.tokens():,} tokens), {len(texts.held)} held out, "
          f"{texts.cut} shortened, {texts.lost} left out as too long")
    print(f"{job.method}: {learns:,} of {every:,} parameters learn, in {texts.steps(job)} steps of {job.batch} texts")
    free = psutil.virtual_memory().available
    try: plan = tuning.demand(config, job, texts)
    except UnsupportedError as e:
        print(f"memory: not planned, {e}", flush=True)
        return 0, free
    parts = ", ".join(f"{name} {_size(n)}" for name, n in vars(plan).items() if name != "when")
    print(f"memory: {_size(plan.total)} of {_size(free)} that are free; at the fullest moment {parts}", flush=True)
    return plan.total, free


def _line(steps):
    "A log that shows where a run stands: in a terminal in one line that changes."
    from llm_workbench.finetuning.tracking import Live, Metered

    class Line(Live):
        def write(self, step, metrics):
            self.curve, self.now = [(step, metrics["loss"])], metrics
            if sys.stdout.isatty(): print(f"\r{self.text():79}", end="\n" if step + 1 == steps else "", flush=True)
            else: print(self.text(), flush=True)
        def finish(self): pass
    return Metered(Line(steps), steps)


# ----------------------------------------------------------------------------------------------------------- serve
Host = typer.Option(metavar="ADDRESS", help="Where to listen. On any address but this machine's own, a key is needed: "
                                            "one is made and printed.")
Port = typer.Option(parser=_number(int, 0, 65535, "a port from 0 to 65535"), metavar="NUMBER", help="0: any free one.")
Key = typer.Option(metavar="TEXT", envvar="LLM_WORKBENCH_KEY", show_default=False,
                   help="What clients must show (Authorization: Bearer KEY). Better set in the environment.")
Name = typer.Option(metavar="TEXT", show_default=False, help="The model's name to clients; its card's by default.")
Memory = typer.Option(parser=_number(float, 0.001, 1e6, "a number above 0"), metavar="GB", show_default=False,
                      help="For keys and values of all texts; a share of what is free by default.")
Most = typer.Option(parser=Count, metavar="COUNT", help="Texts that are written at a time.")
Budget = typer.Option(parser=Count, metavar="TOKENS", help="Tokens of a step: with fewer, running texts wait less; "
                                                           "with more, prompts are read faster.")
Queue = typer.Option(parser=Count, metavar="COUNT", help="Requests that may wait; more are told to come back (429).")
Context = typer.Option(parser=Count, metavar="TOKENS", show_default=False,
                       help="Longest text; what the model allows by default.")
Origin = typer.Option(metavar="URL", show_default=False, help="A web page that may ask; may be given several times.")


@app.command()
def serve(
    model: Annotated[Optional[str], Model] = None,
    host: Annotated[str, Host] = "127.0.0.1",
    port: Annotated[int, Port] = 8000,
    key: Annotated[Optional[str], Key] = None,
    name: Annotated[Optional[str], Name] = None,
    memory: Annotated[Optional[float], Memory] = None,
    most: Annotated[int, Most] = 32,
    budget: Annotated[int, Budget] = 256,
    queue: Annotated[int, Queue] = 256,
    context: Annotated[Optional[int], Context] = None,
    origin: Annotated[Optional[list[str]], Origin] = None,
):
    "Serve a model by OpenAI's protocol and Ollama's, until Ctrl-C; answers that are being written are finished."
    try:
        import llm_workbench
        from llm_workbench.serving import openai_server
        from llm_workbench.serving.openai_protocol import Limits
        openai_server.serve(llm_workbench.load(model), host, port, key=key or (), name=name, origins=origin or (),
                            limits=Limits(context=context), memory=memory and int(memory * 1e9), most=most,
                            budget=budget, queue=queue)
    except WorkbenchError as e: raise _fail(e) from None
    except KeyboardInterrupt: raise typer.Exit(130) from None


if __name__ == "__main__": app()
