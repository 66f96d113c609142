"""``s2p-deploy doctor``."""

from __future__ import annotations

from s2p_deploy.engines.support import shipped_folder
from tests.cli.commands import Run


def test_the_support_table_of_every_installed_backend_is_named(run: Run) -> None:
    ended = run("doctor", "--json")
    assert ended.code == 0, ended.err
    tables = {backend["backend"]: backend["support_table"] for backend in ended.data["backends"]}
    assert tables["onnxruntime"] is None or (shipped_folder() / tables["onnxruntime"]).is_file()
    assert all(table is None for name, table in tables.items() if name == "tensorrt")
