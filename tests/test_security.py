"""What docs/reference/security.md says: loopback only, TLS passed through, no pickle from files, no shell."""

from __future__ import annotations

import ast
import contextlib
import os
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from dask import config
from distributed import Client, LocalCluster, default_client
from distributed.security import Security
from outsize.tiler.base.errors import EngineError, OutputError
from outsize.tiler.cluster.certificate import make_security
from outsize.tiler.cluster.client import ClusterError, ClusterOptions, open_client
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.engines.program_cache import ProgramCache
from outsize.tiler.engines.torch import prepare_compiler
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.events import Event, TileFinished
from outsize.tiler.runs.run import predict
from outsize.tiler.system.environment import worker_environment

from .support.runs import class_network, scene, stored, whole

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[1]
FOLDERS = ("tiler", "models", "pipelines", "sample_data")
PICKLES = {
    # What comes from the commanding process, by Dask or a pipe.
    "tiler/engines/cuda.py": {"pickle.loads"},
    "tiler/engines/openvino.py": {"pickle.loads"},
    "tiler/engines/programs.py": {"pickle.loads"},
    "tiler/engines/torch.py": {"pickle.loads"},
    "tiler/runs/inference.py": {"pickle.loads"},
    "tiler/runs/memory_probe.py": {"pickle.loads"},
    "tiler/engines/quantise.py": {"pickle.loads"},
    "tiler/training/cluster.py": {"pickle.loads"},
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


PLANTED = (
    *(
        "bokeh",
        "click",
        "cloudpickle",
        "cryptography",
        "dask",
        "distributed",
        "encodings",
        "jinja2",
        "locket",
        "msgpack",
    ),
    *(
        "multiprocessing",
        "numpy",
        "openvino",
        "outsize",
        "psutil",
        "rasterio",
        "runpy",
        "sitecustomize",
        "struct",
        "tblib",
    ),
    *("torch", "tornado", "usercustomize", "yaml", "zarr"),
)
"""Modules that a worker imports, or Python by itself."""


def plant(folder: Path, marks: Path) -> None:
    """Modules that leave a mark where they are imported."""
    folder.mkdir(parents=True)
    for name in PLANTED:
        (folder / f"{name}.py").write_text(f"open({str(marks / name)!r}, 'a')\nraise ImportError('planted')\n")


def talk(port: int, encrypted: bool) -> bytes:
    """What a stranger gets out of a port, who asks as Dask's clients do, at first with no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with contextlib.ExitStack() as stack:
            channel = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            if encrypted:
                channel = stack.enter_context(context.wrap_socket(channel))
            channel.sendall(b"GET / HTTP/1.1\r\n\r\n")
            return channel.recv(1000)
    except (ssl.SSLError, ConnectionError, TimeoutError):
        return b""


@dataclass
class Watched:
    """What was seen in the middle of a run."""

    listened: set[tuple[str, int]] = field(default_factory=set)
    scheduler: str = ""
    dashboard: int = 0
    answers: dict[tuple[int, bool], bytes] = field(default_factory=dict)
    foreign: str = ""
    """What a client was told that has another certificate."""
    folders: list[tuple[Path, int]] = field(default_factory=list)
    """For temporary files, and their modes."""
    ran: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def look_at(seen: Watched, before: set[tuple[str, int]], temporary: Path) -> None:
    client = default_client()
    seen.listened = listening() - before
    seen.scheduler = client.scheduler_info()["address"]
    seen.dashboard = client.scheduler_info()["services"]["dashboard"]
    others = {port for _, port in seen.listened} - {seen.dashboard}
    seen.answers = {(port, encrypted): talk(port, encrypted) for port in others for encrypted in (True, False)}
    with pytest.raises(OSError, match=r".") as refused:
        Client(seen.scheduler, security=make_security(), timeout="2s", set_as_default=False)
    seen.foreign = str(refused.value)
    seen.folders = [(folder, folder.stat().st_mode & 0o777) for folder in temporary.glob("outsize-dask-*")]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """One run, with modules planted in the current folder and where Dask has its temporary files by itself."""
    folder, seen = tmp_path_factory.mktemp("run"), Watched()
    temporary, marks = folder / "temporary", folder / "marks"
    marks.mkdir()
    plant(temporary / "dask-scratch-space", marks)
    plant(folder / "current", marks)
    before, path, variables = listening(), list(sys.path), dict(os.environ)
    told = config.get("distributed.nanny.pre-spawn-environ")

    def look(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 1:
            look_at(seen, before, temporary)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "current")
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", None)
        options = ClusterOptions(dashboard_address="127.0.0.1:0")
        source = scene(folder, 100, 100)
        predict(source, class_network(), folder / "o.zarr", cluster=options, workers=2, core=64, listener=look)
    seen.ran = [mark.name for mark in marks.iterdir()]
    seen.left = [str(place) for place in temporary.iterdir() if place.name != "dask-scratch-space"]
    seen.left += [f"port {port}" for _, port in listening() - before]
    seen.left += sorted({*sys.path} ^ {*path})
    ours = {"PYTHONSAFEPATH", "PYTHONHASHSEED", *worker_environment(1)}
    seen.left += sorted(name for name in ours if os.environ.get(name) != variables.get(name))
    if config.get("distributed.nanny.pre-spawn-environ") != told or config.get("temporary-directory"):
        seen.left.append("Dask's settings")
    return seen


def test_a_run_listens_on_loopback_only(watched: Watched) -> None:
    assert len(watched.listened) >= 6  # scheduler, dashboard, each worker and its nanny
    assert {address for address, _ in watched.listened} == {"127.0.0.1"}


def test_only_processes_of_the_run_are_talked_to(watched: Watched) -> None:
    """The ports but for the dashboard's: of workers' pages there are none, the others speak TLS."""
    assert watched.scheduler.startswith("tls://127.0.0.1:")
    assert len(watched.answers) >= 10
    pages = {answer for answer in watched.answers.values() if answer.startswith(b"HTTP")}
    assert all(answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 ")) for answer in pages)
    assert {answer for answer in watched.answers.values() if not answer.startswith(b"HTTP")} <= {b""}
    assert "Timed out" in watched.foreign or "TLS" in watched.foreign.upper()


def test_nothing_is_imported_from_where_others_can_write(watched: Watched) -> None:
    assert watched.ran == []
    assert [mode for _, mode in watched.folders] == [0o700]


def test_a_run_leaves_nothing_behind(watched: Watched) -> None:
    assert watched.left == []


def test_a_copy_listens_on_loopback_only(tmp_path: Path) -> None:
    before, during = listening(), set[tuple[str, int]]()
    copy_raster(
        open_raster(scene(tmp_path, 600, 600)),
        tmp_path / "o.zarr",
        workers=2,
        cluster=ClusterOptions(dashboard_address=None),
        listener=lambda progress: during.update(listening() - before) if progress.advanced else None,
    )
    assert len(during) >= 4  # scheduler, health page, each worker
    assert {address for address, _ in during} == {"127.0.0.1"}
    assert not listening() - before


def test_workers_that_are_threads_listen_on_loopback_only() -> None:
    before = listening()
    options = ClusterOptions(dashboard_address=None, processes=False)
    with open_client(options, workers=1, threads=1, gdal_cache_bytes=1 << 24) as client:
        assert client.submit(abs, -1).result() == 1
        during = listening() - before
    assert {address for address, _ in during} <= {"127.0.0.1"}


def test_links_of_others_beside_an_output_are_not_followed(tmp_path: Path) -> None:
    """In a folder where others write too, names beside the output can be foreseen."""
    source, aim = scene(tmp_path, 70, 70), tmp_path / "aim"
    aim.mkdir()
    (aim / "precious").write_text("x")
    outputs = tmp_path / "o.zarr", tmp_path / "c.zarr"
    for out in outputs:
        out.with_name(f"{out.name}.creating").symlink_to(aim)
    threads = ClusterOptions(processes=False, dashboard_address=None)
    predict(source, class_network(), outputs[0], cluster=threads, core=64, engine="torch")
    copy_raster(open_raster(source), outputs[1])
    assert np.array_equal(stored(outputs[0]), whole(class_network(), source))
    out = tmp_path / "other.zarr"
    out.with_name("other.zarr.run").symlink_to(aim)
    with pytest.raises(OutputError, match=r"other\.zarr\.run is a link"):
        predict(source, class_network(), out, cluster=threads, core=64, engine="torch")
    assert [path.name for path in aim.iterdir()] == ["precious"]


def test_caches_are_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask is; and torch's compiled code lies there, not under a name in /tmp that others can foresee."""
    monkeypatch.setenv("OUTSIZE_CACHE_DIR", str(tmp_path / "new" / "cache"))
    ours = str(tmp_path / "new" / "cache" / "compiled")
    for named, kept in ((None, False), ("/tmp/torchinductor_me", False), (str(tmp_path / "mine"), True)):
        if named is None:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        else:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", named)
        prepare_compiler()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == (named if kept else ours)
    before = os.umask(0)
    try:
        ProgramCache("network").write_text("note", "x")
    finally:
        os.umask(before)
    folders = [path for path in (tmp_path / "new").rglob("*") if path.is_dir()]
    assert len(folders) == 4
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (tmp_path / "new", *folders)} == {0o700}
    (tmp_path / "new" / "cache").chmod(0o777)
    with pytest.raises(EngineError, match=r"cache can be changed by all users: .*; name a folder .*OUTSIZE_CACHE_DIR"):
        prepare_compiler()


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
