"""Clusters that a run starts take Dask's defaults, whatever the user's settings are, and leave those as they were."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from dask import config
from outsize.tiler.base.errors import UsageError
from outsize.tiler.cluster.client import ClusterError, ClusterOptions, open_client
from outsize.tiler.cluster.settings import (
    BOKEH,
    LINK,
    METHOD,
    ORIGINS,
    cluster_settings,
    find_proxies,
    make_settings,
)
from outsize.tiler.system.private_folder import TemporaryFolderError

pytestmark = pytest.mark.system

ODD = {
    "distributed.worker.memory.monitor-interval": "abc",
    "distributed.worker.preload": "not_there",
    "distributed.nanny.preload": "not_there",
    "distributed.scheduler.preload": "not_there",
    "distributed.client.preload": "not_there",
    "distributed.client.security-loader": "not_there.loader",
    "distributed.client.heartbeat": "often",
    "distributed.nanny.environ": 5,
    "distributed.nanny.pre-spawn-environ": {"PYTHONHOME": "/nowhere"},
    "distributed.comm.require-encryption": True,
    "distributed.comm.tls.min-version": 7,
    "distributed.comm.tls.ca-file": "/nowhere",
    "distributed.comm.tls.ciphers": "none",
    "distributed.comm.default-scheme": "ucx",
    "distributed.comm.compression": "squeeze",
    "distributed.comm.timeouts.connect": "0s",
    "distributed.comm.timeouts.tcp": "0s",
    "distributed.scheduler.worker-ttl": "1ms",
    "distributed.scheduler.idle-timeout": "1ms",
    "distributed.scheduler.no-workers-timeout": "1ms",
    "distributed.scheduler.default-task-durations": 5,
    "distributed.scheduler.http.routes": ["not_there"],
    "distributed.scheduler.dashboard.tls.cert": "/nowhere",
    "distributed.scheduler.blocked-handlers": ["gather", "update-graph"],
    "distributed.worker.blocked-handlers": ["compute-task"],
    "distributed.worker.lifetime.duration": "1ms",
    "distributed.worker.multiprocessing-method": "fork",
    "distributed.worker.profile.interval": "zz",
    "distributed.admin.event-loop": "none",
    "distributed.admin.tick.interval": "zz",
}
"""Each of them ends a cluster, or its start."""


def test_a_users_settings_do_not_reach_a_runs_own_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of this process nor the variables that workers see."""
    for name, value in ODD.items():
        variable = "DASK_" + name.replace(".", "__").replace("-", "_").upper()
        # What is read as Dask is imported would end this process too.
        if "admin" not in name:
            monkeypatch.setenv(variable, str(value))
    before = dict(os.environ)
    with config.set(ODD):
        with open_client(
            ClusterOptions(dashboard_address=None), workers=1, threads=1, gdal_cache_bytes=1 << 24
        ) as client:
            assert client.submit(abs, -3).result(timeout=60) == 3
            told = client.submit(config.get, "distributed.worker.preload").result(timeout=60)
        assert {name: config.get(name) for name in ODD} == ODD
    assert told == []
    assert {name: os.environ.get(name) for name in before} == before


def test_settings_that_harm_no_cluster_stay() -> None:
    link = "https://hub.example.org/user/{USER_OF_HUB}/proxy/{port}/status"
    with pytest.MonkeyPatch.context() as patch:
        with config.set({LINK: link, METHOD: "forkserver", "distributed.diagnostics.nvml": False}):
            assert make_settings({})[LINK] == "{scheme}://{host}:{port}/status"  # a variable that is not there
            patch.setenv("USER_OF_HUB", "me")
            settings = make_settings({})
        assert settings[LINK] == link
        assert settings[METHOD] == "forkserver"
        assert settings["distributed.diagnostics.nvml"] is False
    assert make_settings({})[f"{BOKEH}.secret_key"] != settings[f"{BOKEH}.secret_key"]


