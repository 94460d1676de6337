"""A studio that is stopped, or whose disk is full: it ends soon and leaves nothing, or says so and goes on."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.slow
PROMPTS, VIEWS = "the letter a\nthe letter v", "identity\nrotate_180"


@contextmanager
def started(model: Path, folder: Path, preexec: Callable | None = None) -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
    """A studio in a process group of its own, which writes its files under `folder`, and a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "TMPDIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "eqldm.studio", "--model", str(model), "--port", str(port)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, preexec_fn=preexec
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            for _ in range(1200):
                try:
                    client.get("config")
                    break
                except httpx.TransportError:
                    assert process.poll() is None, process.stdout.read()
                    time.sleep(0.1)
            yield process, client
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def form(model: Path, count: int, steps: int) -> dict:
    data = [str(model), PROMPTS, "these views", VIEWS, "colour", 0, count, steps, 3, "", "", "ddim", "mean", "latents", 4, 1]
    return {"data": data}


@pytest.mark.fault("studio stopped at a random moment of a picture, by Ctrl-C or SIGTERM", tries=4)
def test_stop(tiny_model_folder, tmp_path, seed):
    told = (signal.SIGINT, signal.SIGTERM)[seed % 2]
    with started(tiny_model_folder, tmp_path) as (process, client):
        event = client.post("gradio_api/call/sample", json=form(tiny_model_folder, 16, 100)).json()["event_id"]
        with client.stream("GET", f"gradio_api/call/sample/{event}") as answer:
            next(line for line in answer.iter_lines() if "generating" in line)
            time.sleep(random.Random(seed).uniform(0, 2))
            os.kill(process.pid, told)
            before = time.monotonic()
            assert process.wait(timeout=60) == 128 + told
            assert time.monotonic() - before < 30  # within seconds where the machine is not busy
        output = process.stdout.read()
        assert f"stopped by {told.name}" in output and "Traceback" not in output
        with pytest.raises(ProcessLookupError):  # nobody is left of its group
            os.killpg(process.pid, 0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.fault("studio stopped while it starts", tries=4)
def test_stop_at_start(tiny_model_folder, tmp_path, seed):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "eqldm.studio", "--model", str(tiny_model_folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(random.Random(seed).uniform(0, 20))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM) and "Traceback" not in output
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.fault("studio whose disk is full", tries=1)
def test_full_disk(tiny_model_folder, tmp_path, seed):
    """Stood for by a limit on the size of files: what is shown cannot be written. The page says why, and the studio goes on."""
    with started(tiny_model_folder, tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))) as (process, client):
        for _ in range(2):
            event = client.post("gradio_api/call/sample", json=form(tiny_model_folder, 1, 2)).json()["event_id"]
            answer = client.get(f"gradio_api/call/sample/{event}").text
            assert "File too large" in json.dumps(answer)
        assert process.poll() is None
