"""The real command with a certificate, and real clients: openai over both versions of HTTP, and curl."""

import asyncio
import json
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import httpx2
import openai
import pytest

from tests.end_to_end.running_server import RunningServer, running_server
from tests.server.certificates import Certificates, make_certificates

pytestmark = pytest.mark.slow

QUESTION = {"prompt": "abc", "max_tokens": 8, "seed": 1}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path, certificates: Certificates) -> Iterator[RunningServer]:
    files = ("--ssl-certfile", str(certificates.certfile), "--ssl-keyfile", str(certificates.keyfile))
    with running_server("--model", str(tiny_model_dir), *files) as running:
        yield running


@pytest.fixture
def trust(certificates: Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificates.ca_certs)


@pytest.mark.parametrize("http2", [False, True])
def test_openai_client(server: RunningServer, trust: ssl.SSLContext, http2: bool) -> None:
    assert server.url.startswith("https://")
    with httpx2.Client(verify=trust, http2=http2) as connections:
        client = openai.OpenAI(base_url=server.base_url, api_key="EMPTY", max_retries=0, http_client=connections)
        whole = client.completions.create(model="default", **QUESTION)  # type: ignore[call-overload]
        chunks = list(client.completions.create(model="default", stream=True, **QUESTION))  # type: ignore[call-overload]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(model="gpt-17", prompt="abc")
        assert unknown.value.code == "model_not_found"
        assert connections.get(f"{server.url}/health").http_version == ("HTTP/2" if http2 else "HTTP/1.1")


def test_many_streams_on_one_connection(server: RunningServer, trust: ssl.SSLContext) -> None:
    """The same seed, the same text, whoever else runs."""

    async def ask_all() -> set[str]:
        async with httpx2.AsyncClient(verify=trust, http2=True, limits=httpx2.Limits(max_connections=1)) as connections:
            client = openai.AsyncOpenAI(
                base_url=server.base_url, api_key="EMPTY", max_retries=0, http_client=connections
            )

            async def ask() -> str:
                stream = await client.completions.create(model="default", stream=True, **QUESTION)  # type: ignore[call-overload]
                return "".join([chunk.choices[0].text async for chunk in stream])

            return set(await asyncio.gather(*(ask() for _ in range(16))))

    assert len(asyncio.run(ask_all())) == 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl(server: RunningServer, certificates: Certificates, version: str) -> None:
    command = ["curl", "-sSN", version, "--cacert", str(certificates.ca_certs), "-w", "%{http_version}"]
    command += ["-H", "content-type: application/json", "-d", json.dumps({**QUESTION, "stream": True})]
    said = subprocess.run([*command, f"{server.url}/v1/completions"], check=True, capture_output=True, text=True)
    *events, last = said.stdout.split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert last in ("1.1", "2")


def test_a_stranger_does_not_trust_it(server: RunningServer) -> None:
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(f"{server.url}/health")


def test_files_that_cannot_be_used_are_refused_before_anything_starts(
    tiny_model_dir: Path, certificates: Certificates
) -> None:
    command = [sys.executable, "-m", "llmd", "serve", "--model", str(tiny_model_dir), "--port", "0"]
    command += ["--ssl-certfile", str(certificates.certfile), "--ssl-keyfile", str(certificates.ca_certs)]
    refused = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert f"--ssl-keyfile {certificates.ca_certs}: there is no private key in it" in refused.stderr
    assert "Traceback" not in refused.stderr