@pytest.mark.parametrize(
    ("origins", "link", "names"),
    [
        (["*"], "{scheme}://{host}:{port}/status", set()),
        (
            ["*:8787", "HUB.example.org", "b.example.org:443"],
            "/proxy/{port}/status",
            {"hub.example.org", "b.example.org"},
        ),
        (["localhost:9999", "127.0.0.1:9999", "[::1]:1", 5, "["], "https://c.example.org/{port}", {"c.example.org"}),
        (5, None, set()),
        (None, "http://[", set()),
    ],
)
def test_names_of_proxies_come_from_dasks_settings(origins: object, link: object, names: set[str]) -> None:
    with config.set({ORIGINS: origins, LINK: link}):
        assert find_proxies() == names


def test_runs_of_several_threads_share_settings_until_the_last_ends() -> None:
    place, path, variable = config.get("temporary-directory", None), list(sys.path), os.environ.get("PYTHONSAFEPATH")
    first, second = cluster_settings({"A": "1"}), cluster_settings({"A": "2"})
    assert first.__enter__().environment == {"A": "1"}
    folder = Path(config.get("temporary-directory"))
    sys.path.insert(0, str(folder / "dask-scratch-space"))
    entered = threading.Thread(target=second.__enter__)
    entered.start()
    entered.join()
    first.__exit__(None, None, None)
    assert config.get("temporary-directory") == str(folder)
    assert folder.is_dir()
    second.__exit__(None, None, None)
    assert (config.get("temporary-directory", None), sys.path) == (place, path)
    assert os.environ.get("PYTHONSAFEPATH") == variable
    assert not folder.exists()


def test_variables_of_the_users_own_go_before_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDAL_CACHEMAX", "7")
    with cluster_settings({"GDAL_CACHEMAX": "64", "OTHER": "1"}) as settings:
        assert settings.environment == {"GDAL_CACHEMAX": "7", "OTHER": "1"}


def test_a_place_for_temporary_files_that_will_not_do_is_named(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for place, reason in ((tmp_path / "open", "changed by all users"), ("/proc", "No such file"), (5, "not int")):
        with config.set({"temporary-directory": place}), pytest.raises(TemporaryFolderError, match=reason) as refused:
            open_client(ClusterOptions(), workers=1, threads=1, gdal_cache_bytes=1).__enter__()
        assert str(refused.value).endswith("name a folder of your own by DASK_TEMPORARY_DIRECTORY or TMPDIR")


@pytest.mark.parametrize("address", ["host:port", "127.0.0.1:99999", "http://127.0.0.1:8787", "a b:1", "", "1:2:3"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"--dashboard-address must be HOST:PORT"):
        ClusterOptions(dashboard_address=address)


@pytest.mark.parametrize("address", ["127.0.0.1:0", ":8787", "8787", "myhost:8787", "127.0.0.1:1,myhost:2"])
def test_addresses_as_dask_takes_them(address: str) -> None:
    assert ClusterOptions(dashboard_address=address).dashboard_names >= ({"myhost"} if "myhost" in address else set())


def test_a_dashboard_that_cannot_be_served_there_is_not_taken_for_too_little_memory() -> None:
    options = ClusterOptions(dashboard_address="192.0.2.1:8787", processes=False)  # an address that no machine has
    with pytest.raises(ClusterError, match=r"no dashboard at .*: Cannot assign requested address") as refused:
        open_client(options, workers=1, threads=1, gdal_cache_bytes=1 << 24).__enter__()
    assert "memory" not in str(refused.value)


def test_workers_that_are_killed_as_they_start_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = "import os, sys\nif 'spawn_main' in str(sys.orig_argv):\n    os.kill(os.getpid(), 9)\n"
    (tmp_path / "usercustomize.py").write_text(killed)
    (tmp_path / "sitecustomize.py").write_text(killed)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ClusterOptions(dashboard_address=None)
    with pytest.raises(ClusterError, match=r"killed by signal 9; is there enough memory\?$"):
        open_client(options, workers=1, threads=1, gdal_cache_bytes=1 << 24).__enter__()
