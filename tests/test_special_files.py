"Paths that are no files: each ends at once in one error that says what the path is; none waits for a writer."
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_workbench.errors import CheckpointError, SourceError
from llm_workbench.files.gguf import GGUFFile
from llm_workbench.files.safetensors import (INDEX, SafetensorsFile, map_file, open_safetensors, replace_file,
                                             save_safetensors, special_file)

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a matter of POSIX systems")
WORDS = dict(pipe="pipe", link="pipe", socket="socket", device="character device", folder="folder")


@pytest.fixture
def special(tmp_path):
    "One path of each sort; the device stands behind a link, so that a writer that fails the test replaces only that."
    paths = {name: tmp_path / name for name in WORDS}
    os.mkfifo(paths["pipe"])
    paths["link"].symlink_to(paths["pipe"])
    paths["device"].symlink_to("/dev/zero")
    paths["folder"].mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)      # the path of a socket may have about a hundred characters
        try: server.bind("socket")
        finally: os.chdir(here)
        yield paths


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("read", [map_file, SafetensorsFile, GGUFFile])
def test_reading_says_what_the_path_is(special, name, read):
    with pytest.raises(SourceError, match=WORDS[name]) as error: read(special[name])
    assert str(special[name]) in str(error.value)


@pytest.mark.parametrize("name", ["pipe", "link", "socket", "device"])
def test_a_checkpoint_made_of_special_files(special, name, tmp_path):
    "As the file itself, as a folder's weights, as its index and as a shard of it."
    with pytest.raises(SourceError, match=WORDS[name]): open_safetensors(special[name])
    for held in ("model.safetensors", INDEX):
        (tmp_path / held).symlink_to(special[name])
        with pytest.raises(SourceError, match=WORDS[name]): open_safetensors(tmp_path)
        (tmp_path / held).unlink()
    (tmp_path / "shard").symlink_to(special[name])
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "shard"}}')
    with pytest.raises(CheckpointError, match=f"shard.*{WORDS[name]}"): open_safetensors(tmp_path)


@pytest.mark.parametrize("name", WORDS)
def test_nothing_special_is_replaced_by_a_file(special, name, tmp_path):
    before = {p: stat.S_IFMT(p.lstat().st_mode) for p in tmp_path.iterdir()}
    with pytest.raises(SourceError, match=WORDS[name]): save_safetensors({"a": torch.ones(2)}, special[name])
    with pytest.raises(SourceError):
        with replace_file(special[name]): raise AssertionError("the block ran")
    after = {p: stat.S_IFMT(p.lstat().st_mode) for p in tmp_path.iterdir()}
    assert after == before


def test_files_folders_and_nothing_are_not_special(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path, tmp_path / "nothing", tmp_path / "file" / "below", "a\0b", "x" * 5000):
        assert special_file(path) is None, path


@pytest.mark.parametrize("path", ["nothing", "file/below", "a\0b", "x" * 5000])
def test_names_that_cannot_be_files(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="There is no file"): map_file(tmp_path / path)


def test_a_pipe_without_a_writer_does_not_hang(special):
    "In a process of its own, so that a reader that waits would end this test and not the whole run."
    code = ("import sys; from llm_workbench.files.safetensors import open_safetensors\n"
            "try: open_safetensors(sys.argv[1])\n"
            "except OSError as error: print(type(error).__name__)")
    done = subprocess.run([sys.executable, "-c", code, special["pipe"]], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "SourceError", done.stderr
