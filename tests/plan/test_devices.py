"""Known devices and machines: right names, right numbers, nothing guessed."""

from __future__ import annotations

import pytest

from swift.plan.devices import DEVICES, GIB, load_site, recognise, site_from, site_names
from swift.utils.errors import UserError

VALUES = {
    "device": "h200",
    "devices_per_node": 8,
    "link_gb_s": 450,
    "node_link_gb_s": 400,
    "host_memory_gb": 2000,
    "host_link_gb_s": 55,
    "matmul_fraction": 0.5,
    "bandwidth_fraction": 0.7,
    "link_fraction": 0.7,
    "latency_us": 20,
    "usable_memory": 0.9,
}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("AMD Instinct MI250X", 191.5e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("Intel(R) Data Center GPU Max 1550", 419.4e12),
    ],
)
def test_names_of_torch(name: str, peak: float) -> None:
    device = recognise(name)
    assert device is not None
    assert device.peak("bf16") == peak


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H100 NVL",
        "NVIDIA GH200 480GB",
        "AMD Instinct MI250X / MI250",
        "NVIDIA GeForce RTX 4090",
        "CPU",
        "",
    ],
)
def test_an_unknown_device_is_none(name: str) -> None:
    assert recognise(name) is None


def test_a_part_or_a_pair_of_a_known_device_is_unknown() -> None:
    name = "Intel(R) Data Center GPU Max 1550"
    assert recognise(name, 64 * GIB) is DEVICES["max1550_tile"]
    assert recognise(name, 128 * GIB) is None
    assert recognise("NVIDIA H100 80GB HBM3", 10 * GIB) is None


def test_sites() -> None:
    assert {"frontier", "aurora", "perlmutter", "local"} <= set(site_names())
    frontier, aurora, perlmutter = load_site("frontier"), load_site("aurora"), load_site("perlmutter")
    assert (frontier.devices_per_node, aurora.devices_per_node, perlmutter.devices_per_node) == (8, 12, 4)
    assert frontier.device is DEVICES["mi250x_gcd"]
    assert frontier.node_link == 100e9
    assert frontier.latency == pytest.approx(25e-6)
    assert load_site("local").devices_per_node >= 1


@pytest.mark.parametrize("name", ["nowhere", "../config", ""])
def test_unknown_site(name: str) -> None:
    with pytest.raises(UserError, match=f"site={name}: no such machine; known are aurora, frontier"):
        load_site(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "abacus"}, "device=abacus: known are mi250x_gcd"),
        ({"link_gb_s": 0}, "link_gb_s=0: must be a number above 0"),
        ({"matmul_fraction": 1.5}, "matmul_fraction=1.5: must be a number above 0 and at most 1"),
        ({"latency_us": "fast"}, "latency_us=fast: must be a number above 0"),
        ({"colour": "red"}, "check colour"),
    ],
)
def test_a_wrong_site_file_is_one_line(tmp_path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        site_from("mine", VALUES | change, tmp_path / "mine.yaml")
    assert "\n" not in str(error.value)
    assert site_from("mine", VALUES, tmp_path / "mine.yaml").node_link == 400e9
