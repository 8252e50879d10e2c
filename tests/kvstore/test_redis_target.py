"""Which Redis is meant: each wrong URL or file is one sentence, and none of them tells a password."""

import asyncio
import datetime
import ipaddress
import ssl
from hashlib import sha256

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from directory_world import holders_at, keys_of, said_all, until
from redis_proxy import Proxy
from redis_server import RedisServer

from kvferry.common.errors import ConfigError
from kvferry.kvstore.redis_directory import RedisDirectory
from kvferry.kvstore.redis_target import parse_redis_url, redis_acl

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "shown", "facts"),
    [
        ("redis://h", "redis://h:6379", {"kind": "redis", "hosts": (("h", 6379),), "db": 0, "tls": False}),
        ("redis://h:1234/", "redis://h:1234", {"hosts": (("h", 1234),), "db": 0}),
        ("redis://10.0.0.1:1234/3", "redis://10.0.0.1:1234/3", {"hosts": (("10.0.0.1", 1234),), "db": 3}),
        ("redis://[::1]:1234", "redis://[::1]:1234", {"hosts": (("::1", 1234),)}),
        ("rediss://h", "rediss://h:6379", {"kind": "redis", "tls": True}),
        ("unix:///run/redis.sock", "unix:///run/redis.sock", {"kind": "unix", "path": "/run/redis.sock"}),
        (
            "redis+sentinel://a,b:1/main/2",
            "redis+sentinel://a:26379,b:1/main/2",
            {"kind": "redis+sentinel", "hosts": (("a", 26379), ("b", 1)), "master": "main", "db": 2},
        ),
        ("redis+sentinel://a/main", "redis+sentinel://a:26379/main", {"master": "main", "db": 0}),
        ("rediss+sentinel://a/main", "rediss+sentinel://a:26379/main", {"kind": "redis+sentinel", "tls": True}),
        (
            "redis+cluster://a:1,b:2",
            "redis+cluster://a:1,b:2",
            {"kind": "redis+cluster", "hosts": (("a", 1), ("b", 2)), "db": 0},
        ),
        ("rediss+cluster://a", "rediss+cluster://a:6379", {"kind": "redis+cluster", "tls": True}),
    ],
)
def test_urls(url, shown, facts):
    target = parse_redis_url(url)
    assert {name: getattr(target, name) for name in facts} == facts
    assert str(target) == shown
    assert parse_redis_url(shown) == target


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "h:6379",
            "http://h",
            "redis:h",
            "redis://",
            "redis:///0",
            "redis://h:0",
            "redis://h:x",
            "redis://h:99999",
        ),
        *("redis://a,b", "redis://h/x", "redis://h/0/1", "redis://h/-1", "redis://a b", "redis://[::1"),
        *("unix://", "unix://run/redis.sock", "redis+cluster://a/0", "redis+cluster://a,", "redis+cluster://"),
        *("redis+sentinel://a", "redis+sentinel://a/", "redis+sentinel://a//0", "redis+sentinel://a/main/x"),
        *(f"redis://user:{SECRET}@h", f"redis://:{SECRET}@h:1", f"redis+cluster://user:{SECRET}@a,b"),
        *(f"redis://h?password={SECRET}", f"redis://h#{SECRET}", f"rediss://h/0?password={SECRET}", f"x:{SECRET}@h"),
    ],
)
def test_wrong_urls(url):
    with pytest.raises(ConfigError) as refused:
        parse_redis_url(url)
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "given", "sentence"),
    [
        ("redis://h", {"password_file": "missing"}, "cannot be read: No such file"),
        ("redis://h", {"password_file": "empty"}, "has no password in its first line"),
        ("redis://h", {"password_file": "binary"}, "is not text"),
        ("redis://h", {"user": "kvferry"}, "needs a password file"),
        ("redis://h", {"ca_file": "secret"}, "is not encrypted"),
        ("rediss://h", {"ca_file": "secret"}, "CA file .* cannot be used"),
        ("rediss://h", {"ca_file": "missing"}, "cannot be used: No such file"),
        ("redis://h", {"sentinel_password_file": "secret"}, "has no sentinels"),
        ("redis+sentinel://h/m", {"sentinel_password_file": "missing"}, "cannot be read"),
    ],
)
def test_wrong_files(url, given, sentence, tmp_path):
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "secret").write_text(SECRET)
    files = {name: tmp_path / value if name.endswith("file") else value for name, value in given.items()}
    with pytest.raises(ConfigError, match=sentence) as refused:
        parse_redis_url(url, **files)
    assert SECRET not in str(refused.value)


def test_what_is_kept_of_a_password(tmp_path):
    (tmp_path / "password").write_text(f"{SECRET}\nanother line\n")
    target = parse_redis_url("redis+sentinel://h/m", user="kvferry", password_file=tmp_path / "password")
    assert target.login() == {"username": "kvferry", "password": SECRET}
    assert target.sentinel_login() == {}
    assert SECRET not in repr(target)


def test_the_acl_line():
    assert redis_acl("kvferry").startswith("ACL SETUSER kvferry reset on >PASSWORD ~kvf:* +")
    line = redis_acl("kvferry", SECRET)
    assert SECRET not in line
    assert f" #{sha256(SECRET.encode()).hexdigest()} " in line
    for wrong in ("", "a b", "a\nb", "a\0b"):
        with pytest.raises(ConfigError, match="name"):
            redis_acl(wrong)


# -- encrypted --------------------------------------------------------------------------------------------------------


def authority(folder, label):
    """A server's context and its CA file, for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, label)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    (folder / f"{label}.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    (folder / f"{label}.crt").write_bytes(certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{label}.crt", folder / f"{label}.key")
    return context, folder / f"{label}.crt"


def test_an_encrypted_redis_is_who_its_certificate_says(tmp_path):
    """A real Redis behind a proxy that speaks TLS."""
    server = RedisServer().start()

    async def story():
        context, ours = authority(tmp_path, "ours")
        _, anothers = authority(tmp_path, "anothers")
        proxy = await Proxy(server.port, tls=context).start()
        (a,), keys = holders_at(0), keys_of("x", 100)
        reader = holders_at(0, 1)[1]
        right = parse_redis_url(f"rediss://127.0.0.1:{proxy.port}", ca_file=ours)
        told, reads = await RedisDirectory.open(right, a), await RedisDirectory.open(right, reader)
        await told.announce(keys)
        await until(lambda: said_all(told))
        assert await reads.locate(keys) == [(a,)] * 100
        for url, ca in (
            (f"rediss://127.0.0.1:{proxy.port}", anothers),
            (f"rediss://127.0.0.1:{proxy.port}", None),
            (f"rediss://localhost:{proxy.port}", ours),
            (f"redis://127.0.0.1:{proxy.port}", None),
        ):
            wrong = await RedisDirectory.open(parse_redis_url(url, ca_file=ca), reader)
            assert wrong.stats().open
            assert await wrong.locate(keys) == [()] * 100
            await wrong.close()
        for directory in (told, reads):
            await directory.close()
        await proxy.end()

    try:
        asyncio.run(asyncio.wait_for(story(), 60))
    finally:
        server.end()
