"""A TLS handshake of Python's own, in memory, as a second opinion on certificates."""

import ssl
import tempfile
from collections.abc import Sequence

from cryptography import x509

from kvferry.common import certs
from kvferry.common.certs import Authority, Key, Leaf

Shown = Leaf | tuple[Sequence[x509.Certificate], Key]
ROUNDS = 8


def handshake(
    server: Shown,
    its_roots: Sequence[Authority],
    client: Shown,
    clients_roots: Sequence[Authority],
    role: str = "prefill",
) -> str:
    """What either side has against the other, where the client means to call a server of `role`; empty if nothing."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    serving = context(ssl.PROTOCOL_TLS_SERVER, server, its_roots).wrap_bio(to_server, to_client, server_side=True)
    calling = context(ssl.PROTOCOL_TLS_CLIENT, client, clients_roots).wrap_bio(
        to_client, to_server, server_hostname=certs.server_name(role)
    )
    waiting = [calling, serving]
    for _ in range(ROUNDS):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as error:
                return str(error)
    return "it does not end" if waiting else ""


def context(kind: int, shown: Shown, roots: Sequence[Authority]) -> ssl.SSLContext:
    chain, key = ([shown.certificate], shown.key) if isinstance(shown, Leaf) else shown
    made = ssl.SSLContext(kind)
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(cadata=certs.to_pem([root.certificate for root in roots]).decode())
    with tempfile.NamedTemporaryFile() as file:
        file.write(certs.to_pem(chain) + certs.key_to_pem(key))
        file.flush()
        made.load_cert_chain(file.name)
    return made
