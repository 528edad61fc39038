"""Network interfaces that NCCL and gloo could not use are named before ranks try to connect."""

from pathlib import Path

import pytest
from programs import run_program

from sdxl_trainer.launch.interfaces import check_host_address, check_interfaces

INTERFACES = ["lo", "eth0", "ib0", "ib1"]


@pytest.mark.parametrize(
    ("variable", "value", "missing"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", None),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", None),
        ("GLOO_SOCKET_IFNAME", "eth0,ib", "ib"),
        ("GLOO_SOCKET_IFNAME", "eth1", "eth1"),
        ("NCCL_SOCKET_IFNAME", "ib", None),
        ("NCCL_SOCKET_IFNAME", "en,eth", None),  # one of them is enough
        ("NCCL_SOCKET_IFNAME", "^docker,lo", None),
        ("NCCL_SOCKET_IFNAME", "=eth0", None),
        ("NCCL_SOCKET_IFNAME", "=eth", "=eth"),
        ("NCCL_SOCKET_IFNAME", "ens", "ens"),
        ("NCCL_SOCKET_IFNAME", "", None),
    ],
)
def test_an_interface_that_is_missing_is_named_with_those_that_exist(
    variable: str, value: str, missing: str | None
) -> None:
    problems = [(found.key, found.value) for found in check_interfaces({variable: value}, INTERFACES, use_nccl=True)]
    assert problems == ([] if missing is None else [(variable, missing)])
    if missing:
        [problem] = check_interfaces({variable: value}, INTERFACES, use_nccl=True)
        assert problem.cure == "it has eth0, ib0, ib1"


def test_nccl_is_not_examined_without_gpus() -> None:
    assert list(check_interfaces({"NCCL_SOCKET_IFNAME": "ens"}, INTERFACES, use_nccl=False)) == []


@pytest.mark.parametrize(
    ("environment", "address", "rule"),
    [
        ({"MASTER_ADDR": "10.0.0.1"}, "10.0.0.2", None),
        ({"MASTER_ADDR": "10.0.0.1"}, "127.0.1.1", "resolves to 127.0.1.1"),
        ({"MASTER_ADDR": "10.0.0.1"}, None, "cannot be resolved"),
        ({"MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": "eth0"}, "127.0.1.1", None),
        ({"MASTER_ADDR": "127.0.0.1"}, "127.0.1.1", None),  # two launchers on one machine
    ],
)
def test_a_host_name_that_leads_other_nodes_to_themselves(
    environment: dict[str, str], address: str | None, rule: str | None
) -> None:
    problems = list(check_host_address(environment, "node7", address))
    assert len(problems) == (rule is not None)
    if rule is not None:
        assert problems[0].key == "GLOO_SOCKET_IFNAME" and rule in problems[0].rule and "node7" in problems[0].rule


def test_a_rank_with_a_missing_interface_ends_with_status_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "from sdxl_trainer.launch.distributed import init_ranks\n"
    program += "from sdxl_trainer.launch.program import end_program, run_program\nend_program(run_program(init_ranks))"
    (tmp_path / "program.py").write_text(program)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    printed = run_program(tmp_path / "program.py", expect=2)
    assert "Traceback" not in printed and "GLOO_SOCKET_IFNAME" in printed and "no-such-interface" in printed
