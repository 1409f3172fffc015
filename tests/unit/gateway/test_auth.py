"""Who may enter, as which tenant, and whose cache it sees."""

from hashlib import sha256

import pytest

from pdserve.core.admission import DEFAULT_TENANT
from pdserve.gateway.auth import ANYONE, Authenticator, Identity, TenantKeys


def tenant(name: str, *keys: str, share_group: str | None = None) -> TenantKeys:
    return TenantKeys(name=name, digests=tuple(sha256(key.encode()).digest() for key in keys), share_group=share_group)


def identify(authenticator: Authenticator, key: str) -> Identity:
    identity = authenticator.identify(f"Bearer {key}")
    assert identity is not None
    return identity


def test_without_keys_and_tenants_everyone_is_the_same() -> None:
    assert Authenticator(()).identify(None) is ANYONE


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic one-key", "one-key"])
@pytest.mark.parametrize("keys", [("one-key",), ()], ids=["keys", "tenants"])
def test_nobody_enters_without_a_known_key(header: str | None, keys: tuple[str, ...]) -> None:
    tenants = () if keys else (tenant("t", "one-key"),)
    assert Authenticator(keys, tenants).identify(header) is None
    assert Authenticator(keys, tenants).identify("bearer one-key") is not None


def test_keys_of_a_tenant_are_the_same_to_it_and_others_are_not() -> None:
    authenticator = Authenticator(("plain", "other"), (tenant("a", "a1", "a2"), tenant("b", "b1")))
    a1, a2, b1, plain, other = (identify(authenticator, key) for key in ("a1", "a2", "b1", "plain", "other"))
    assert a1 == a2
    assert (a1.tenant, b1.tenant, plain.tenant, other.tenant) == ("a", "b", DEFAULT_TENANT, DEFAULT_TENANT)
    salts = {a1.salt, b1.salt, plain.salt, other.salt}
    assert len(salts) == 4
    assert all(len(salt) == 16 for salt in salts)


def test_a_share_group_and_nothing_else_shares_a_cache() -> None:
    tenants = (
        tenant("a", "1", share_group="g"),
        tenant("b", "2", share_group="g"),
        tenant("g", "3"),
        tenant("c", "4", share_group="a"),
    )
    a, b, g, c = (identify(Authenticator((), tenants), key).salt for key in "1234")
    assert a == b
    assert len({a, g, c}) == 3, "names of groups and of tenants are apart"


def test_a_key_may_be_exchanged_without_losing_what_is_cached() -> None:
    old, new = (identify(Authenticator((), (tenant("a", key),)), key) for key in ("old-key", "new-key"))
    assert old == new
