"""What the certificates say, and which of them OpenSSL, which is not ours, accepts for what."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from handshakes import handshake

from kvferry.common import certs
from kvferry.common.certs import CALLS, ROLES, SERVES, Leaf

NOW = datetime.now(UTC)
CA, OTHER = certs.new_authority(NOW), certs.new_authority(NOW)
LEAVES = {role: certs.issue(CA, role, NOW) for role in ROLES}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_stands_in_its_certificate_twice(role):
    leaf = LEAVES[role].certificate
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [f"{role}.kvferry"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"kvferry://role/{role}"]
    assert certs.role_of(leaf) == role
    assert certs.name_of(leaf) == f"kvferry {role}"


@pytest.mark.parametrize("role", ROLES)
def test_what_a_key_is_for(role):
    leaf = LEAVES[role].certificate
    (purpose,) = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    serves = role in ("prefill", "decode")
    assert purpose == (ExtendedKeyUsageOID.SERVER_AUTH if serves else ExtendedKeyUsageOID.CLIENT_AUTH)
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert (usage.value.digital_signature, usage.value.key_cert_sign) == (True, False)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_what_a_ca_is_for():
    usage = CA.certificate.extensions.get_extension_for_class(x509.KeyUsage)
    limits = CA.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert usage.critical
    assert limits.critical
    assert (usage.value.digital_signature, usage.value.key_cert_sign) == (False, True)
    assert limits.value.ca
    assert CA.certificate.subject != OTHER.certificate.subject


def test_until_when():
    leaf = LEAVES["router"].certificate
    assert leaf.not_valid_before_utc == NOW.replace(microsecond=0) - timedelta(hours=1)
    assert leaf.not_valid_after_utc == NOW.replace(microsecond=0) + timedelta(days=365)
    short = certs.new_authority(NOW, timedelta(days=9))
    outlasting = certs.issue(short, "router", NOW, timedelta(days=365)).certificate
    assert outlasting.not_valid_after_utc == short.certificate.not_valid_after_utc


@pytest.mark.parametrize(
    ("uris", "role"),
    [
        (["kvferry://role/router"], "router"),
        (["https://else.where", "kvferry://role/decode"], "decode"),
        (["kvferry://role/router", "kvferry://role/decode"], ""),
        (["kvferry://role/king"], ""),
        (["kvferry://role/"], ""),
        (["kvferry://role/router/"], ""),
        (["KVFERRY://role/router"], ""),
        (["https://role/router"], ""),
        ([], ""),
    ],
)
def test_a_role_is_one_that_there_is_or_none(uris, role):
    assert certs.role_among(uris) == role


def test_a_certificate_without_names_has_no_role():
    assert certs.role_of(CA.certificate) == ""


def test_as_pem_and_back():
    leaf = LEAVES["decode"]
    assert certs.from_pem(certs.to_pem([leaf.certificate, CA.certificate])) == [leaf.certificate, CA.certificate]
    key = certs.key_from_pem(certs.key_to_pem(leaf.key))
    assert certs.fits(key, leaf.certificate)
    assert not certs.fits(key, LEAVES["prefill"].certificate)
    for wrong in (b"", b"no PEM", certs.key_to_pem(leaf.key)):
        with pytest.raises(ValueError):
            certs.from_pem(wrong)
    for wrong in (b"", b"no PEM", certs.to_pem([leaf.certificate])):
        with pytest.raises(ValueError):
            certs.key_from_pem(wrong)


class TestTwoCAs:
    """A new CA follows an old one."""

    new = certs.new_authority(NOW)
    bridge = certs.vouch(CA, new, NOW)
    leaf = certs.issue(new, "prefill", NOW).certificate

    def test_who_leads_where(self):
        assert certs.trusted([self.leaf], [self.new.certificate])
        assert not certs.trusted([self.leaf], [CA.certificate])
        assert certs.trusted([self.leaf, self.bridge], [CA.certificate])
        assert certs.trusted([self.leaf], [CA.certificate, self.new.certificate])
        assert not certs.trusted([self.leaf, self.bridge], [OTHER.certificate])
        forged = certs.vouch(OTHER, self.new, NOW)
        assert not certs.trusted([self.leaf, forged], [CA.certificate])

    def test_the_bridge_does_not_outlast_the_old_one(self):
        brief = certs.new_authority(NOW, timedelta(days=5))
        assert certs.vouch(brief, self.new, NOW).not_valid_after_utc == brief.certificate.not_valid_after_utc

    def test_the_new_one_cannot_vouch_below_the_bridge(self):
        """To who trusts the old CA alone the new one may name roles, and no further CA."""
        third = certs.new_authority(NOW)
        leaf = certs.issue(third, "prefill", NOW)
        chain = [leaf.certificate, certs.vouch(self.new, third, NOW), self.bridge]
        told = handshake((chain, leaf.key), [CA, self.new, third], LEAVES["router"], [CA])
        assert "path length" in told


def test_openssl_accepts_a_router_at_a_worker():
    assert handshake(LEAVES["prefill"], [CA], LEAVES["router"], [CA]) == ""
    assert handshake(LEAVES["decode"], [CA], LEAVES["doctor"], [CA], "decode") == ""


def test_openssl_accepts_both_sides_halfway_to_a_new_ca():
    new = certs.new_authority(NOW)
    bridge = certs.vouch(CA, new, NOW)

    def of(role: str) -> tuple[list[x509.Certificate], certs.Key]:
        leaf = certs.issue(new, role, NOW)
        return [leaf.certificate, bridge], leaf.key

    servers = [(LEAVES["prefill"], [CA]), (of("prefill"), [new, CA])]
    clients = [(LEAVES["router"], [CA]), (of("router"), [new, CA])]
    for server in servers:
        for client in clients:
            assert handshake(*server, *client) == ""
    for server, client in ((servers[1], (of("router"), [new])), ((of("prefill"), [new]), clients[1])):
        assert handshake(*server, *client) == "", "one side has dropped the old CA already"


EXPIRED = certs.issue(CA, "router", NOW - timedelta(days=20), timedelta(days=10))


@pytest.mark.parametrize(
    ("server", "client", "says"),
    [
        (LEAVES["prefill"], EXPIRED, "certificate has expired"),
        (LEAVES["prefill"], certs.issue(OTHER, "router", NOW), "unable to get local issuer"),
        (LEAVES["prefill"], LEAVES["decode"], "unsuitable certificate purpose"),
        (LEAVES["router"], LEAVES["router"], "unsuitable certificate purpose"),
        (LEAVES["decode"], LEAVES["router"], "prefill.kvferry"),
        (certs.issue(OTHER, "prefill", NOW), LEAVES["router"], "unable to get local issuer"),
        (certs.issue(CA, "prefill", NOW + timedelta(days=1)), LEAVES["router"], "not yet valid"),
    ],
    ids=[
        "expired",
        "other CA",
        "a worker that calls",
        "a router that serves",
        "other role",
        "other CA's worker",
        "early",
    ],
)
def test_openssl_refuses(server: Leaf, client: Leaf, says):
    assert says in handshake(server, [CA], client, [CA])


def test_the_roles_that_there_are():
    assert dict(ROLES) == {"router": CALLS, "prefill": SERVES, "decode": SERVES, "doctor": CALLS}
