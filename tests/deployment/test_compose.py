"""What the compose files promise: no site beside another's data, no way out for submitted code, keys for nodes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
SITES = tuple(f"hospital-{letter}" for letter in "abcde")
PARTS = ("egress", "node", "app")


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return loaded


def sources(service: dict[str, Any]) -> dict[str, str]:
    """Returns what a service mounts, by where: `${VARIABLE:-default}/rest` and volumes by name."""
    found = {}
    for volume in service.get("volumes", []):
        source, target, *options = volume.replace(":-", "~").split(":")
        found[target] = " ".join([source.replace("~", ":-"), *options])
    return found


def apps() -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    """Returns every service that runs submitted code at a site, with its file and where its data come from."""
    whole, alone = compose(), compose("site.compose.yaml")
    found = [(whole, whole["services"][f"{site}-app"], f"${{FEDMETA_DATA:-./data}}/{site} ro") for site in SITES]
    return [*found, (alone, alone["services"]["app"], "${FEDMETA_DATA:-./data} ro")]


def test_each_site_sees_its_own_data_alone() -> None:
    for whole, app, source in apps():
        assert sources(app)["/data"] == source
        others = [service for service in whole["services"].values() if service is not app]
        assert not [service for service in others if source in sources(service).values()]


def test_what_runs_submitted_code_has_no_key_and_no_way_out() -> None:
    for whole, app, _ in apps():
        assert sources(app)["/certs"].endswith("/public ro")
        (network,) = app["networks"]
        assert whole["networks"][network] == {"internal": True}
        beside = [name for name, service in whole["services"].items() if network in service["networks"]]
        assert len(beside) == 2, "its node and itself"
        assert "ports" not in app


def test_a_node_reaches_the_gate_through_its_egress_alone() -> None:
    for site in SITES:
        services, networks = compose()["services"], compose()["networks"]
        node, egress = services[f"{site}-node"], services[f"{site}-egress"]
        assert f"--superlink {site}-egress:8443 " in node["command"]
        assert egress["command"] == "fedmeta-proxy egress.conf /certs 0.0.0.0:8443 gate:8443"
        assert sorted(node["networks"]) == [f"{site}-in", f"{site}-way"]
        assert sorted(egress["networks"]) == [f"{site}-out", f"{site}-way"]
        assert all(networks[name] == {"internal": True} for name in {*node["networks"], *egress["networks"]})
    services = compose("site.compose.yaml")["services"]
    assert sorted(services["egress"]["networks"]) == ["out", "way"]
    assert sorted(services["supernode"]["networks"]) == ["in", "way"]


def test_proxies_bound_bodies_time_and_connections_and_check_both_sides() -> None:
    gate, egress = ((DOCKER / name).read_text() for name in ("gate.conf", "egress.conf"))
    for line in (
        "ssl_verify_client on;",
        "ssl_crl @CERTS@/revoked.pem;",
        "ssl_session_tickets off;",
        "proxy_ssl_name superlink;",
        "client_max_body_size 32m;",
        "client_header_timeout 10s;",
        "client_body_timeout 20s;",
        "limit_conn site 32;",
    ):
        assert line in gate
    for text in (gate, egress):
        assert "proxy_ssl_verify on;" in text
        assert 'default 0;\n        "~^POST:/v1/fleet/[a-z]+(-[a-z]+)*$" 1;' in text
        assert "if ($passes = 0) { return 404; }" in text
    assert "proxy_ssl_certificate @CERTS@/egress.crt;" in egress
    assert "proxy_ssl_name gate;" in egress


def test_submitted_code_runs_in_copies_of_a_process_that_has_torch() -> None:
    for _, app, _ in apps():
        # -P: the folder that it is started in is the run's to write to, and nothing is imported from there.
        assert app["command"].startswith("python -P -m fedmeta.prefork_superexec --runtime-api-address ")


def test_sites_share_no_network_and_no_volume() -> None:
    services = compose()["services"]
    for one in SITES:
        for other in SITES:
            if one == other:
                continue
            ours, theirs = ([services[f"{site}-{part}"] for part in PARTS] for site in (one, other))
            assert not {net for service in ours for net in service["networks"]} & {
                net for service in theirs for net in service["networks"]
            }
            assert not {source for service in ours for source in sources(service).values()} & {
                source for service in theirs for source in sources(service).values()
            }


def test_only_the_gate_is_open_to_others() -> None:
    services = compose()["services"]
    published = {name: port for name, service in services.items() for port in service.get("ports", [])}
    assert published.pop("gate") == "${FEDMETA_LISTEN:-0.0.0.0:8443}:8443"
    assert sorted(published) == ["mlflow", "superlink"]
    assert all(port.startswith("127.0.0.1:") for port in published.values())
    sites = {net for name, service in services.items() if "hospital" in name for net in service["networks"]}
    assert [
        name for name, service in services.items() if sites & set(service["networks"]) and "hospital" not in name
    ] == ["gate"]
    assert not [service for service in compose("site.compose.yaml")["services"].values() if "ports" in service]


@pytest.mark.parametrize("name", ["compose.yaml", "site.compose.yaml"])
def test_every_service_is_confined_encrypted_and_watched(name: str) -> None:
    for service_name, service in compose(name)["services"].items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges"]
        assert isinstance(service["healthcheck"]["test"], str), "podman-compose takes a string only"
        assert service_name == "mlflow" or "fedmeta.health https://" in service["healthcheck"]["test"]
        assert "--health-server-address" not in service["command"], "Flower's next version has none"
        assert "--insecure" not in service["command"], service_name
        assert all(source.endswith((" ro", "state")) for source in sources(service).values())
        if service["command"].startswith("flower-supernode"):
            assert "--isolation process" in service["command"]
            assert "--auth-supernode-private-key" in service["command"]
    links = [service for service in compose()["services"].values() if service["command"].startswith("flower-superlink")]
    assert ["--enable-supernode-auth" in service["command"] for service in links] == [True]


@pytest.mark.parametrize("name", ["compose.yaml", "site.compose.yaml"])
def test_a_variable_has_a_default_or_reports_what_is_missing(name: str) -> None:
    text = (DOCKER / name).read_text()
    assert not re.findall(r"\$\{\w+\}", text)
    asked = re.findall(r"\$\{(\w+):\?give [^}]+\}", text)
    assert asked == ([] if name == "compose.yaml" else ["FEDMETA_GATE", "FEDMETA_SITE"])
