# SPDX-License-Identifier: Apache-2.0
"""`cumo serve` as a command: it starts, answers, tells of errors in its arguments, and ends on a signal."""

import os
import signal
import socket
import subprocess
import sys
from http.client import HTTPConnection

import openai
import pytest

from cumo.cli import main
from cumo.serve.command import allowed_hosts
from tests.inference.tiny import picture
from tests.serve.serving import until, user


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_up(port):
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.mark.slow
def test_the_command(folder, tmp_path):
    port = free_port()
    arguments = ["serve", str(folder), "--device", "cpu", "--port", str(port), "--max-tokens", "32"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cumo", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"CUMO_API_KEY": "secret"},
        )
        try:
            until(lambda: is_up(port) or process.poll() is not None, seconds=90)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as client:
                (model,) = client.models.list()
                assert model.id == folder.name
                response = client.chat.completions.create(
                    model=model.id, messages=[user("What?", picture())], max_tokens=3, temperature=0
                )
                assert response.usage.completion_tokens == 3
                with pytest.raises(openai.BadRequestError, match="max_tokens: expected up to 32, got 33"):
                    client.chat.completions.create(model=model.id, messages=[user("What?")], max_tokens=33)
            with (
                openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
                pytest.raises(openai.AuthenticationError),
            ):
                client.models.list()
            with pytest.raises(OSError, match=r"refused|unreachable|assign"):  # 127.0.0.1 alone is listened on
                socket.create_connection(("127.0.0.2", port), timeout=5)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) in (0, 130)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/absent"], "cumo serve: error: "),
        (["/absent", "--max-images", "0"], "cumo serve: error: max_images: expected a positive number, got 0"),
        (["/absent", "--device", "gpu"], "cumo serve: error: device: expected a device such as cpu or cuda:0"),
    ],
    ids=["no-folder", "limit", "device"],
)
def test_arguments_that_do_not_fit(capsys, arguments, message):
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "further", "expected"),
    [
        ("127.0.0.1", [], {"localhost", "127.0.0.1", "[::1]"}),
        ("localhost", ["demo.example"], {"localhost", "127.0.0.1", "[::1]", "demo.example"}),
        ("::1", [], {"localhost", "127.0.0.1", "[::1]", "::1"}),
        ("0.0.0.0", [], None),
        ("0.0.0.0", ["demo.example"], {"localhost", "127.0.0.1", "[::1]", "0.0.0.0", "demo.example"}),
    ],
)
def test_names_under_which_it_may_be_asked(host, further, expected):
    actual = allowed_hosts(host, further)
    assert (None if actual is None else set(actual)) == expected
