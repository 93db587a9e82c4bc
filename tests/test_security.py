"""What docs/security.md says: loopback only, TLS passed through, no pickle from files, no shell."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from distributed import LocalCluster
from distributed.security import Security
from outsize.tiler.cluster import ClusterError, ClusterOptions
from outsize.tiler.events import Event, TileFinished
from outsize.tiler.raster import open_raster
from outsize.tiler.run import predict
from outsize.tiler.transfer import copy_raster

from .support.runs import class_network, scene, stored, whole

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[1]
FOLDERS = ("tiler", "models", "pipelines", "sample_data")
PICKLES = {
    # What comes from the commanding process, by Dask or a pipe.
    "tiler/engine_cuda.py": {"pickle.loads"},
    "tiler/engine_openvino.py": {"pickle.loads"},
    "tiler/engine_programs.py": {"pickle.loads"},
    "tiler/engine_torch.py": {"pickle.loads"},
    "tiler/memory_probe.py": {"pickle.loads"},
    "tiler/quantise.py": {"pickle.loads"},
    "tiler/training_cluster.py": {"pickle.loads"},
}
"""Files that unpickle, and how; tests/models has what models that could run code ask for."""


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(file, name as written, call) of every call in the package."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), "")


def test_no_shell_and_no_pickle_from_files() -> None:
    seen = 0
    for file, name, call in calls():
        seen += 1
        assert name not in ("os.system", "os.popen", "subprocess.getoutput", "pickle.load", "cloudpickle.load"), file
        assert keyword(call, "shell") in ("", "False"), file
        if name.endswith("pickle.loads"):
            assert name in PICKLES.get(file, ()), f"{file} unpickles"
        if name == "torch.load" and not file.startswith("models/segmentation/"):
            assert keyword(call, "weights_only") == "True", file
        if name.startswith("np.load") or name == "numpy.load":
            assert keyword(call, "allow_pickle") in ("", "False"), file
    assert seen > 5000


def test_child_processes_do_not_import_from_the_current_folder() -> None:
    found = 0
    for file, name, call in calls():
        words = ast.unparse(call.args[0]) if call.args else ""
        if name in ("subprocess.run", "subprocess.Popen") and "'-m'" in words:
            found += 1
            assert "'-P'" in words, file
    assert found >= 2


def listening() -> set[tuple[str, int]]:
    """Addresses at which this process and its children listen."""
    me = psutil.Process()
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in (me, *me.children(recursive=True))
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.parametrize("dashboard", ["127.0.0.1:0", None])
def test_a_run_listens_on_loopback_only(tmp_path: Path, dashboard: str | None) -> None:
    before, during = listening(), set[tuple[str, int]]()

    def look(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 1:
            during.update(listening() - before)

    options = ClusterOptions(dashboard_address=dashboard)
    source = scene(tmp_path, 100, 100)
    predict(source, class_network(), tmp_path / "o.zarr", cluster=options, workers=2, core=64, listener=look)
    assert len(during) >= 4  # scheduler, dashboard, each worker
    assert {address for address, _ in during} == {"127.0.0.1"}
    assert not listening() - before


@pytest.mark.parametrize("dashboard", ["127.0.0.1:0", None])
def test_a_copy_listens_on_loopback_only(tmp_path: Path, dashboard: str | None) -> None:
    before, during = listening(), set[tuple[str, int]]()
    options = ClusterOptions(dashboard_address=dashboard)
    copy_raster(
        open_raster(scene(tmp_path, 600, 600)),
        tmp_path / "o.zarr",
        workers=2,
        cluster=options,
        listener=lambda progress: during.update(listening() - before) if progress.advanced else None,
    )
    assert len(during) >= 4  # scheduler, dashboard or health page, each worker
    assert {address for address, _ in during} == {"127.0.0.1"}
    assert not listening() - before


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(certificate, key), its own authority."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    try:
        subprocess.run([*command, "-keyout", "key.pem", "-out", "ca.pem"], cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    return str(folder / "ca.pem"), str(folder / "key.pem")


def test_tls_is_passed_through(tmp_path: Path, certificate: tuple[str, str]) -> None:
    ca, key = certificate
    security = Security(
        require_encryption=True,
        tls_ca_file=ca,
        tls_scheduler_cert=ca,
        tls_scheduler_key=key,
        tls_worker_cert=ca,
        tls_worker_key=key,
        tls_client_cert=ca,
        tls_client_key=key,
    )
    source, out = scene(tmp_path, 100, 100), tmp_path / "o.zarr"
    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tls://",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        security=security,
    ) as cluster:
        address = cluster.scheduler_address
        assert address.startswith("tls://")
        with pytest.raises(ClusterError, match=r"no Dask scheduler at tls://"):
            predict(source, class_network(), out, cluster=ClusterOptions(scheduler=address), core=64)
        assert not out.exists()
        known = ClusterOptions(scheduler=address, tls_ca_file=ca, tls_cert=ca, tls_key=key)
        predict(source, class_network(), out, cluster=known, core=64, engine="torch")
    assert np.array_equal(stored(out), whole(class_network(), source))
