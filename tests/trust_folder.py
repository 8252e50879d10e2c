"""A folder for `--certs`, with files as a test wants them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from kvferry.common import certs
from kvferry.common.certs import Authority, Leaf
from kvferry.common.credentials import CA_FILE, Credentials, certificate_file, key_file, load


class Folder:
    """What the host of one role has. `ca` issues, and is the one that is trusted, unless a test says otherwise."""

    def __init__(self, path: Path, role: str, ca: Authority | None = None):
        self.path, self.role = path, role
        self.ca = ca or certs.new_authority(datetime.now(UTC))

    def fill(self) -> "Folder":
        self.path.mkdir(mode=0o700, exist_ok=True)
        self.trust(self.ca)
        self.put(self.issue())
        return self

    def issue(self, role: str = "", days: float = 365, ago: float = 0) -> Leaf:
        """Made so many days ago, for so many."""
        now = datetime.now(UTC) - timedelta(days=ago)
        return certs.issue(self.ca, role or self.role, now, timedelta(days=days))

    def trust(self, *authorities: Authority) -> None:
        self.write(CA_FILE, certs.to_pem([one.certificate for one in authorities]))

    def put(self, leaf: Leaf, *brought: x509.Certificate) -> None:
        self.write(key_file(self.role), certs.key_to_pem(leaf.key))
        self.write(certificate_file(self.role), certs.to_pem([leaf.certificate, *brought]))

    def write(self, name: str, data: bytes) -> None:
        """In one step."""
        beside = self.path / f".{name}"
        beside.write_bytes(data)
        beside.chmod(0o600)
        beside.replace(self.path / name)

    def credentials(self) -> Credentials:
        return load(self.path, self.role, datetime.now(UTC))
