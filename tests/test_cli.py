"The command line: in process with a stand-in model for every branch, in a real process with the real model."
import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import llm_workbench
from llm_workbench import cli
from llm_workbench.errors import ContextLengthError, SourceError
from llm_workbench.hardware.doctor import Finding

run = CliRunner().invoke


class StandIn:
    "Answers with what it was asked, and remembers how; `trouble` is raised after the first piece."
    card = SimpleNamespace(name="Stand-in")

    def __init__(self, trouble=None): self.calls, self.trouble = [], trouble

    def stream(self, messages, **options):
        self.calls.append(([dict(m) for m in messages], options))
        yield "you said: "
        if self.trouble: raise self.trouble
        yield messages[-1]["content"]


@pytest.fixture
def model(monkeypatch):
    stand_in = StandIn()

    def load(source=None, **_):
        stand_in.source = source
        return stand_in
    monkeypatch.setitem(vars(llm_workbench), "load", load)  # the dict: getattr would load torch
    return stand_in


def test_help_names_both_commands_and_loads_nothing_heavy():
    heavy = {"torch", "transformers", "matplotlib", "pandas"}
    code = f"import sys, llm_workbench.cli; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    shown = run(cli.app, ["--help"])
    assert shown.exit_code == 0 and "doctor" in shown.output and "chat" in shown.output
    assert run(cli.app, ["--version"]).output.strip() == llm_workbench.__version__


def test_one_shot_passes_message_and_options(model):
    options = ["--temperature", "0", "--top-p", "0.5", "--max-tokens", "7", "--seed", "3"]
    result = run(cli.app, ["chat", "--prompt", "hello", "--system", "be brief", *options])
    assert (result.exit_code, result.stdout) == (0, "you said: hello\n")
    messages, options = model.calls[0]
    assert messages == [dict(role="system", content="be brief"), dict(role="user", content="hello")]
    assert options == dict(temperature=0.0, top_p=0.5, max_new_tokens=7, seed=3)


@pytest.mark.parametrize("args", [[], ["HuggingFaceTB/SmolLM2-135M-Instruct"], ["./a b.gguf"]])
def test_the_model_is_the_argument(model, args):
    assert run(cli.app, ["chat", *args, "--prompt", "hello"]).exit_code == 0
    assert model.source == (args[0] if args else None)


def test_conversation_remembers_and_reset_forgets(model):
    result = run(cli.app, ["chat", "--system", "s"], input="one\n\ntwo\n/what\n/reset\nthree\n/exit\nfour\n")
    assert result.exit_code == 0
    roles = [[m["role"] for m in messages] for messages, _ in model.calls]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert model.calls[1][0][2]["content"] == "you said: one", "the answer was not remembered as it was said"
    assert "four" not in result.output


def test_help_lists_the_commands_and_a_mistyped_one_is_told_the_right_one(model):
    result = run(cli.app, ["chat"], input="/help\n/rest\n/RESET\n/what\n/ \n  /exit now\nfour\n")
    listed, *answers = result.output.rsplit("\n", 5)[:-1]
    assert [line.split()[0] for line in listed.splitlines()] == ["/help", "/reset", "/exit", "Ctrl-C"]
    assert answers == ["/rest is no command. Did you mean '/reset'?", "/RESET is no command. Did you mean '/reset'?",
                       "/what is no command. /help lists them.", "/ is no command. /help lists them."]
    assert not model.calls, "a command is not a message"


def test_end_of_input_leaves_quietly(model):
    assert run(cli.app, ["chat"], input="one\n").exit_code == 0


def test_stopped_answer_keeps_the_conversation(model):
    model.trouble = KeyboardInterrupt()
    result = run(cli.app, ["chat"], input="one\ntwo\n")
    assert result.exit_code == 0 and result.output.count("(stopped)") == 2
    assert [m["content"] for m in model.calls[1][0]] == ["one", "you said: ", "two"], "what was said is remembered"


