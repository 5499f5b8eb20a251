"""An Airflow DAG: one task a step, so that each can be seen and run again. Copy it into the DAG folder.

Each task is the refresh up to its step, which finds what the tasks before it made; the last one is the whole of it:
gates, promotion, clean-up.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

FOLDER = "/srv/hllm"
STEPS = ("prepare-data", "embed-items", "train-user", "build-index", "embed-users", "evaluate", None)
HELD = 3  # a held release: the champion serves on, the task is shown as skipped

with DAG(
    dag_id="hllm_refresh",
    schedule="10 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=10)},
) as dag:
    before = None
    for step in STEPS:
        task = BashOperator(
            task_id="release" if step is None else step.replace("-", "_"),
            bash_command=".venv/bin/hllm refresh --config nightly.toml"
            + ("" if step is None else f" --until {step}"),
            cwd=FOLDER,
            skip_on_exit_code=HELD,
        )
        if before is not None:
            before >> task
        before = task
