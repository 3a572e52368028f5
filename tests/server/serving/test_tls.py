"""HTTPS by uvicorn's own means."""

import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from config.errors import UsageError
from config.settings import load_settings
from server.commands.http_server import make_server_config


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate of this machine's own, and its key."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def test_a_certificate_is_served(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    app = FastAPI()
    app.add_api_route("/health", lambda: "ok")
    config = make_server_config(load_settings({"ssl_certfile": str(cert), "ssl_keyfile": str(key)}), app)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            port = listener.getsockname()[1]
            trusted = ssl.create_default_context(cafile=str(cert))
            assert httpx.get(f"https://127.0.0.1:{port}/health", verify=trusted).json() == "ok"
            with pytest.raises(httpx.ConnectError, match="certificate"):
                httpx.get(f"https://127.0.0.1:{port}/health")
        finally:
            server.should_exit = True
            thread.join()


def test_a_certificate_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "cert.pem"
    bad.write_text("no certificate")
    for flags in (
        {"ssl_certfile": str(bad)},
        {"ssl_certfile": str(tmp_path / "none")},
        {"ssl_keyfile": str(bad)},
    ):
        with pytest.raises(UsageError, match="--ssl-"):
            make_server_config(load_settings(flags), FastAPI())
