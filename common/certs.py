"""The certificates by which kvferry's processes know one another: a CA of one's own, and under it one for each role.

A role stands in its certificate twice. As a URI, `kvferry://role/ROLE`: a server looks there for what its caller may
do. As a name, `ROLE.kvferry`: a client expects that of the role which it means to call, whatever host it dials, and
speaks to nobody else. A certificate of a role that only calls cannot serve, and the other way round.

A new CA can follow an old one while both are in use. It is trusted beside the old one, and certificates under it bring
along what the old one says of the new: so they are accepted by those, too, who have not heard of it yet.

Everything here is P-256, ECDSA with SHA-256, in PEM. Nothing here reads or writes a file.
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CALLS, SERVES = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
ROLES: Mapping[str, x509.ObjectIdentifier] = MappingProxyType(
    {"router": CALLS, "prefill": SERVES, "decode": SERVES, "doctor": CALLS}
)
ROLE_URI = "kvferry://role/"
EARLIER = timedelta(hours=1)  # a certificate is good from before it was made: the clocks of hosts differ
CA_LIFETIME, LIFETIME = timedelta(days=3650), timedelta(days=365)

Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA: who has it can make certificates for any role."""

    certificate: x509.Certificate
    key: Key = field(repr=False)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A role's certificate and its key."""

    certificate: x509.Certificate
    key: Key = field(repr=False)


def new_authority(now: datetime, lifetime: timedelta = CA_LIFETIME) -> Authority:
    """A CA, which nobody stands above. No two have the same name."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _named(f"kvferry CA {secrets.token_hex(4)}")
    builder = _ca(_builder(subject, subject, key, key, now, now + lifetime), path_length=1)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def vouch(old: Authority, new: Authority, now: datetime) -> x509.Certificate:
    """What who trusts `old` alone needs to trust `new`: its name and key, signed by `old`, for as long as both last."""
    until = min(old.certificate.not_valid_after_utc, new.certificate.not_valid_after_utc)
    builder = _builder(new.certificate.subject, old.certificate.subject, new.key, old.key, now, until)
    return _ca(builder, path_length=0).sign(old.key, hashes.SHA256())


def issue(authority: Authority, role: str, now: datetime, lifetime: timedelta = LIFETIME) -> Leaf:
    """A new key and certificate for a role; it does not outlast its CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(now + lifetime, authority.certificate.not_valid_after_utc)
    names = [x509.DNSName(server_name(role)), x509.UniformResourceIdentifier(ROLE_URI + role)]
    builder = (
        _builder(_named(f"kvferry {role}"), authority.certificate.subject, key, authority.key, now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ROLES[role]]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return Leaf(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Key, issuing: Key, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuing.public_key()), critical=False)
    )


def _ca(builder: x509.CertificateBuilder, path_length: int) -> x509.CertificateBuilder:
    constraints = x509.BasicConstraints(ca=True, path_length=path_length)
    return builder.add_extension(constraints, critical=True).add_extension(_usage(signs=True), critical=True)


def _usage(signs: bool) -> x509.KeyUsage:
    """Of a CA, which signs certificates, or of a leaf, which signs handshakes."""
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


# -- what a certificate says ------------------------------------------------------------------------------------------


def server_name(role: str) -> str:
    """The name that a client expects of a server of this role."""
    return f"{role}.kvferry"


def role_among(uris: Iterable[str]) -> str:
    """The role that these URIs of a certificate name; empty unless it is exactly one, and one that there is."""
    named = {uri.removeprefix(ROLE_URI) for uri in uris if uri.startswith(ROLE_URI)}
    return named.pop() if len(named) == 1 and named <= ROLES.keys() else ""


def role_of(certificate: x509.Certificate) -> str:
    """A certificate's role; empty where it has none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ""
    return role_among(names.get_values_for_type(x509.UniformResourceIdentifier))


def name_of(certificate: x509.Certificate) -> str:
    """Its subject's name, for people."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else certificate.subject.rfc4514_string()


def fingerprint(certificate: x509.Certificate) -> str:
    return certificate.fingerprint(hashes.SHA256()).hex()


def issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Whether `issuer` signed it. Looks at no date."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def fits(key: Key, certificate: x509.Certificate) -> bool:
    """Whether the key is that of the certificate."""
    plain = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return key.public_key().public_bytes(*plain) == certificate.public_key().public_bytes(*plain)


def trusted(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]) -> bool:
    """Whether a leaf, with what it brings along, leads to a root. Looks at no date."""
    leaf, *brought = chain
    known = [*roots, *(one for one in brought if any(issued(root, one) for root in roots))]
    return any(issued(one, leaf) for one in known)


# -- as bytes ---------------------------------------------------------------------------------------------------------


def to_pem(certificates: Iterable[x509.Certificate]) -> bytes:
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)


def from_pem(data: bytes) -> list[x509.Certificate]:
    """The certificates, in order; there is at least one. Raises ValueError."""
    return x509.load_pem_x509_certificates(data)


def key_to_pem(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def key_from_pem(data: bytes) -> Key:
    """Raises ValueError for what is no such key."""
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise ValueError("it is encrypted") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("it is of another kind")
    return key
