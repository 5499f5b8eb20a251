"""Every shipped schedule is of its form, calls a command that exists, and never runs two nights at once."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
from pathlib import Path

import yaml

from jobs.cli import HELD, NIGHT, build_parser

FOLDER = Path(__file__).parent.parent / "jobs" / "schedules"


def require_command(line: str) -> None:
    """The words after ``hllm`` parse."""
    words = shlex.split(re.search(r"(?:^|/)hllm (refresh .*)", line).group(1))
    parsed = build_parser().parse_args(words)
    assert (parsed.command, parsed.config) == ("refresh", parsed.config)
    assert parsed.config.endswith("nightly.toml")


def test_crontab():
    lines = [line for line in (FOLDER / "crontab").read_text().splitlines() if line and line[0] not in "#S"]
    (line,) = lines
    *when, command = line.split(None, 5)
    assert len(when) == 5
    assert all(re.fullmatch(r"[\d*,/-]+", field) for field in when)
    require_command(command.split(">>")[0])


def test_systemd():
    units = {}
    for name in ("service", "timer"):
        units[name] = configparser.ConfigParser(interpolation=None, strict=True)
        units[name].optionxform = str
        units[name].read_string((FOLDER / f"hllm-refresh.{name}").read_text())
    service = units["service"]["Service"]
    assert service["Type"] == "oneshot"  # the timer does not start it again while it runs
    assert service["SuccessExitStatus"] == str(HELD)
    require_command(service["ExecStart"])
    assert re.fullmatch(r"\*-\*-\* \d\d:\d\d:\d\d", units["timer"]["Timer"]["OnCalendar"])
    assert units["timer"]["Install"]["WantedBy"] == "timers.target"


def test_kubernetes():
    job = yaml.safe_load((FOLDER / "kubernetes-cronjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    require_command(" ".join(container["command"]))
    assert "RAY_ADDRESS" in [variable["name"] for variable in container["env"]]
    (rule,) = job["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["onExitCodes"]["containerName"], rule["onExitCodes"]["values"]) == (container["name"], [HELD])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_airflow():
    """Airflow is no dependency: the file is compiled, and its values are read from the tree."""
    source = (FOLDER / "airflow_dag.py").read_text()
    tree = ast.parse(source)
    compile(source, "airflow_dag.py", "exec")
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            values[node.targets[0].id] = ast.literal_eval(node.value)
    assert values["STEPS"] == (*NIGHT, None)
    assert values["HELD"] == HELD
    for step in NIGHT:
        require_command(f"hllm refresh --config nightly.toml --until {step}")
    assert "max_active_runs=1" in source
    assert "catchup=False" in source