def test_ctrl_c_while_typing_does_not_leave(model, monkeypatch):
    answers = iter([KeyboardInterrupt(), "one", "/exit"])

    def typed(_):
        answer = next(answers)
        if isinstance(answer, BaseException): raise answer
        return answer
    monkeypatch.setattr("builtins.input", typed)
    result = run(cli.app, ["chat"])
    assert result.exit_code == 0 and "/exit leaves" in result.output and len(model.calls) == 1


def test_full_context_is_explained_and_the_message_dropped(model):
    model.trouble = ContextLengthError("9,000 tokens, the context holds 8,192.")
    result = run(cli.app, ["chat"], input="one\ntwo\n")
    assert result.exit_code == 0 and "/reset starts a new conversation" in result.stderr
    assert [m["content"] for m in model.calls[1][0]] == ["two"]


@pytest.mark.parametrize("args, trouble", [
    (["--prompt", "x"], ContextLengthError("too long:\n shorten it")), (["nowhere"], SourceError("no such model")),
    (["--prompt", "  "], None)])
def test_errors_are_one_line_on_stderr(model, monkeypatch, args, trouble):
    def failing(*_, **__): raise trouble
    if isinstance(trouble, SourceError): monkeypatch.setitem(vars(llm_workbench), "load", failing)
    model.trouble = trouble
    result = run(cli.app, ["chat", *args])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("args, said", [
    (["chat", "--temperature", "-1"], "'--temperature': '-1' is not a number from 0 up"),
    (["chat", "--temperature", "nan"], "'nan' is not a number from 0 up"),
    (["chat", "--temperature", "inf"], "'inf' is not a number from 0 up"),
    (["chat", "--top-p", "2"], "'--top-p': '2' is not a number above 0 and up to 1"),
    (["chat", "--top-p", "0"], "'0' is not a number above 0 and up to 1"),
    (["chat", "--top-p", ""], "'' is not a number above 0 and up to 1"),
    (["chat", "--max-tokens", "0"], "'--max-tokens': '0' is not a whole number from 1 up"),
    (["chat", "--max-tokens", "1.5"], "'1.5' is not a whole number from 1 up"),
    (["chat", "--seed", "a"], "'--seed': 'a' is not a whole number from 0 up"),
    (["chat", "--seed", "9" * 30], "9' is not a whole number from 0 up"),
    (["chat", "--seed"], "'--seed' requires an argument"),
    (["chat", "--temprature", "1"], "--temperature"),
    (["chat", "one", "two"], "extra argument"),
    (["cht"], "'cht'. Did you mean 'chat'?"),
    (["doctr", "--json"], "'doctr'. Did you mean 'doctor'?"),
    (["nonsense"], "'nonsense'")])
def test_a_wrong_command_line_is_told_in_one_line(model, args, said):
    result = run(cli.app, args)
    assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, "one line, not a box"
    assert not result.stdout and not model.calls


def test_bytes_that_are_no_text_become_a_question_mark():
    code = ("import llm_workbench as wb; from types import SimpleNamespace as N; from llm_workbench import cli\n"
            "echo = N(card=N(name='x'), stream=lambda messages, **_: [messages[-1]['content']])\n"
            "wb.load = lambda *_, **__: echo; cli.app()")
    done = subprocess.run([sys.executable, "-c", code, "chat"], input=b"caf\xff\n", capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.startswith(b"caf") and not done.stderr, done.stderr.decode()


@pytest.mark.parametrize("required, code", [(True, 1), (False, 0)])
def test_doctor_fails_only_if_something_required_is_broken(monkeypatch, required, code):
    from llm_workbench.hardware import doctor
    findings = [Finding("Python", True, "3.12", required=True),
                Finding("torch", False, "a[b]c", "pip install -e .[dev]", required)]
    monkeypatch.setattr(doctor, "diagnose", lambda: findings)
    shown = run(cli.app, ["doctor"])
    assert shown.exit_code == code and "BROKEN" in shown.output
    assert ".[dev]" in shown.output, "rich took [dev] for markup"
    told = run(cli.app, ["doctor", "--json"])
    assert told.exit_code == code and json.loads(told.stdout)["ok"] is not bool(code)


def interruptible():
    "A shell that starts the tests in the background lets them ignore Ctrl-C, and their children too."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def command(*args, **more):
    if os.name != "nt": more.setdefault("preexec_fn", interruptible)
    return subprocess.Popen([sys.executable, "-m", "llm_workbench.cli", *args], text=True, encoding="utf-8",
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "PYTHONIOENCODING": "utf-8"}, **more)


