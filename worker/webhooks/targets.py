"""
Which addresses a webhook may reach.

The address is checked after the name was resolved, each time, and the connection is made to that address:
a name server that answers differently the second time (DNS rebinding) gains nothing.
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any
from urllib.parse import urlsplit

from jobs.errors import ConfigError, ForbiddenError, SpecError
from storage.db.webhooks import DELIVERED, FAILED, PENDING, Webhook
from storage.settings import Settings

COMMAND = "command"
APPRISE = "apprise+"
NOT_BY_APPRISE = {
    **dict.fromkeys(("json", "jsons", "xml", "xmls", "form", "forms"), "a webhook with https:// is signed"),
    **dict.fromkeys(
        ("dbus", "glib", "gnome", "kde", "macosx", "qt", "syslog", "windows"),
        "it would appear on the server; ganq wait --notify shows a notification on this machine",
    ),
}
"""Services of apprise that are refused, and what to use instead."""
FORMS = "https://HOST/PATH, apprise+SERVICE://…, or command"


class AddressForbiddenError(ForbiddenError):
    """The settings do not allow a webhook to reach this host or address."""

    code = "ADDRESS_FORBIDDEN"


def channels(settings: Settings) -> tuple[str, ...]:
    """Return the channels that this machine can deliver to."""
    from importlib.util import find_spec

    found = ["http"]
    if settings.webhook_command:
        found.append("command")
    if find_spec("apprise") is not None:
        found.append("apprise")
    return tuple(found)


def read_target(text: str, settings: Settings) -> tuple[str, str]:
    """
    Return the channel and the URL of a new webhook.

    Raises:
        SpecError: it is malformed.
        ConfigError: this machine lacks what it needs.
        AddressForbiddenError: the settings do not allow the host.
    """
    if text == COMMAND:
        if not settings.webhook_command:
            raise ConfigError(
                "no command is set for webhooks",
                hint="set GANQ_WEBHOOK_COMMAND on the machines that run ganq web or workers, and here",
            )
        return "command", COMMAND
    if text.startswith(APPRISE):
        check_service(text, settings)
        return "apprise", text
    _, host, port = split_http(text)
    try:
        addresses(host, port, settings)
    except OSError:  # it may resolve where it is delivered
        check_host(host, settings)
    return "http", text


def split_http(url: str) -> tuple[str, str, int]:
    """
    Return scheme, host (in ASCII) and port of a webhook's URL.

    Raises:
        SpecError: it is malformed.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError as exc:  # also of an international name that cannot be
        raise SpecError(f"{shown(url)} is not a URL", hint=FORMS) from exc
    if (
        parts.scheme not in ("http", "https")
        or not host
        or not url.isascii()
        or not url.isprintable()
        or " " in url
    ):
        raise SpecError(f"{shown(url)!r} cannot be a webhook", hint=FORMS)
    if parts.username is not None or parts.password is not None:
        raise SpecError(
            "the URL of a webhook has a user or password",
            hint="leave them out: the signature identifies ganq",
        )
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80)


def shown(url: str) -> str:
    """Return a URL without what may be secret: query, and all of apprise's but the service."""
    if url.startswith(APPRISE):
        return f"{url.partition('://')[0]}://…"
    return url.partition("?")[0][:120]


