"The command line: in process with a stand-in model for every branch, in a real process with the real model."
import json
import os
import signal
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
    monkeypatch.setitem(vars(llm_workbench), "load", lambda source=None, **_: stand_in)  # the dict: getattr would load torch
    return stand_in


def test_help_names_both_commands_and_loads_nothing_heavy():
    code = "import sys, llm_workbench.cli; print(sorted({'torch', 'transformers', 'matplotlib', 'pandas'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    shown = run(cli.app, ["--help"])
    assert shown.exit_code == 0 and "doctor" in shown.output and "chat" in shown.output
    assert run(cli.app, ["--version"]).output.strip() == llm_workbench.__version__


def test_one_shot_passes_message_and_options(model):
    result = run(cli.app, ["chat", "--prompt", "hello", "--system", "be brief", "--temperature", "0", "--top-p", "0.5", "--max-tokens", "7", "--seed", "3"])
    assert (result.exit_code, result.stdout) == (0, "you said: hello\n")
    messages, options = model.calls[0]
    assert messages == [dict(role="system", content="be brief"), dict(role="user", content="hello")]
    assert options == dict(temperature=0.0, top_p=0.5, max_new_tokens=7, seed=3)


def test_conversation_remembers_and_reset_forgets(model):
    result = run(cli.app, ["chat", "--system", "s"], input="one\n\ntwo\n/what\n/reset\nthree\n/exit\nfour\n")
    assert result.exit_code == 0
    roles = [[m["role"] for m in messages] for messages, _ in model.calls]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]], "the history is wrong"
    assert model.calls[1][0][2]["content"] == "you said: one", "the answer was not remembered as it was said"
    assert "/what is no command" in result.output and "four" not in result.output


def test_end_of_input_leaves_quietly(model):
    assert run(cli.app, ["chat"], input="one\n").exit_code == 0


def test_stopped_answer_keeps_the_conversation(model):
    model.trouble = KeyboardInterrupt()
    result = run(cli.app, ["chat"], input="one\ntwo\n")
    assert result.exit_code == 0 and result.output.count("(stopped)") == 2
    assert [m["content"] for m in model.calls[1][0]] == ["one", "you said: ", "two"], "what was already said belongs to the conversation"


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
    (["--prompt", "x"], ContextLengthError("too long:\n shorten it")), (["--model", "nowhere"], SourceError("no such model")), (["--prompt", "  "], None)])
def test_errors_are_one_line_on_stderr(model, monkeypatch, args, trouble):
    def failing(*_, **__): raise trouble
    if isinstance(trouble, SourceError): monkeypatch.setitem(vars(llm_workbench), "load", failing)
    model.trouble = trouble
    result = run(cli.app, ["chat", *args])
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("args", [["chat", "--temperature", "-1"], ["chat", "--top-p", "2"], ["chat", "--max-tokens", "0"], ["nonsense"]])
def test_impossible_options_are_refused(model, args):
    assert run(cli.app, args).exit_code == 2 and not model.calls


@pytest.mark.parametrize("required, code", [(True, 1), (False, 0)])
def test_doctor_fails_only_if_something_required_is_broken(monkeypatch, required, code):
    from llm_workbench.hardware import doctor
    findings = [Finding("Python", True, "3.12", required=True), Finding("torch", False, "a[b]c", "pip install -e .[dev]", required)]
    monkeypatch.setattr(doctor, "diagnose", lambda: findings)
    shown = run(cli.app, ["doctor"])
    assert shown.exit_code == code and "BROKEN" in shown.output and ".[dev]" in shown.output, "rich took [dev] for markup"
    told = run(cli.app, ["doctor", "--json"])
    assert told.exit_code == code and json.loads(told.stdout)["ok"] is not bool(code)


def interruptible():
    "A shell that starts the tests in the background lets them ignore Ctrl-C, and their children too."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def command(*args, **more):
    if os.name != "nt": more.setdefault("preexec_fn", interruptible)
    return subprocess.Popen([sys.executable, "-m", "llm_workbench.cli", *args], text=True, encoding="utf-8", stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, stdin=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "utf-8"}, **more)


def test_doctor_on_this_machine():
    "The real thing: llama.cpp decodes, bitsandbytes quantizes, or the doctor says why not."
    process = command("doctor", "--json")
    out, err = process.communicate(timeout=180)
    report = json.loads(out)
    found = {f["name"]: f for f in report["findings"]}
    assert process.returncode == 0, err
    assert {"Python", "torch", "GPU", "memory", "embedded model", "llama.cpp", "bitsandbytes", "Triton", "compiler", "Jupyter kernel"} == found.keys()
    assert all(f["ok"] or f["advice"] for f in found.values()), "a finding without advice helps nobody"
    assert found["llama.cpp"]["ok"], found["llama.cpp"]
    assert found["Jupyter kernel"]["ok"], found["Jupyter kernel"]


def test_chat_answers_with_the_embedded_model():
    process = command("chat", "--temperature", "0", "--max-tokens", "24")
    out, err = process.communicate("What is the capital of France?\n/exit\n", timeout=180)
    assert process.returncode == 0 and "Paris" in out, (out, err)
    assert not err, "a chat has nothing to say on stderr"


def test_missing_model_is_one_line(tmp_path):
    process = command("chat", "--model", str(tmp_path / "nothing.gguf"), "--prompt", "hi")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 1 and err.startswith("error: ") and err.count("\n") == 1, err


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