def test_doctor_on_this_machine():
    "The real thing: llama.cpp decodes, bitsandbytes quantizes, or the doctor says why not."
    process = command("doctor", "--json")
    out, err = process.communicate(timeout=180)
    report = json.loads(out)
    found = {f["name"]: f for f in report["findings"]}
    assert process.returncode == 0, err
    assert found.keys() - {"ops on cuda"} == {"Python", "torch", "GPU", "memory", "embedded model", "llama.cpp",
                                              "bitsandbytes", "Triton", "compiler", "Jupyter kernel", "ops on cpu"}
    assert all(f["ok"] or f["advice"] for f in found.values()), "a finding without advice helps nobody"
    assert found["llama.cpp"]["ok"], found["llama.cpp"]
    assert found["Jupyter kernel"]["ok"], found["Jupyter kernel"]


def test_chat_answers_with_the_embedded_model():
    process = command("chat", "--temperature", "0", "--max-tokens", "24")
    out, err = process.communicate("What is the capital of France?\n/exit\n", timeout=180)
    assert process.returncode == 0 and "Paris" in out, (out, err)
    assert not err, "a chat has nothing to say on stderr"


def make(what, path):
    "Something at `path` that is no model; other paths are what they say."
    if what == "folder": path.mkdir()
    elif what == "fifo": os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as s: s.bind(path.name)  # in the working folder: a socket's path is short
    elif what == "empty": path.touch()
    elif what == "text": path.write_text("not a model")
    elif what == "loose link": path.symlink_to("gone.gguf")
    elif what == "circle": path.symlink_to(path)
    return str(path)


NO_MODELS = ["folder", "fifo", "fifo.gguf", "socket", "empty.gguf", "text.txt", "loose link.gguf", "circle", "missing"]


@pytest.mark.skipif(os.name == "nt", reason="special files are POSIX")
@pytest.mark.parametrize("given", [*NO_MODELS, "/dev/zero", "/dev/null", "", " ", "long" * 1000],
                         ids=lambda given: given[:20].strip() or repr(given))
def test_what_is_no_model_is_told_in_one_line_at_once(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    if given in NO_MODELS: given = make(given.split(".")[0], tmp_path / given)

    def waits(*_): raise AssertionError("it waits for something that never comes")
    before = signal.signal(signal.SIGALRM, waits)
    signal.alarm(30)
    try: result = run(cli.app, ["chat", given, "--prompt", "hi"])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert result.exit_code == 1 and result.stderr.startswith("error: "), (result.stderr, result.exception)
    assert result.stderr.count("\n") == 1 and not result.stdout and len(result.stderr) < 1000
    assert f"Did you mean {given!r}" not in result.stderr, "the name that was given is no suggestion"


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_ctrl_c_stops_the_answer_not_the_program():
    process = command("chat", "--temperature", "0", "--max-tokens", "2000")
    try:
        process.stdin.write("Write a very long story about a lighthouse.\n")
        process.stdin.flush()
        assert process.stdout.read(1), process.stderr.read()  # the answer has begun
        process.send_signal(signal.SIGINT)
        started = time.time()
        out, err = process.communicate("What is the capital of France? Answer in one word.\n/exit\n", timeout=180)
    finally: process.kill()
    assert process.returncode == 0 and "(stopped)" in out, (out[-500:], err)
    assert out.index("(stopped)") < len(out) - 12, "nothing was answered after the stop"
    assert "Traceback" not in err and time.time() - started < 150
