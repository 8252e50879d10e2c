"""Why no connection to a worker comes about, for a person: gRPC only says that the socket was closed."""

import asyncio
import os
import ssl
from datetime import UTC, datetime

from cryptography import x509

from kvferry.common import certs
from kvferry.common.credentials import Credentials, minute

PATIENCE_S = 2.0
AGAIN_S = 0.3  # who is just ending hangs up, too, and is gone then
EXPIRED, NOT_YET, PURPOSE = 10, 9, 26  # OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED, _CERT_NOT_YET_VALID, _INVALID_PURPOSE
NO_TLS = "WRONG_VERSION_NUMBER"
WANTS_CERTIFICATES = "it wants certificates; start this one with --certs, too"


async def why_refused(address: str, role: str, credentials: Credentials | None) -> str:
    """What is wrong between us and a server of `role` at `host:port`, as far as two handshakes in a row tell: with
    these credentials, or without any. Empty where nothing is, or where nobody answers."""
    if not (found := await _look(address, role, credentials)):
        return ""
    await asyncio.sleep(AGAIN_S)
    return found if await _look(address, role, credentials) == found else ""


async def expiry_at(address: str, role: str, credentials: Credentials) -> datetime | None:
    """Until when the certificate is valid that a server of `role` shows; None if it shows none. Who does not show it to
    these credentials is asked without any, which its log tells of."""
    for shown in (credentials, None):
        try:
            async with asyncio.timeout(PATIENCE_S):
                reader, writer = await _open(address, role, shown)
                try:
                    theirs = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
                    if shown is not None:
                        await reader.read(1)  # by then it has taken our certificate, and has nothing to complain of
                    return x509.load_der_x509_certificate(theirs).not_valid_after_utc
                finally:
                    writer.close()
        except OSError:  # an SSLError or a TimeoutError is one
            continue
    return None


async def _open(
    address: str, role: str, credentials: Credentials | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Raises OSError."""
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(
        host.strip("[]"), int(port), ssl=_context(credentials), server_hostname=certs.server_name(role)
    )


async def _look(address: str, role: str, credentials: Credentials | None) -> str:
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await _open(address, role, credentials)
            try:
                return await _told(reader, writer, role, credentials)
            finally:
                writer.close()
    except ssl.SSLCertVerificationError as error:
        return _fault(error.verify_code)
    except ssl.SSLError as error:
        plain = credentials is not None and error.reason == NO_TLS
        return "it answers without certificates; start it with --certs, too" if plain else ""
    except (OSError, TimeoutError):
        return ""


async def _told(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, role: str, credentials: Credentials | None
) -> str:
    """The server has shown a certificate. In TLS 1.3 it looks at ours only now, and hangs up if it does not like it."""
    if credentials is None:
        return WANTS_CERTIFICATES
    shown = writer.get_extra_info("ssl_object").getpeercert()
    uris = [value for kind, value in shown.get("subjectAltName", ()) if kind == "URI"]
    if (named := certs.role_among(uris)) != role:
        return f"its certificate is that of {named or 'no role'}, not of {role}"
    if await reader.read(1):
        return ""
    if credentials.expires <= datetime.now(UTC):
        return f"it refuses our certificate, which expired at {minute(credentials.expires)}"
    return "it refuses our certificate; perhaps its ca.pem does not have our CA, or its clock is wrong"


def _context(credentials: Credentials | None) -> ssl.SSLContext:
    """As gRPC's, less the name: whose certificate it is instead is what we are here to tell."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    if credentials is None:
        context.verify_mode = ssl.CERT_NONE
        return context
    context.load_verify_locations(cadata=credentials.roots.decode())
    memory = os.memfd_create("kvferry-certificate", os.MFD_CLOEXEC)  # OpenSSL takes a path, and files may have changed
    try:
        os.write(memory, credentials.chain + credentials.key)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
    return context


def _fault(verify_code: int) -> str:
    if verify_code == EXPIRED:
        return "its certificate has expired; run `kvferry certs rotate` and copy the new files there"
    if verify_code == NOT_YET:
        return "its certificate is not valid yet; set the clocks"
    if verify_code == PURPOSE:
        return "its certificate is that of a role that only calls"
    return "its certificate is not from a CA of our ca.pem"