def webhook_facts(hook: Webhook, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return what users see of a webhook, as JSON: not the secret."""
    facts = {name: value for name, value in asdict(hook).items() if name not in ("secret", "filters", "url")}
    deliveries = {state: counts.get(state, 0) for state in (PENDING, DELIVERED, FAILED)}
    url = {"url": shown(hook.url), "state": hook.state}
    return {**facts, **url, **asdict(hook.filters), "deliveries": deliveries}


def check_host(host: str, settings: Settings) -> None:
    """
    Check a host against the list of allowed hosts.

    Raises:
        AddressForbiddenError: it is not in that list.
    """
    allowed = _words(settings.webhook_hosts)
    if allowed and not any(
        host == one or (one.startswith("*.") and host.endswith(one[1:])) for one in allowed
    ):
        raise AddressForbiddenError(
            f"the settings do not allow webhooks to {host}",
            hint=f"GANQ_WEBHOOK_HOSTS allows {', '.join(allowed)}",
        )


def addresses(host: str, port: int, settings: Settings) -> list[str]:
    """
    Resolve a host and return the addresses that may be reached. May block.

    Raises:
        AddressForbiddenError: none may.
        OSError: the name cannot be resolved.
    """
    check_host(host, settings)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    unique = dict.fromkeys(str(address[0]) for *_, address in found)
    allowed = [one for one in unique if _is_allowed(one, settings)]
    if not allowed:
        raise _not_public(host, next(iter(unique)))
    return allowed


def _not_public(host: str, address: str) -> AddressForbiddenError:
    what = host if host == address else f"{host} is {address}, which"
    bits = 128 if ":" in address else 32
    return AddressForbiddenError(
        f"{what} is not a public address",
        hint=f"GANQ_WEBHOOK_NETWORKS={address}/{bits}, here and where it is delivered, would allow it",
    )


def _is_allowed(text: str, settings: Settings) -> bool:
    address = ip_address(text.partition("%")[0])
    embedded = [address, *_embedded(address)]
    networks = settings.webhook_networks_allowed
    return all(
        (one.is_global and not one.is_multicast) or any(one in network for network in networks)
        for one in (embedded[1:] or embedded)
    )


def _embedded(address: IPv4Address | IPv6Address) -> Sequence[IPv4Address | IPv6Address]:
    """Return the IPv4 addresses to which an IPv6 address leads: mapped, 6to4, NAT64."""
    if isinstance(address, IPv4Address):
        return ()
    nat64 = IPv4Address(int(address) & 0xFFFFFFFF) if int(address) >> 32 == 0x64FF9B << 64 else None
    return [one for one in (address.ipv4_mapped, address.sixtofour, nat64) if one is not None]


def check_service(url: str, settings: Settings) -> None:
    """
    Check a URL of apprise. May block while a host is resolved.

    apprise connects by itself, and resolves the name again.

    Raises:
        ConfigError: apprise is not installed.
        SpecError: apprise does not know the URL, or the service is refused.
        AddressForbiddenError: the settings do not allow the service, or its host.
    """
    service = url.removeprefix(APPRISE)
    scheme = service.partition("://")[0].lower()
    if scheme in NOT_BY_APPRISE:
        raise SpecError(f"apprise+{scheme}:// is not supported", hint=NOT_BY_APPRISE[scheme])
    allowed = _words(settings.webhook_hosts)
    if allowed and f"{scheme}:" not in allowed:
        raise AddressForbiddenError(
            f"the settings do not allow apprise+{scheme}://",
            hint=f"GANQ_WEBHOOK_HOSTS allows {', '.join(allowed)}; {scheme}: would allow it",
        )
    plugin = notifier(service)
    for host in {plugin.host, getattr(plugin, "smtp_host", None)} - {None, ""}:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):  # the place of a host is that of a token in many services
            continue
        for *_, address in found:
            if not _is_allowed(str(address[0]), settings):
                raise _not_public(host, str(address[0]))


def notifier(service: str) -> Any:
    """
    Return the plugin of apprise for a URL.

    Raises:
        ConfigError: apprise is not installed.
        SpecError: apprise does not know the URL.
    """
    try:
        from apprise import Apprise
    except ImportError as exc:
        raise ConfigError(
            "notifications through apprise need another package", hint="pip install 'ganq[notify]'"
        ) from exc
    plugin = Apprise.instantiate(service, suppress_exceptions=True)
    if plugin is None:
        raise SpecError(
            f"apprise cannot read this URL of {service.partition('://')[0][:40]!r}",
            hint="https://appriseit.com/services/ lists the services and their URLs",
        )
    return plugin


def _words(text: str) -> list[str]:
    return [one.strip().lower() for one in text.split(",") if one.strip()]
