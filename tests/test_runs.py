"""The runs as the server lists them, and who may read them."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.api import auth
from serving.api.pages import MAX_POINTS, find_runs, thin
from serving.api.settings import ApiSettings
from tests.fake_engine import FakeEngine
from tests.front_end import serve

KEY = "sk-a-key"
HEADER = "step,tokens,train/loss,val/loss,tokens_per_s"


def write_run(run_dir: Path, *rows: str, summary: dict[str, Any] | None = None) -> Path:
    """Write the files of a run, finished where there is a summary."""
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.csv").write_text("\n".join([HEADER, *rows, ""]))
    (run_dir / "config.yaml").write_text("stage: pretrain\nmax_steps: 20\n")
    if summary is not None:
        (run_dir / "summary.json").write_text(json.dumps(summary))
        (run_dir / "report.html").write_text(f"<!doctype html><title>{run_dir.name}</title>")
    return run_dir


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    done = {"stage": "pretrain", "steps": 20, "val_loss": 2.5, "name": "tiny"}
    write_run(tmp_path / "runs" / "tiny", "10,80,3.5,,9", "20,160,3.0,2.5,8", summary=done)
    return tmp_path / "runs"


@pytest.fixture
def locked(engine: FakeEngine, runs_dir: Path) -> Iterator[str]:
    with serve(engine, ApiSettings(runs_dir=str(runs_dir), api_keys=(KEY,))) as address:
        yield address


def test_a_run_is_listed_with_its_curves_and_its_model(url: str) -> None:
    (run,) = httpx.get(f"{url}/v1/runs").json()["data"]
    assert (run["id"], run["state"], run["stage"], run["step"]) == (
        "tiny",
        "finished",
        "pretrain",
        20,
    )
    assert run["curves"] == {"train/loss": [[10, 3.5], [20, 3.0]], "val/loss": [[20, 2.5]]}
    assert run["summary"]["val_loss"] == 2.5
    assert run["model"] == "tiny"
    assert run["report"] == "/runs/tiny/report.html"


def test_a_report_is_a_document_without_rights(url: str) -> None:
    answer = httpx.get(f"{url}/runs/tiny/report.html")
    assert answer.text == "<!doctype html><title>tiny</title>"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none'")
    assert "allow" not in policy
    assert "script" not in policy


@pytest.mark.parametrize(
    "path",
    [
        "/runs/none/report.html",
        "/runs/../secret/report.html",
        "/runs/%2e%2e/secret/report.html",
        "/runs/..%2fsecret/report.html",
        "/runs//report.html",
        "/runs/tiny/metrics.csv",
    ],
)
def test_only_reports_of_listed_runs_are_given(url: str, runs_dir: Path, path: str) -> None:
    (runs_dir.parent / "secret").mkdir()
    (runs_dir.parent / "secret" / "report.html").write_text("secret")
    raw = httpx.Request("GET", url)
    raw.url = httpx.URL(url).copy_with(raw_path=path.encode())
    with httpx.Client() as client:
        answer = client.send(raw)
    assert answer.status_code == 404
    assert "error" in answer.json()


def test_a_report_that_is_a_link_is_not_followed(url: str, runs_dir: Path) -> None:
    run_dir = write_run(runs_dir / "linked", "1,8,3,,")
    (run_dir / "report.html").symlink_to("/etc/passwd")
    assert httpx.get(f"{url}/runs/linked/report.html").status_code == 404


@pytest.mark.parametrize("path", ["/runs", "/v1/runs", "/runs/tiny/report.html"])
@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "192.0.2.1"},
        {"Forwarded": "for=192.0.2.1"},
        {"X-Real-IP": "192.0.2.1"},
        {"Via": "1.1 proxy"},
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
)
def test_without_keys_only_this_machine_is_answered(
    url: str, path: str, headers: dict[str, str]
) -> None:
    assert httpx.get(url + path).status_code == 200
    answer = httpx.get(url + path, headers=headers)
    assert answer.status_code == 403
    assert "tiny" not in answer.text


@pytest.mark.parametrize("path", ["/v1/runs", "/runs/tiny/report.html"])
def test_with_keys_every_asker_needs_one(locked: str, path: str) -> None:
    refused = httpx.get(locked + path)
    assert refused.status_code == 401
    assert "tiny" not in refused.text
    forwarded = {"Authorization": f"Bearer {KEY}", "X-Forwarded-For": "192.0.2.1"}
    assert httpx.get(locked + path, headers=forwarded).status_code == 200


def test_the_page_has_no_data_and_needs_no_key(locked: str) -> None:
    answer = httpx.get(f"{locked}/runs")
    assert answer.status_code == 200
    assert 'src="static/runs.js"' in answer.text
    assert "tiny" not in answer.text


def test_a_ticket_opens_its_report_and_nothing_else(locked: str, runs_dir: Path) -> None:
    write_run(runs_dir / "other", "1,8,3,,", summary={})
    key = {"Authorization": f"Bearer {KEY}"}
    listed = httpx.get(f"{locked}/v1/runs", headers=key).json()["data"]
    reports = {run["id"]: run["report"] for run in listed}
    assert httpx.get(locked + reports["tiny"]).status_code == 200
    _, _, ticket = reports["tiny"].partition("?")
    for path in ("/runs/other/report.html", "/v1/models", "/v1/runs"):
        assert httpx.get(f"{locked}{path}?{ticket}").status_code == 401
    assert httpx.post(locked + reports["tiny"]).status_code == 401


def test_a_ticket_ends_and_cannot_be_made_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ApiSettings(api_keys=(KEY,))
    other, none = ApiSettings(api_keys=("other",)), ApiSettings()
    ticket = auth.ticket("/a", keys)
    assert auth.admits("/a", ticket, keys)
    assert not auth.admits("/b", ticket, keys)
    assert not auth.admits("/a", ticket, other)
    assert not auth.admits("/a", auth.ticket("/a", none), none)
    longer = str(int(ticket.partition("-")[0]) + 1)
    assert not auth.admits("/a", f"{longer}-{ticket.partition('-')[2]}", keys)
    later = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later)
    assert not auth.admits("/a", ticket, keys)


@pytest.mark.parametrize("ticket", ["", "-", "x-y", "9" * 99 + "-a", "٣-a", "1-\udcff"])
def test_a_ticket_of_any_form_is_read_without_failing(ticket: str) -> None:
    keys = ApiSettings(api_keys=(KEY,))
    assert not auth.admits("/a", ticket.encode("utf-8", "replace").decode(), keys)


DEEP = "a: " + "[" * 3000 + "]" * 3000
MERGES = "a0: &a0 {k: 0}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("summary.json", b"[]", "[] should be a mapping"),
        ("summary.json", b"", "Expecting value"),
        ("summary.json", b'{"a": "\xff"}', "utf-8"),
        ("summary.json", b"[" * 100_000, "recursion depth"),
        ("config.yaml", DEEP.encode(), "recursion depth"),
        ("config.yaml", b"- 1", "not a mapping"),
        ("config.yaml", b"\0" * 4096, "config.yaml cannot be read"),
        ("config.yaml", b"# " * 2**18, "524,288 bytes; at most 262,144 are read"),
    ],
)
def test_a_damaged_run_is_listed_with_the_reason_and_with_whole_ones(
    url: str,
    runs_dir: Path,
    file: str,
    content: bytes,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_dir = write_run(runs_dir / "damaged", "1,8,2.5,,")
    (run_dir / file).write_bytes(content)
    for _ in range(2):
        listed = httpx.get(f"{url}/v1/runs").json()["data"]
    runs = {run["id"]: run for run in listed}
    assert runs["tiny"]["state"] == "finished"
    assert runs["damaged"]["state"] == "damaged"
    assert file in runs["damaged"]["error"]
    assert reason in runs["damaged"]["error"]
    assert runs["damaged"]["curves"] == {"train/loss": [[1, 2.5]]}
    assert caplog.text.count("damaged run") == 1


@pytest.mark.parametrize(
    "damage", [b"\0" * 200_000, b"2," + b"9" * 200_000, b"2,\0,", b"2", b"x,1"]
)
def test_damaged_lines_of_metrics_are_left_out_as_training_does(
    tmp_path: Path, damage: bytes
) -> None:
    run_dir = write_run(tmp_path / "torn", "1,8,2.5,,")
    (run_dir / "metrics.csv").write_bytes(b"step,train/loss\n1,2.5\n" + damage + b"\n3,2.0\n")
    (run,) = find_runs(tmp_path)
    assert run["curves"] == {"train/loss": [(1, 2.5), (3, 2.0)]}
    assert run["error"] is None


def test_a_file_that_is_no_metrics_spoils_its_run(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "other", "1,8,2.5,,")
    (run_dir / "metrics.csv").write_text("time,loss\n1,2\n")
    (run,) = find_runs(tmp_path)
    assert run["state"] == "damaged"
    assert "begins with ['time']" in str(run["error"])


def test_merge_keys_do_not_make_a_configuration_grow(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "merges", "1,8,2.5,,")
    (run_dir / "config.yaml").write_text(f"{MERGES}stage: pretrain\n")
    (run,) = find_runs(tmp_path)
    assert (run["stage"], run["error"]) == ("pretrain", None)


@pytest.mark.parametrize("key", ["stage", "max_steps"])
def test_anchors_do_not_make_a_configuration_grow(tmp_path: Path, key: str) -> None:
    run_dir = write_run(tmp_path / "anchors", "1,8,2.5,,")
    (run_dir / "config.yaml").write_text(f"{MERGES.replace('<<', 'all')}{key}: *a29\n")
    (run,) = find_runs(tmp_path)
    assert (run["stage"], run["max_steps"], run["error"]) == (None, None, None)


@pytest.mark.parametrize("file", ["metrics.csv", "summary.json", "config.yaml", "report.html"])
def test_what_is_no_file_spoils_its_own_run_only(tmp_path: Path, file: str) -> None:
    for name in ("fifo", "loop", "dangling", "device", "whole"):
        run_dir = write_run(tmp_path / name, "1,8,2.5,,", summary={"steps": 1})
        if name != "whole":
            (run_dir / file).unlink()
    os.mkfifo(tmp_path / "fifo" / file)
    (tmp_path / "loop" / file).symlink_to(file)
    (tmp_path / "dangling" / file).symlink_to("nowhere")
    (tmp_path / "device" / file).symlink_to("/dev/zero")
    runs = {run["id"]: run for run in find_runs(tmp_path)}
    assert runs["whole"]["state"] == "finished"
    for name in ("fifo", "loop", "dangling", "device"):
        assert runs[name]["state"] == ("finished" if file == "report.html" else "damaged")
        assert (runs[name]["report"] is None) == (file == "report.html")


@pytest.mark.parametrize(
    "values",
    [
        {"steps": "many"},
        {"steps": 10**400},
        {"steps": float("inf"), "stage": ["pretrain"]},
        {"name": "\ud800", "stage": "x" * 10**6},
    ],
)
def test_odd_values_of_a_summary_are_left_out(
    url: str, runs_dir: Path, values: dict[str, Any]
) -> None:
    write_run(runs_dir / "odd", "7,8,2.5,,", summary=values)
    answer = httpx.get(f"{url}/v1/runs")
    assert len(answer.content) < 10_000
    runs = {run["id"]: run for run in answer.json()["data"]}
    assert runs["odd"]["step"] == 7
    assert runs["odd"]["summary"]["train_loss"] == 2.5


def test_a_name_that_is_not_utf8_is_listed_and_its_report_opens(url: str, runs_dir: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    os.rename(write_run(runs_dir / "cafe", "1,8,3,,", summary={}), runs_dir / name)
    runs = {run["id"]: run for run in httpx.get(f"{url}/v1/runs").json()["data"]}
    assert set(runs) == {"tiny", "caf\\xe9"}
    assert httpx.get(url + runs["caf\\xe9"]["report"]).status_code == 200


@pytest.mark.parametrize("seconds", [-1e9, 4e11])
def test_a_date_that_cannot_be_shown_is_clamped(tmp_path: Path, seconds: float) -> None:
    path = write_run(tmp_path / "odd", "1,8,3,,") / "metrics.csv"
    os.utime(path, (seconds, seconds))
    (run,) = find_runs(tmp_path)
    assert 0 <= run["updated"] < 8.64e12


def test_a_torn_or_broken_run_is_listed_as_far_as_it_can_be_read(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "torn", "1,8,3.5,,", "2,16,nan,,", "3,24,3.0,,", "4,3")
    (run_dir / "summary.json").write_text('{"steps": 4, ')
    (run_dir / "config.yaml").write_text("stage: [")
    (run,) = find_runs(tmp_path)
    assert run["curves"] == {"train/loss": [(1, 3.5), (3, 3.0)]}
    assert (run["state"], run["stage"], run["step"]) == ("damaged", None, 3)
    assert run["error"] is not None
    assert "summary.json" in run["error"]
    assert "config.yaml" in run["error"]


def test_a_run_whose_files_rest_is_not_training(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "old", "5,40,3.5,,")
    os.utime(run_dir / "metrics.csv", (1_700_000_000, 1_700_000_000))
    (run,) = find_runs(tmp_path)
    assert (run["state"], run["step"], run["max_steps"]) == ("stopped", 5, 20)


def test_runs_of_sweeps_have_their_path_as_name_and_the_newest_is_first(tmp_path: Path) -> None:
    for age, name in enumerate(("a", "sweep/0", "sweep/1")):
        path = write_run(tmp_path / name, "1,8,3,,") / "metrics.csv"
        os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
    assert [run["id"] for run in find_runs(tmp_path)] == ["a", "sweep/0", "sweep/1"]


def test_a_directory_that_is_a_run_is_listed_by_its_name(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", "1,8,3,,")
    assert [run["id"] for run in find_runs(tmp_path / "mine")] == ["mine"]


def test_nowhere_there_are_no_runs(tmp_path: Path) -> None:
    assert find_runs(tmp_path / "nowhere") == []


def test_a_long_curve_keeps_its_spikes_and_its_end() -> None:
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321] = (54_321, 9.0)
    points[54_322] = (54_322, -9.0)
    thinned = thin(points)
    assert len(thinned) <= MAX_POINTS + 2
    assert {(54_321, 9.0), (54_322, -9.0), points[-1]} <= set(thinned)
    assert thinned == sorted(thinned)


def test_what_changed_is_read_again(url: str, runs_dir: Path) -> None:
    with (runs_dir / "tiny" / "metrics.csv").open("a") as file:
        file.write("30,240,2.5,,7\n")
    (run,) = httpx.get(f"{url}/v1/runs").json()["data"]
    assert run["curves"]["train/loss"][-1] == [30, 2.5]


def test_leaderboards_of_sweeps_are_listed_without_paths(runs_dir: Path, url: str) -> None:
    write_run(runs_dir / "sweep-1" / "a", "1,8,4.5,,9", summary={"stage": "pretrain", "steps": 1})
    results = '{"bits_per_byte": 1.5, "p_value": NaN, "tokens": 1e300}'
    about = '{"seeds": [1, 2], "runs": ["/secret"]}'
    row = f'{{"checkpoint": "lr=1", "task": "compare", "results": {results}, "about": {about}}}'
    (runs_dir / "sweep-1" / "leaderboard.json").write_text(f"[{row}]")
    boards = httpx.get(f"{url}/v1/runs").json()["leaderboards"]
    assert boards == {"sweep-1": [{"label": "lr=1", "seeds": 2, "bits_per_byte": 1.5}]}
    (runs_dir / "sweep-1" / "leaderboard.json").write_text("[3]")
    assert httpx.get(f"{url}/v1/runs").json()["leaderboards"] == {}
