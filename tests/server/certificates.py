"""An authority, a server's certificate and a client's, made anew for each run of the tests."""

import ssl
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import trustme

from llmd.config import HttpConfig

# removed when the tests end
_folder = TemporaryDirectory(prefix="llmd-test-")


@dataclass(frozen=True)
class Certificates:
    """Files in PEM, and what a client needs to trust them."""

    authority: trustme.CA
    folder: Path

    @property
    def certfile(self) -> Path:
        return self.folder / "server.pem"

    @property
    def keyfile(self) -> Path:
        return self.folder / "server.key"

    @property
    def ca_certs(self) -> Path:
        return self.folder / "ca.pem"

    def client_context(self, *alpn_protocols: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.authority.configure_trust(context)
        if alpn_protocols:
            context.set_alpn_protocols(list(alpn_protocols))
        return context


def make_certificates(folder: Path) -> Certificates:
    authority = trustme.CA()
    made = Certificates(authority, folder)
    write_server_certificate(made)
    authority.cert_pem.write_to_path(made.ca_certs)
    return made


def write_server_certificate(certificates: Certificates) -> None:
    """A new one, in place of what was there."""
    issued = certificates.authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(certificates.keyfile)
    certificates.certfile.unlink(missing_ok=True)
    for blob in issued.cert_chain_pems:
        blob.write_to_path(certificates.certfile, append=True)


@cache
def shared_certificates() -> Certificates:
    """Those of every test that does not change them."""
    return make_certificates(Path(_folder.name))


def tls_config(certificates: Certificates) -> HttpConfig:
    return HttpConfig(ssl_certfile=str(certificates.certfile), ssl_keyfile=str(certificates.keyfile))
